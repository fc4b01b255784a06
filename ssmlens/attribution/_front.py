"""The front of a mixer, and the gate behind its scan, in stretches of time.

A row of a map needs the convolution's input and the slope of its activation at every source, but the gate at the row
alone. `Front` gives both without holding the whole sequence: at 32,000 tokens each tensor of the inner width takes
0.2 GB, and a row has room for two.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmlens.attribution._mixers import slope
from ssmlens.kernels import attention
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.trace import MixerTrace

__all__ = ["PLACES", "Front", "activate", "derivative", "gate_of"]

PLACES = {"mamba1": 0, "mamba2": 1}
"""Where the rows of in_proj that feed the convolution's value channels start, in units of d_inner."""

_STRETCH = 2**19
"""Elements of one stretch of time, at least one token."""


def gate_of(mixer: MixerTrace) -> Tensor:
    """What the scan's output is multiplied with before the output projection, (b, t, e)."""
    gate = F.silu(mixer.gate.detach().to(mixer.recurrence.dtype))
    if mixer.family == "mamba1":
        return gate
    return gate * _norm(mixer, mixer.recurrence.run().detach().flatten(2) * gate)


def _norm(mixer: MixerTrace, gated: Tensor) -> Tensor:
    """Mamba-2's 1/rms of its gated norm, times the weight, like ``gated`` (..., e)."""
    grouped = gated.unflatten(-1, (-1, mixer.config["norm_group"]))
    scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + mixer.config["norm_eps"])
    return scale.expand_as(grouped).flatten(-2) * mixer.parameters["norm.weight"].detach().to(gated.dtype)


class Front:
    """One mixer, with its weights in the compute dtype.

    Args:
        mixer: of a family in `PLACES`, with its weights.
    """

    def __init__(self, mixer: MixerTrace) -> None:
        self.mixer, rec = mixer, mixer.recurrence
        self.dtype, self.length, self.inner = rec.dtype, rec.length, rec.n_heads * rec.head_dim
        self.activation = mixer.config["activation"]
        first = PLACES[mixer.family] * self.inner
        rows, own = slice(first, first + self.inner), slice(0, self.inner)
        self.projection, self.projection_bias = self._weight("in_proj.weight", rows), self._weight("in_proj.bias", rows)
        kernel = self._weight("conv1d.weight", own)
        assert kernel is not None
        assert self.projection is not None
        self.taps = kernel[:, 0].flip(-1)
        """(e, k) weights of the convolution, that of the current token first."""
        self.bias = self._weight("conv1d.bias", own)
        """(e,) bias of the convolution, or None."""
        self.skip = torch.zeros(self.inner, dtype=self.dtype, device=self.taps.device)
        """(e,) weight of the scan's value in its output."""
        if rec.D is not None:
            d = rec.D.detach().to(self.dtype).view(rec.n_heads, -1)
            self.skip = d.expand(-1, rec.head_dim).reshape(self.inner)

    def _weight(self, name: str, rows: slice) -> Tensor | None:
        found = self.mixer.parameters.get(name)
        return None if found is None else found.detach()[rows].to(self.dtype)

    @property
    def inputs(self) -> ScanInputs:
        """Of the recurrence, without gradients and without a first state."""
        return self.mixer.recurrence.inputs.map(torch.detach).cast().replace(initial=None)

    def stretches(self, stop: int) -> Iterator[tuple[int, int]]:
        """Start and stop of stretches of time that cover the first ``stop`` tokens."""
        size = max(1, _STRETCH // (self.mixer.recurrence.batch * self.inner))
        for start in range(0, stop, size):
            yield start, min(start + size, stop)

    def x(self, start: int, stop: int) -> Tensor:
        """(b, stop - start, e) what enters the convolution."""
        hidden = self.mixer.input[:, start:stop].detach().to(self.dtype)
        assert self.projection is not None
        return F.linear(hidden, self.projection, self.projection_bias)

    def conv(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """What enters the convolution, and what leaves it before its activation, both (b, stop - start, e)."""
        before = min(start, self.taps.shape[1] - 1)
        x = self.x(start - before, stop)
        c = x[:, before:] * self.taps[:, 0]
        for k in range(1, min(self.taps.shape[1], stop)):
            lead = max(0, k - before)
            c[:, lead:] += x[:, before + lead - k : x.shape[1] - k] * self.taps[:, k]
        return x[:, before:], c if self.bias is None else c.add_(self.bias)

    def slope(self, start: int, stop: int) -> Tensor:
        """(b, stop - start, e) act(c) / c."""
        return slope(self.conv(start, stop)[1], self.activation)

    def gate(self, t: int, line: Tensor) -> Tensor:
        """(b, e) what the scan's output at ``t`` is multiplied with; 0 at padding.

        Args:
            t: a position, from 0.
            line: (b, h, s) row t of the recurrence's matrix.
        """
        mixer, rec = self.mixer, self.mixer.recurrence
        if rec.inputs.initial is not None:
            return gate_of(mixer)[:, t].masked_fill(~rec.real[:, t, None], 0)
        gate = F.silu(self._z(t))
        if mixer.family == "mamba2":
            value = rec.value.detach()
            read = torch.einsum("bhs,bshp->bhp", line[..., : t + 1], value[:, : t + 1].to(self.dtype)).flatten(1)
            gate = gate * _norm(mixer, (read + self.skip * value[:, t].to(self.dtype).flatten(1)) * gate)
        return gate.masked_fill(~rec.real[:, t, None], 0)

    def _z(self, t: int) -> Tensor:
        """(b, e) the gate at ``t`` before its activation."""
        if self.mixer.stored_gate is not None:
            return self.mixer.stored_gate[:, t].detach().to(self.dtype)
        first = 0 if self.mixer.family == "mamba2" else self.inner
        rows = slice(first, first + self.inner)
        weight = self._weight("in_proj.weight", rows)
        assert weight is not None
        hidden = self.mixer.input[:, t].detach().to(self.dtype)
        return F.linear(hidden, weight, self._weight("in_proj.bias", rows))

    def line(self, t: int) -> tuple[Tensor, Tensor]:
        """Row t of the recurrence's matrix with the skip, per channel (b, e, s), and the gate at t (b, e)."""
        line = attention.row(self.inputs, t)
        gate = self.gate(t, line)
        head_dim = self.mixer.recurrence.head_dim
        line = line if head_dim == 1 else line.repeat_interleave(head_dim, 1)
        line[..., t] += self.skip
        return line, gate


def activate(x: Tensor, name: str) -> Tensor:
    """act(x), like x."""
    from transformers.activations import ACT2FN

    out: Tensor = ACT2FN[name](x)
    return out


def derivative(c: Tensor, name: str) -> Tensor:
    """act'(c), like c."""
    with torch.inference_mode(False), torch.enable_grad():
        point = c.clone().requires_grad_()
        (found,) = torch.autograd.grad(activate(point, name).sum(), point)
    return found
