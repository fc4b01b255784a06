"""Launches of the walk: what the kernel is compiled for, its pointers and strides, and the segments of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inputs import ScanInputs
from .device import on_its_device
from .rounding import cdiv, next_power_of_2
from .walk_kernel import walk_kernel
from .walk_plan import Plan
from .walk_token import ENDS, EVERY, LISTED, NONE, RESUME, WHOLE, Cut

__all__ = ["Extras", "launch", "which_states"]


@dataclass(frozen=True)
class Extras:
    """What a Mamba-1 mixer does around its scan, per head (p = 1): see `selective.selective_scan`.

    Attributes:
        bias: (h,) added to dt.
        softplus: dt is log(1 + exp(dt)), after the bias.
        skip: (h,) times the value, added to y.
        gate: (b, t, h); y is multiplied by gate * sigmoid(gate).
    """

    bias: Tensor | None = None
    softplus: bool = False
    skip: Tensor | None = None
    gate: Tensor | None = None


def which_states(
    x: ScanInputs, picks: Sequence[int] | str | None, every: int | None = None
) -> tuple[int | None, Sequence[int] | None]:
    """``picks`` and ``every`` as `launch` takes them, checked; "all" is every token."""
    if every is not None and (picks is not None or every < 1):
        raise ValueError(f"give picks or every (a positive step), got picks={picks!r} and every={every}")
    if isinstance(picks, str):
        if picks != "all":
            raise ValueError(f'picks is None, "all" or token positions, got {picks!r}')
        return 1, None
    if any(not 0 <= i < x.length for i in picks or ()):
        raise ValueError(f"picks are token positions 0 to {x.length - 1}, got {list(picks or ())}")
    return every, picks


@on_its_device
def launch(
    x: ScanInputs,
    plan: Plan,
    *,
    y: Tensor | None = None,
    every: int | None = None,
    picks: Sequence[int] | None = None,
    norm: Tensor | None = None,
    kept: Tensor | None = None,
    extras: Extras | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run the kernel. ``y``, ``norm`` and ``kept`` are contiguous float32 buffers (b, t, h, p), filled where given.

    Returns:
        The final state (b, h, p, n), and the states (b, k, h, p, n) after every ``every``-th token or after ``picks``.
    """
    b, t, h, p = x.value.shape
    n = x.d_state
    make: dict[str, Any] = {"device": x.value.device, "dtype": torch.float32}
    if not b or not t:
        final = torch.zeros(b, h, p, n, **make) if x.initial is None else x.initial.float().clone()
        return final, None if every is None and picks is None else torch.empty(b, 0, h, p, n, **make)
    extras = extras or Extras()
    # The window of tokens that wait has to fit into the sequence. An erase couples the numbers of a state, so that a
    # segment's decay would be a matrix.
    plan = plan._replace(ahead=min(plan.ahead, 1 << t.bit_length() - 1), segments=1 if x.has_erase else plan.segments)
    per_segment = cdiv(cdiv(t, plan.segments), plan.ahead) * plan.ahead
    segments = cdiv(t, per_segment)
    final = torch.empty(b, h, p, n, **make)
    ends, decays = torch.empty(2, b, segments - 1, h, p, n, **make) if segments > 1 else (final, final)
    count = t // every if every else len(picks or ())
    states = None if every is None and picks is None else torch.empty(b, count, h, p, n, **make)
    listed = bool(picks)
    slots = _slots(picks or (), t, x.value.device) if listed else final
    pieces = _pieces(x, extras)
    form = Form._make(None if z is None else Piece(z.shape, z.stride()) for z in pieces.values())
    arguments = {f"{name}_ptr": x.value if z is None else z for name, z in pieces.items()} | _numbers(form) | {
        "slot_ptr": slots, "y_ptr": _or(y, final), "final_ptr": final, "states_ptr": _or(states, final),
        "norm_ptr": _or(norm, final), "kept_ptr": _or(kept, final), "end_ptr": ends, "decay_ptr": decays,
        "length": t, "segments": segments, "per_segment": per_segment,
        "every": every or 1, "picks": count,
    }  # fmt: skip
    cut = _cut(form, extras.softplus, plan)
    blocks = cdiv(h * p, plan.rows)
    if segments > 1:
        first = cut._replace(SKIP=False, GATE=False, PASS=ENDS.value)
        walk_kernel[(blocks, b * (segments - 1))](**arguments, F=first, num_warps=plan.warps)
    cut = cut._replace(
        OUTPUT=y is not None,
        STATES=(LISTED if listed else EVERY if count else NONE).value,
        ALIGNED=every is not None and every > 1 and every % plan.ahead == 0,
        NORMS=norm is not None,
        PASS=(RESUME if segments > 1 else WHOLE).value,
    )
    walk_kernel[(blocks, b * segments)](**arguments, F=cut, num_warps=plan.warps)
    if listed and states is not None:
        _repeat(states, picks or ())
    return final, states


