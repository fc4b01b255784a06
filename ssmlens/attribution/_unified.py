"""The unified implicit attention: convolution, scan, skip and gate of a mixer as one matrix per channel.

With everything held fixed that multiplies, the gated output of a mixer is linear in the input ``x`` of its
convolution, channel by channel::

    U[d] = diag(gate[d]) (M[head of d] + skip[d] I) diag(act(c[d]) / c[d]) Conv[d]
    U x + bias = gated output,   bias = diag(gate) (M + skip I) (act(c) / c * convolution's bias)

``c`` is the convolution's output, and act(c) / c is sigmoid(c) for SiLU. Mamba-2's gate includes the norm behind it,
held at its 1/rms. Zimerman, Ali and Wolf (2024, "A Unified Implicit Attention Formulation for Gated-Linear Recurrent
Sequence Models") leave out skip and bias and treat Mamba-1; with them the identity is exact.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ssmlens.attention import DENSE_LIMIT, REDUCTIONS
from ssmlens.attribution._front import PLACES, Front, gate_of
from ssmlens.attribution._mixers import slope
from ssmlens.errors import MemoryLimitError, SsmlensError, UnsupportedModelError
from ssmlens.kernels import attention, scan
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.trace import MixerTrace

__all__ = ["UnifiedAttention", "convolution", "unified"]

# Elements of one block of channels' matrices in `reduce`.
_BLOCK = 2**24


@dataclass(frozen=True, eq=False)
class UnifiedAttention:
    """The matrices U, (b, e, t, s) for e inner channels, never stored unless asked for; exactly 0 for s > t.

    Everything is in the compute dtype: float64 for a float64 model, else float32.

    Args:
        mixer: one layer of a trace, with its weights.
        parts: which of "conv", "activation", "skip" and "gate" are in it; with all four the identity holds.
    """

    mixer: MixerTrace = field(repr=False)
    parts: frozenset[str]

    @property
    def layer(self) -> int:
        """Index of the layer."""
        return self.mixer.layer

    @cached_property
    def _front(self) -> Front:
        return Front(self.mixer)

    @cached_property
    def inputs(self) -> ScanInputs:
        """The recurrence, for M."""
        return self._front.inputs

    @cached_property
    def value(self) -> Float[Tensor, "b t e"]:
        """Input of the convolution, zero at padding."""
        with torch.no_grad():
            return self._front.x(0, self.mixer.recurrence.length) * self._real

    @cached_property
    def output(self) -> Float[Tensor, "b t e"]:
        """The gated output."""
        with torch.no_grad():
            return self.mixer.recurrence.run().detach().flatten(2) * gate_of(self.mixer) * self._real

    @cached_property
    def gate(self) -> Float[Tensor, "b t e"]:
        """Factor behind the scan, zero at padding."""
        with torch.no_grad():
            return (gate_of(self.mixer) if "gate" in self.parts else torch.ones_like(self.value)) * self._real

    @cached_property
    def slope(self) -> Float[Tensor, "b t e"]:
        """act(c) / c, c the output of the convolution."""
        if "activation" not in self.parts:
            return torch.ones_like(self.value)
        with torch.no_grad():
            return self._front.slope(0, self.mixer.recurrence.length)

    @property
    def taps(self) -> Float[Tensor, "e k"]:
        """Weights of the convolution, that of the current token first."""
        return self._front.taps

    @cached_property
    def skip(self) -> Float[Tensor, " e"]:
        """Weight of the scan's value in its output."""
        return self._front.skip if "skip" in self.parts else torch.zeros_like(self._front.skip)

    @property
    def conv_bias(self) -> Tensor | None:
        """(e,) bias of the convolution, or None."""
        return self._front.bias

    @property
    def _real(self) -> Tensor:
        return self.mixer.recurrence.real[..., None]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(b, e, t, s) of the dense matrices."""
        rec = self.mixer.recurrence
        return (rec.batch, rec.n_heads * rec.head_dim, rec.length, rec.length)

    def dense(
        self, channels: int | slice | Sequence[int] | None = None, limit: float | int = DENSE_LIMIT
    ) -> Float[Tensor, "b e t s"]:
        """The matrices of some channels, (b, channels, t, s).

        Args:
            channels: one channel, a slice or a list; all by default.
            limit: bytes that the result may take.

        Raises:
            MemoryLimitError: before allocating, when the result would exceed ``limit`` bytes.
            IndexError: when a channel does not exist.
        """
        chosen = self._channels(channels)
        b, _, t, s = self.shape
        size = b * len(chosen) * t * s * self._front.taps.element_size()
        if size > limit:
            raise MemoryLimitError(
                f"dense() of {len(chosen)} channels x {t} x {s} needs {size / 1e9:.1f} GB (limit {limit / 1e9:.1f} "
                "GB): pass channels=..., use row(t), reduce(how) or apply(x)"
            )
        return self._matrices(chosen)

    def row(self, t: int) -> Float[Tensor, "b e s"]:
        """Row ``t`` of every channel, (b, e, s), at linear cost; negative t counts from the end."""
        length = self.shape[2]
        if not -length <= t < length:
            raise IndexError(f"row {t} is outside the {length} tokens of this map")
        t = operator.index(t) % length
        with torch.no_grad():
            line = attention.row(self.inputs, t)
            gate = self._front.gate(t, line) if "gate" in self.parts else self._real[:, t].to(line.dtype)
            if self.inputs.head_dim > 1:
                line = line.repeat_interleave(self.inputs.head_dim, 1)
            line[..., t] += self.skip
            line *= gate[..., None]
            # A stretch is finished before the next, which reads on from its own start.
            for start, stop in self._front.stretches(t + 1):
                line[..., start:stop] = self._stretch(line, start, stop)
            return line

    def _stretch(self, line: Tensor, start: int, stop: int) -> Tensor:
        """Columns ``start`` to ``stop`` of a row of gate times M, in terms of the convolution's input, (b, e, s)."""
        reach = self.taps.shape[1] - 1 if "conv" in self.parts else 0
        near = line[..., start : stop + reach]
        if "activation" in self.parts:
            near = near * self._front.slope(start, start + near.shape[-1]).mT
        if not reach:
            return near
        out = near[..., : stop - start] * self.taps[:, :1]
        for k in range(1, reach + 1):
            later = near[..., k : k + stop - start]
            out[..., : later.shape[-1]] += later * self.taps[:, k, None]
        return out

    def reduce(self, how: str, limit: float | int = DENSE_LIMIT) -> Float[Tensor, "b t s"]:
        """One map over all channels, (b, t, s), never holding (b, e, t, s).

        Args:
            how: "mean" (signed), "mean_abs", "max_abs" or "norm" (root of the sum of squares over channels).
            limit: bytes that the result may take.

        Raises:
            SsmlensError: unknown reduction.
            MemoryLimitError: before allocating, when the result would exceed ``limit`` bytes.
        """
        if how not in REDUCTIONS:
            raise SsmlensError(f"unknown reduction {how!r}: choose one of {', '.join(REDUCTIONS)}")
        b, e, t, s = self.shape
        if b * t * s * self._front.taps.element_size() > limit:
            raise MemoryLimitError(f"reduce() of {t} x {s} exceeds the limit of {limit / 1e9:.1f} GB: use row(t)")
        out = self.value.new_zeros(b, t, s)
        for block in self._blocks():
            part = self._matrices(block)
            if how == "max_abs":
                out = torch.maximum(out, part.abs().amax(1))
            elif how == "norm":
                out += part.square().sum(1)
            else:
                out += (part if how == "mean" else part.abs()).sum(1)
        return out.sqrt() if how == "norm" else out if how == "max_abs" else out / e

    def apply(self, x: Float[Tensor, "b t e"]) -> Float[Tensor, "b t e"]:
        """U x along time, (b, t, e), at the cost of one scan."""
        if tuple(x.shape) != tuple(self.value.shape):
            raise SsmlensError(f"x is {tuple(self.value.shape)} (b, t, channels), got {tuple(x.shape)}")
        before = x.to(self.value.dtype)
        if "conv" in self.parts:
            before = convolution(before, self.taps)
        return self._behind(before * self.slope)

    @cached_property
    def bias(self) -> Float[Tensor, "b t e"]:
        """What no token owns, (b, t, e): the convolution's bias behind everything. Zero without "conv"."""
        if self.conv_bias is None or "conv" not in self.parts:
            return torch.zeros_like(self.value)
        return self._behind(self.slope * self.conv_bias)

    @cached_property
    def error(self) -> float:
        """Relative residual ``|output - U x - bias| / |output|`` (Euclidean): rounding with all four parts."""
        whole = self.output.norm().item()
        missing = (self.output - self.apply(self.value) - self.bias).norm().item()
        return missing if missing == 0 else missing / whole if whole else float("inf")

    def _behind(self, value: Tensor) -> Tensor:
        """What the scan, the skip and the gate make of a scan value (b, t, e)."""
        x = self.inputs.replace(value=value.view(self.inputs.value.shape), initial=None)
        with torch.no_grad():
            return (scan.run(x)[0].flatten(2) + self.skip * value) * self.gate

    def _matrices(self, channels: list[int]) -> Tensor:
        p = self.inputs.head_dim
        heads = sorted({c // p for c in channels})
        with torch.no_grad():
            full = attention.dense(self.inputs, heads)
            places = {head: i for i, head in enumerate(heads)}
            full = full[:, [places[c // p] for c in channels]]
            full.diagonal(dim1=2, dim2=3).add_(self.skip[channels][:, None])
            full *= self.gate[..., channels].transpose(1, 2)[..., None]
            return self._before(full, channels)

    def _before(self, full: Tensor, channels: slice | list[int]) -> Tensor:
        """Columns of the scan's value (b, e, ..., s) as columns of the convolution's input."""
        factor = self.slope[..., channels].transpose(1, 2)  # (b, e, s)
        full = full * factor.view(*factor.shape[:2], *[1] * (full.ndim - 3), factor.shape[2])
        if "conv" not in self.parts:
            return full
        taps = self.taps[channels].view(-1, *[1] * (full.ndim - 2), self.taps.shape[1])
        out = full * taps[..., 0]
        for k in range(1, min(self.taps.shape[1], full.shape[-1])):
            out[..., :-k] += full[..., k:] * taps[..., k]
        return out

    def _blocks(self) -> Iterator[list[int]]:
        b, e, t, s = self.shape
        size = max(1, _BLOCK // max(1, b * t * s))
        for start in range(0, e, size):
            yield list(range(start, min(start + size, e)))

    def _channels(self, channels: int | slice | Sequence[int] | None) -> list[int]:
        e = self.shape[1]
        if channels is None:
            return list(range(e))
        if isinstance(channels, slice):
            chosen = list(range(e))[channels]
        else:
            chosen = [operator.index(c) for c in (channels if isinstance(channels, Sequence) else [channels])]
        for c in chosen:
            if not -e <= c < e:
                raise IndexError(f"channel {c} does not exist: channels are 0 to {e - 1}")
        if not chosen:
            raise IndexError(f"channels chooses none of the {e}: {channels!r}")
        return [c % e for c in chosen]


PARTS = ("conv", "activation", "skip", "gate")


def unified(mixer: MixerTrace, parts: Sequence[str] = PARTS) -> UnifiedAttention:
    """The unified implicit attention of a mixer, from the input of its convolution to its gated output.

    Args:
        mixer: one layer of a trace, with its weights.
        parts: what to include besides the scan: "conv", "activation", "skip", "gate". All four by default; the paper's
            map leaves out "skip", and its ablations leave out the others one by one.

    Returns:
        an operator with `.dense(channels)`, `.row(t)`, `.reduce(how)`, `.apply(x)`, `.bias` and `.error`.

    Raises:
        SsmlensError: an unknown part, or a trace without weights.
        UnsupportedModelError: a family without a known convolution and gate.
    """
    for part in parts:
        if part not in PARTS:
            raise SsmlensError(f"unknown part {part!r}: choose from {', '.join(PARTS)}")
    if mixer.family not in PLACES:
        raise UnsupportedModelError(f"the unified map needs a mixer of {' or '.join(PLACES)}, not {mixer.family!r}")
    if not mixer.parameters:
        raise SsmlensError(
            f"layer {mixer.layer} of this trace has no weights: save it with trace.save(path, weights=True)"
        )
    if "activation" in parts:
        slope(torch.zeros(()), mixer.config["activation"])  # refuses one that is no factor times its input
    return UnifiedAttention(mixer, frozenset(parts))


def convolution(x: Tensor, taps: Tensor) -> Tensor:
    """Causal depthwise convolution of (b, t, e) with taps (e, k), that of the current token first; no bias."""
    out = x * taps[:, 0]
    for k in range(1, min(taps.shape[1], x.shape[1])):
        out[:, k:] += x[:, :-k] * taps[:, k]
    return out
