"""One scan call of a mixer, with what it takes to compute it differently.

The tap hands out the arguments of the scan. What lies before it in the mixer, the convolution and the projections to
dt, B and C, is computed again from the mixer's input and weights, and held against the arguments that the model
itself came to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmlens.errors import ReconstructionError
from ssmlens.kernels import scan as kernel
from ssmlens.kernels.inputs import ScanInputs, expand_groups
from ssmlens.models import Family
from ssmlens.models.family import Lowered
from ssmlens.recurrence import Recurrence
from ssmlens.tap import ScanCall
from ssmlens.trace import TOLERANCE, relative_error

__all__ = [
    "Exchange", "Scan", "Seen", "StateChange", "conv_inputs", "convolve", "past_taps", "run_with_states"
]  # fmt: skip

PROJECTED = ("hidden_states", "dt", "B", "C")
"""Scan arguments that hang on the convolution's output, in both families."""

StateChange = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Exchange:
    """A state that was put in place of another.

    Args:
        step: after which token.
        state: (b, h, p, n) what is carried on.
        gain: (b, h) factor that is left of what the state held before; NaN where it is none.
    """

    step: int
    state: Tensor
    gain: Tensor


@dataclass(eq=False)
class Seen:
    """What a changed scan did, for whoever wants to know.

    Args:
        recurrence: what every row was computed with that no other pass served; None before the scan has run.
        passes: rows (b, t) bool, and the recurrence that they were computed with in place of ``recurrence``; later
            entries win.
        exchanges: states put in on the way, by rising step.
        read_now: whether the output of an exchange's own step reads the new state.
    """

    recurrence: Recurrence | None = None
    passes: list[tuple[Tensor, Recurrence]] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    read_now: bool = True


@dataclass(frozen=True)
class Scan:
    """One scan call inside a changed forward.

    Args:
        call: the call as the tap saw it.
        mixer: the module that it happens in.
        hidden: (b, t, d) the mixer's input.
        lengths: (b,) real tokens of each row, None without padding.
        fast: compute with ssmlens.kernels where the model's own scan would do.
        seen: where to write down what was computed; None when nobody asks.
    """

    call: ScanCall
    mixer: Any
    hidden: Tensor
    lengths: Tensor | None
    fast: bool
    seen: Seen | None = None

    @property
    def family(self) -> Family:
        return self.call.family

    @cached_property
    def lowered(self) -> Lowered:
        """The call as the model makes it."""
        return self.lower(self.call.arguments)

    def lower(self, arguments: Mapping[str, Any]) -> Lowered:
        return self.family.lower(arguments, self.lengths)

    def plain(self) -> Any:
        """What the scan returns unchanged."""
        if not self.fast:
            return self.call.run()
        return self.compute(self.lowered)

    def compute(self, lowered: Lowered, inputs: ScanInputs | None = None) -> Any:
        """What the scan returns for changed scan inputs; skip and gate are those of ``lowered``."""
        y, final = kernel.run(lowered.recurrence.inputs if inputs is None else inputs)
        return self.pack(lowered, lowered.recurrence.add_skip(y), final)

    def pack(self, lowered: Lowered, y: Tensor, final: Tensor) -> Any:
        """y (b, t, h, p) with the skip, and the final state, as the scan function returns them."""
        return self.family.replace(self.call.arguments, lowered, y, final)

    def merge(self, rows: Tensor, changed: Any, unchanged: Any) -> Any:
        """Two results of the scan, the first where ``rows`` (b, t) is True. The final state is of the second."""
        pair = isinstance(unchanged, tuple)
        a, b = (changed[0], unchanged[0]) if pair else (changed, unchanged)
        mask = rows[:, None] if self.family.name == "mamba1" else rows[:, :, None, None]
        out = torch.where(mask, a.to(b.dtype), b)
        return (out, unchanged[1]) if pair else out

    def exchange(
        self,
        lowered: Lowered,
        changes: Mapping[int, StateChange],
        gain: Callable[[int], Tensor],
        read_now: bool,
    ) -> Any:
        """What the scan returns with states exchanged on the way.

        Args:
            lowered: the call.
            changes, read_now: as in `run_with_states`.
            gain: of a step, (b, h) what is left of the state there, see `Exchange`.
        """
        seen = self.seen

        def noted(t: int, h: Tensor) -> Tensor:
            new = changes[t](t, h)
            if seen is not None:
                seen.exchanges.append(Exchange(t, new.detach(), gain(t)))
            return new

        rec = lowered.recurrence
        y, final = run_with_states(rec.inputs, dict.fromkeys(changes, noted), read_now)
        if seen is not None:
            seen.recurrence, seen.read_now = rec, read_now
        return self.pack(lowered, rec.add_skip(y), final)

    @cached_property
    def x(self) -> Tensor:
        """(b, t, c) what enters the convolution: x for Mamba-1, x, B and C for Mamba-2."""
        return conv_inputs(self.family, self.mixer, self.hidden)

    def project(self, u: Tensor) -> dict[str, Any]:
        """The call's arguments for another output u (b, t, c) of the convolution and its activation.

        Raises:
            ReconstructionError: when the same route does not lead to the model's own arguments from its own u.
        """
        self._check()
        return {**self.call.arguments, **_project(self.call, self.mixer, u)}

    def _check(self) -> None:
        ours = _project(self.call, self.mixer, convolve(self.mixer, self.x))
        real = None
        if self.lengths is not None:
            real = torch.arange(self.hidden.shape[1], device=self.hidden.device) < self.lengths[:, None]
        for name in (n for n in PROJECTED if n in ours):
            a, b = ours[name], self.call.arguments[name]
            if self.family.name == "mamba1":
                a, b = a.transpose(1, 2), b.transpose(1, 2)
            error = relative_error(a.detach(), b.detach(), real)
            if not error <= TOLERANCE[self.mixer.out_proj.weight.dtype]:
                raise ReconstructionError(
                    f"layer {self.call.layer}: {name} computed again differs from the model's by {error:.1e}, so the "
                    "convolution of this model cannot be changed faithfully"
                )