def _or(buffer: Tensor | None, other: Tensor) -> Tensor:
    return other if buffer is None else buffer


class Piece(NamedTuple):
    """Of a tensor what a launch needs besides its address."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Form(NamedTuple):
    """The pieces that a walk reads, by the names that the kernel knows them by; None where one is absent."""

    x: Piece
    dt: Piece | None
    a: Piece | None
    log: Piece | None
    write: Piece
    read: Piece
    seen: Piece | None
    cut: Piece | None
    reset: Piece | None
    initial: Piece | None
    bias: Piece | None
    skip: Piece | None
    gate: Piece | None


_AXES = ("bthp", "bth", "hn", "bthn", "btgn", "btgn", "btgn", "btgn", "bt", "bhpn", "h", "h", "bth")


def _pieces(x: ScanInputs, extras: Extras) -> dict[str, Tensor | None]:
    """In the order of `Form`."""
    return {
        "x": x.value, "dt": x.dt, "a": x.A, "log": x.log_decay, "write": x.write, "read": x.read,
        "seen": x.erase_read, "cut": x.erase_write,
        "reset": None if x.reset is None else x.reset.view(torch.uint8), "initial": x.initial,
        "bias": extras.bias, "skip": extras.skip, "gate": extras.gate,
    }  # fmt: skip


# A model calls the same few forms over and over, and working one out again takes longer than looking it up.
@lru_cache(maxsize=1024)
def _cut(form: Form, softplus: bool, plan: Plan) -> Cut:
    """What the kernel is compiled for, before anything is written."""
    (_, t, h, p), n, H = form.x.shape, form.write.shape[3], plan.rows
    width = next_power_of_2(n)

    def shared(*directions: Piece | None) -> int:
        """1 where no program's rows belong to two groups of one of these directions."""
        per_group = [h // z.shape[2] * p for z in directions if z is not None]
        return 1 if all(per % H == 0 or per == h * p for per in per_group) else H

    def step(piece: Piece | None) -> int:
        return 0 if piece is None else piece.stride[1]

    decay = form.log if form.a is None else form.a
    assert decay is not None
    return Cut(
        P=p, n=n, H=H, N=width, U=plan.ahead, rows=h * p,
        HEADS=1 if p % H == 0 or h == 1 else H,
        WRITES=shared(form.write), READS=shared(form.read), ERASES=shared(form.seen, form.cut),
        FULL_R=h * p % H == 0, FULL_N=width == n, EVEN=t % plan.ahead == 0,
        DT=form.dt is not None, FACTORED=form.a is not None, PER_STATE=n > 1 and decay.shape[-1] == n,
        RESET=form.reset is not None, ERASE=form.seen is not None, INITIAL=form.initial is not None,
        BIAS=form.bias is not None, SOFTPLUS=softplus,
        SKIP=form.skip is not None, GATE=form.gate is not None,
        x_t=step(form.x), dt_t=step(form.dt), log_t=step(form.log), write_t=step(form.write), read_t=step(form.read),
        seen_t=step(form.seen), cut_t=step(form.cut), gate_t=step(form.gate), reset_t=step(form.reset),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _numbers(form: Form) -> dict[str, int]:
    """Strides but that of time, 0 for an absent piece, and rows of a group."""
    h, p = form.x.shape[2:]
    found: dict[str, int] = {}
    for name, piece, axes in zip(Form._fields, form, _AXES, strict=True):
        strides = [0] * len(axes) if piece is None else piece.stride
        found |= {f"{name}_{axis}": stride for axis, stride in zip(axes, strides, strict=True) if axis != "t"}
    for name, piece in (("write", form.write), ("read", form.read), ("seen", form.seen), ("cut", form.cut)):
        found[f"{name}_rows"] = (h // piece.shape[2] if piece is not None else 1) * p
    return found


def _slots(picks: Sequence[int], length: int, device: torch.device) -> Tensor:
    """(t,) int32: where the state after a token goes, -1 for nowhere."""
    first = {position: slot for slot, position in reversed(list(enumerate(picks)))}
    pairs = torch.tensor([[*first.keys()], [*first.values()]], dtype=torch.int64, device="cpu")
    if device.type == "cuda":
        pairs = pairs.pin_memory().to(device, non_blocking=True)
    return torch.full((length,), -1, dtype=torch.int32, device=device).index_copy_(0, pairs[0], pairs[1].int())


def _repeat(states: Tensor, picks: Sequence[int]) -> None:
    """Copy the states of positions that were asked for more than once."""
    first: dict[int, int] = {}
    for slot, position in enumerate(picks):
        if first.setdefault(position, slot) != slot:
            states[:, slot] = states[:, first[position]]
