"""The recurrence walked token by token on a GPU, with the state in registers: outputs, states, norms.

The walk reads every input once, writes what was asked for and nothing else, and has no rounding but that of one
multiply-add a token: products of decays are never quotients or differences. It serves every kind of recurrence; for one decay
per head and p > 1 the matrix units (`ssd`) are faster unless every state is wanted. Layers with too few channels
to fill the chip are cut into segments of time: a first walk keeps each segment's end and decay, a second one starts each segment
from the state that enters it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..inputs import ScanInputs
from .walk_kernel import walk_kernel

__all__ = ["Extras", "Plan", "Statistics", "Walked", "forward", "launch", "plan", "statistics"]

WHOLE, ENDS, RESUME = range(3)
NONE, EVERY, LISTED = range(3)


class Walked(NamedTuple):
    """What a walk hands out.

    Attributes:
        y: (b, t, h, p), or None where it was not wanted.
        final: (b, h, p, n) state after the last token.
        states: (b, k, h, p, n) states that were asked for, or None.
    """

    y: Tensor | None
    final: Tensor
    states: Tensor | None


class Statistics(NamedTuple):
    """Sizes of the states, in the units of the state.

    Attributes:
        norm: (b, t, h) Frobenius norm of the state after token t.
        kept: (b, t, h) norm of what was left of the state before token t was written: after its decay and its erase.
    """

    norm: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Plan:
    """How a walk is cut up: rows a program (a power of two), warps, tokens fetched ahead, segments of time."""

    rows: int
    warps: int
    ahead: int
    segments: int = 1


@dataclass(frozen=True)
class Extras:
    """What a Mamba-1 mixer does around its scan, per head (p = 1): see `selective.selective_scan`."""

    bias: Tensor | None = None
    softplus: bool = False
    skip: Tensor | None = None
    gate: Tensor | None = None


def plan(x: ScanInputs, *, states: bool = False) -> Plan:
    """The cut that was fastest on an H100 for a recurrence of these sizes; NOTES.md has the numbers."""
    n = triton.next_power_of_2(x.d_state)
    rows = x.n_heads * x.head_dim
    warps = max(1, n // 1024)
    block = max(1, 128 * warps // n) if n <= 32 else max(1, 1024 * warps // n)
    block = min(block, triton.next_power_of_2(rows))
    shared = [p for p in (x.head_dim,) if p > 1]
    while block > 4 and any(size % block for size in shared):
        block //= 2
    return Plan(block, warps, 8 if n <= 32 else 4)


def forward(
    x: ScanInputs,
    picks: Sequence[int] | str | None = None,
    *,
    every: int | None = None,
    want_output: bool = True,
    plan: Plan | None = None,
) -> Walked:
    """Walk a recurrence once.

    Args:
        x: any recurrence, on a GPU (or on the CPU under Triton's interpreter); any floating dtype but float64.
        picks: states to hand out: None, "all", or token positions 0 to t - 1 in any order, repeats allowed.
        every: instead of ``picks``: the states after tokens every - 1, 2 * every - 1, ... (k = t // every).
        want_output: compute y.
        plan: how to cut the walk up; by default the measured rule of `plan`.

    Returns:
        Everything in float32.

    Raises:
        ValueError: both ``picks`` and ``every``, or one of them out of range.
    """
    if every is not None and (picks is not None or every < 1):
        raise ValueError(f"give picks or every (a positive step), got picks={picks!r} and every={every}")
    if isinstance(picks, str) and picks != "all":
        raise ValueError(f'picks is None, "all" or token positions, got {picks!r}')
    if not isinstance(picks, str) and any(not 0 <= i < x.length for i in picks or ()):
        raise ValueError(f"picks are token positions 0 to {x.length - 1}, got {list(picks or ())}")
    b, t, h, p = x.value.shape
    if picks == "all":
        every, picks = 1, None
    count = None if every is None and picks is None else t // every if every else len(picks or ())
    make = dict(device=x.value.device, dtype=torch.float32)
    y = torch.empty(b, t, h, p, **make) if want_output else None
    states = None if count is None else torch.empty(b, count, h, p, x.d_state, **make)
    final = launch(x, plan, y=y, states=states, every=every, picks=picks)
    return Walked(y, final, states)


def statistics(x: ScanInputs, *, plan: Plan | None = None) -> Statistics:
    """Norms of the state at every token, without writing a state.

    Args:
        x: as for `forward`.
        plan: as for `forward`.

    Returns:
        `Statistics`, float32. Squares are added up in float32: norms below 1e-19 come out as 0.
    """
    b, t, h, p = x.value.shape
    norm, kept = torch.empty(2, b, t, h, p, device=x.value.device, dtype=torch.float32)
    launch(x, plan, norm=norm, kept=kept)
    if p == 1:
        return Statistics(norm[..., 0], kept[..., 0])
    return Statistics(norm.sum(-1).sqrt_(), kept.sum(-1).sqrt_())


def launch(
    x: ScanInputs,
    cut: Plan | None,
    *,
    y: Tensor | None = None,
    states: Tensor | None = None,
    every: int | None = None,
    picks: Sequence[int] | None = None,
    norm: Tensor | None = None,
    kept: Tensor | None = None,
    extras: Extras | None = None,
) -> Tensor:
    """Run the kernel into buffers that are contiguous over (b, t | k, h, p[, n]).

    Returns:
        The final state (b, h, p, n).
    """
    b, t, h, p = x.value.shape
    n = x.d_state
    rows = h * p
    if not t or not b:
        return _untouched(x)
    if cut is None:
        cut = plan(x, states=states is not None)
    cut = replace(cut, ahead=min(cut.ahead, 1 << t.bit_length() - 1))
    listed = picks is not None and len(picks) > 0
    per_segment = triton.cdiv(triton.cdiv(t, cut.segments), cut.ahead) * cut.ahead
    segments = triton.cdiv(t, per_segment)
    final = torch.empty(b, h, p, n, device=x.value.device, dtype=torch.float32)
    ends = decays = final
    if segments > 1:
        ends, decays = torch.empty(2, b, segments - 1, h, p, n, device=final.device, dtype=torch.float32)
    arguments = _arguments(x, extras or Extras())
    arguments |= {
        "slot_ptr": _slots(picks or (), t, final.device) if listed else x.value,
        "y_ptr": _or(y, final), "final_ptr": final, "states_ptr": _or(states, final),
        "norm_ptr": _or(norm, final), "kept_ptr": _or(kept, final), "end_ptr": ends, "decay_ptr": decays,
        "segments": segments, "per_segment": per_segment, "every": every or 1,
        "picks": 0 if states is None else states.shape[1],
    }  # fmt: skip
    wanted = {
        "OUTPUT": y is not None,
        "STATES": NONE if states is None or not states.shape[1] else LISTED if listed else EVERY,
        "ALIGNED": every is not None and every > 1 and every % cut.ahead == 0,
        "NORMS": norm is not None,
    }
    nothing = {"OUTPUT": False, "STATES": NONE, "ALIGNED": False, "NORMS": False}
    shape = _shape(x, cut) | {"EVEN": t % cut.ahead == 0, "num_warps": cut.warps}
    blocks = triton.cdiv(rows, cut.rows)
    if segments > 1:
        first_walk = {"SKIP": False, "GATE": False, "PASS": ENDS}
        walk_kernel[(blocks, b * (segments - 1))](**arguments | shape | nothing | first_walk)
    walk_kernel[(blocks, b * segments)](**arguments | shape | wanted | {"PASS": RESUME if segments > 1 else WHOLE})
    if listed and states is not None:
        _repeat(states, picks or ())
    return final


def _or(buffer: Tensor | None, other: Tensor) -> Tensor:
    return other if buffer is None else buffer


def _untouched(x: ScanInputs) -> Tensor:
    """The final state of no tokens."""
    if x.initial is not None:
        return x.initial.float().clone()
    return torch.zeros(x.batch, x.n_heads, x.head_dim, x.d_state, device=x.value.device)


def _shape(x: ScanInputs, cut: Plan) -> dict[str, Any]:
    """What the kernel is compiled for, as far as sizes go."""
    h, p, n, H = x.n_heads, x.head_dim, x.d_state, cut.rows
    width = triton.next_power_of_2(n)

    def shared(per: int) -> int:
        return 1 if per % H == 0 or per == h * p else H

    def per_group(direction: Tensor) -> int:
        return h // direction.shape[2] * p

    erases = [per_group(z) for z in (x.erase_read, x.erase_write) if z is not None]
    return {
        "P": p, "n": n, "H": H, "N": width, "U": cut.ahead, "HEADS": shared(p),
        "WRITES": shared(per_group(x.write)), "READS": shared(per_group(x.read)),
        "ERASES": max((shared(per) for per in erases), default=1),
        "FULL_R": h * p % H == 0, "FULL_N": width == n,
    }  # fmt: skip


def _arguments(x: ScanInputs, extras: Extras) -> dict[str, Any]:
    """Pointers, strides and the flags of what is present."""
    b, t, h, p = x.value.shape
    some = x.value
    optional = {
        "dt": (x.dt, "bth"), "log": (x.log_decay, "bthn"), "write": (x.write, "btgn"), "read": (x.read, "btgn"),
        "seen": (x.erase_read, "btgn"), "cut": (x.erase_write, "btgn"), "a": (x.A, "hn"),
        "initial": (x.initial, "bhpn"), "bias": (extras.bias, "h"), "skip": (extras.skip, "h"), "gate": (extras.gate, "bth"),
        "x": (x.value, "bthp"),
        "reset": (None if x.reset is None else x.reset.view(torch.uint8), "bt"),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, (tensor, axes) in optional.items():
        found[f"{name}_ptr"] = some if tensor is None else tensor
        strides = [0] * len(axes) if tensor is None else tensor.stride()
        found |= {f"{name}_{axis}": stride for axis, stride in zip(axes, strides)}
    decay = x.A if x.A is not None else x.log_decay
    assert decay is not None
    rows_of = {"write": x.write, "read": x.read, "seen": x.erase_read, "cut": x.erase_write}
    found |= {f"{k}_rows": 1 if z is None else h // z.shape[2] * p for k, z in rows_of.items()}
    return found | {
        "length": t, "rows": h * p,
        "DT": x.dt is not None, "FACTORED": x.A is not None,
        "PER_STATE": decay.shape[-1] == x.d_state and x.d_state > 1,
        "RESET": x.reset is not None, "ERASE": x.has_erase, "INITIAL": x.initial is not None,
        "BIAS": extras.bias is not None, "SOFTPLUS": extras.softplus, "SKIP": extras.skip is not None, "GATE": extras.gate is not None,
    }  # fmt: skip


def _slots(picks: Sequence[int], length: int, device: torch.device) -> Tensor:
    """(t,) int32: where the state after a token goes, -1 for nowhere."""
    first = {position: slot for slot, position in reversed(list(enumerate(picks)))}
    pairs = torch.tensor([[*first.keys()], [*first.values()]], dtype=torch.int64)
    if device.type == "cuda":
        pairs = pairs.pin_memory().to(device, non_blocking=True)
    return torch.full((length,), -1, dtype=torch.int32, device=device).index_copy_(0, pairs[0], pairs[1].int())


def _repeat(states: Tensor, picks: Sequence[int]) -> None:
    """Copy the states of positions that were asked for more than once."""
    first: dict[int, int] = {}
    for slot, position in enumerate(picks):
        if first.setdefault(position, slot) != slot:
            states[:, slot] = states[:, first[position]]