def conv_inputs(family: Family, mixer: Any, hidden: Tensor) -> Tensor:
    """(b, t, c) what enters the convolution, from the mixer's input (b, t, d)."""
    projected = mixer.in_proj(hidden)
    channels = mixer.conv1d.weight.shape[0]
    if family.name == "mamba1":
        return projected[..., :channels]
    inner = mixer.out_proj.weight.shape[1]
    return projected[..., inner : inner + channels]


def convolve(mixer: Any, x: Tensor, own: Tensor | None = None, past: Tensor | None = None) -> Tensor:
    """Causal depthwise convolution and activation, (b, t, c).

    Args:
        mixer: gives taps, bias and activation.
        x: (b, t, c) the source tokens.
        own: (b, t, c) what the last tap, that of the current token, sees; ``x`` when None.
        past: (b, t, c) what the other taps add up to, when that is given in their place.
    """
    weight, bias = mixer.conv1d.weight, mixer.conv1d.bias
    if own is None and past is None:
        padded = F.pad(x.transpose(1, 2), (weight.shape[2] - 1, 0))
        out = F.conv1d(padded, weight, bias, groups=weight.shape[0]).transpose(1, 2)
    else:
        past = past_taps(mixer, x) if past is None else past
        out = past + (x if own is None else own) * weight[:, 0, -1]
        out = out if bias is None else out + bias
    return mixer.act(out)


def past_taps(mixer: Any, x: Tensor) -> Tensor:
    """(b, t, c) what the taps of the K - 1 earlier tokens add up to."""
    weight: Tensor = mixer.conv1d.weight
    if weight.shape[2] == 1:
        return torch.zeros_like(x)
    padded = F.pad(x.transpose(1, 2), (weight.shape[2] - 1, 0))[..., :-1]
    return F.conv1d(padded, weight[:, :, :-1], groups=weight.shape[0]).transpose(1, 2)


def _project(call: ScanCall, mixer: Any, u: Tensor) -> dict[str, Tensor]:
    """The scan's arguments that depend on the convolution's output u (b, t, c)."""
    if call.family.name == "mamba1":
        n, rank = call.arguments["A"].shape[-1], mixer.dt_proj.weight.shape[1]
        low, B, C = mixer.x_proj(u).split([rank, n, n], dim=-1)
        if hasattr(mixer, "dt_layernorm"):
            low, B, C = mixer.dt_layernorm(low), mixer.b_layernorm(B), mixer.c_layernorm(C)
        dt = mixer.dt_proj.weight @ low.transpose(1, 2)
        return {"hidden_states": u.transpose(1, 2), "dt": dt, "B": B.transpose(1, 2), "C": C.transpose(1, 2)}
    x, B = call.arguments["hidden_states"], call.arguments["B"]
    parts = u.split([x.shape[2] * x.shape[3], B.shape[2] * B.shape[3], B.shape[2] * B.shape[3]], dim=-1)
    return {
        "hidden_states": parts[0].unflatten(-1, x.shape[2:]),
        "B": parts[1].unflatten(-1, B.shape[2:]),
        "C": parts[2].unflatten(-1, B.shape[2:]),
    }


def run_with_states(
    inputs: ScanInputs, changes: Mapping[int, StateChange], read_now: bool = True
) -> tuple[Tensor, Tensor]:
    """y (b, t, h, p) without skip and the final state (b, h, p, n), states exchanged on the way.

    Args:
        inputs: the recurrence.
        changes: step t to a function of t and the state (b, h, p, n) after it; what it returns is carried on.
        read_now: the output of step t reads the exchanged state; else only the later ones do.
    """
    read = expand_groups(inputs.read.to(inputs.dtype), inputs.n_heads)
    pieces, start, state = [], 0, inputs.initial
    for t in sorted(changes):
        y, state = kernel.run(inputs.slice(start, t + 1).replace(initial=state))
        state = changes[t](t, state).to(state.dtype)
        if read_now:
            y = torch.cat([y[:, :-1], torch.einsum("bhpn,bhn->bhp", state, read[:, t])[:, None]], dim=1)
        pieces.append(y)
        start = t + 1
    if start < inputs.length or not pieces:
        y, state = kernel.run(inputs.slice(start, inputs.length).replace(initial=state))
        pieces.append(y)
    assert state is not None
    return torch.cat(pieces, dim=1), state
