"""Gradients of the diagonal walk with one channel per head, in Triton.

The forward walk hands over a state every few steps. From there the kernels of `walk_backward_kernels`

1. walk every segment of time backwards from a zero adjoint, which gives what leaves the segment and its total decay;
2. carry the adjoint over the segments, from the last to the first;
3. in every segment, a few steps at a time, walk forward with the states in registers and the same steps back,
   which gives every gradient;
4. add up the parts of d write and d read (one for each block of heads) and of d A (one for each segment).

Sums run in one fixed order: two runs agree bitwise. Memory beyond the results: parts of (heads / 32) * t * 2n numbers
per batch row, and two states per segment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inputs import ScanInputs
from . import walk_backward_kernels as kernels
from .device import on_its_device
from .rounding import cdiv, next_power_of_2

__all__ = ["EVERY", "Plan", "backward", "plan"]

EVERY = 8
"""Steps between the states that `backward` wants most: they take as much memory as two (b, t, h) tensors at n = 16."""

# Programs that keep an H100 busy: below this, time is cut into more segments.
_PROGRAMS = 4096
_SHORTEST = 64
# Entries of n, heads x n, and steps x heads x n in one thread: the largest that compile without spilling (sm_90).
_STATES, _TILE, _HELD = 8, 8, 32
# More steps in registers save little, and compile time grows with their square.
_STEPS = 4
# Registers of a thread: 12 warps on a multiprocessor, where the kernel fits without spilling.
_REGISTERS = 168


class Plan(NamedTuple):
    """How the work is cut.

    Attributes:
        per_thread: J; heads in one thread.
        states: M; states of a head in one thread.
        heads: D; threads along heads.
        lanes: L; threads along states.
        warps: of one program.
        steps: K; steps whose states are held in registers.
        segment: steps of one program, a multiple of ``steps``.
        hold: whether the inputs of those steps are held as well.
        registers: of a thread, at most; 0 leaves it to the compiler.
    """

    per_thread: int
    states: int
    heads: int
    lanes: int
    warps: int
    steps: int
    segment: int
    hold: bool = True
    registers: int = 0


def _unit(x: ScanInputs) -> int:
    """Heads in a row that share one group of ``write`` and one of ``read``."""
    return math.gcd(x.n_heads // x.write.shape[2], x.n_heads // x.read.shape[2])


def plan(x: ScanInputs, every: int, listed: bool = False) -> Plan:
    """The cut for these shapes, given states every ``every`` steps; ``listed``: gradients of states at listed times."""
    n = next_power_of_2(x.d_state)
    unit = _unit(x)
    lanes = min(n, max(4, min(n // _STATES, 32)))
    heads = min(32 // lanes, next_power_of_2(unit))
    lanes = min(n, 32 // heads)
    states = n // lanes
    per_thread = max(1, min(2, _TILE // states, next_power_of_2(cdiv(unit, heads))))
    steps = math.gcd(every, min(_STEPS, max(1, _HELD // (states * per_thread * max(1, states // 8)))))
    blocks = x.batch * (x.n_heads // unit) * cdiv(unit, heads * per_thread)
    segment = max(_SHORTEST, x.length * blocks // _PROGRAMS)
    cut = Plan(per_thread, states, heads, lanes, 1, steps, cdiv(segment, steps) * steps)
    plain = x.A is not None and x.reset is None and x.initial is None and not listed
    return cut._replace(registers=_REGISTERS if plain and n <= 16 and _fills(x, unit, cut) else 0)


def _fills(x: ScanInputs, unit: int, cut: Plan) -> bool:
    """Whether nothing in any tile has to be masked."""
    return not (unit % (cut.heads * cut.per_thread) or x.length % cut.steps or x.d_state != cut.states * cut.lanes)


@on_its_device
def backward(
    x: ScanInputs,
    dy: Tensor | None,
    dfinal: Tensor | None,
    dstates: Tensor | None,
    picks: Sequence[int] | str | None,
    boundaries: Tensor | None,
    every: int,
    *,
    cut: Plan | None = None,
) -> dict[str, Tensor]:
    """Gradients of the walk with respect to every floating input that is present.

    Args:
        x: the recurrence; p = 1, no delta rule, any kind of decay.
        dy: (b, t, h, 1) gradient of the outputs, or None.
        dfinal: (b, h, 1, n) gradient of the final state, or None.
        dstates: (b, len(picks) or t, h, 1, n) gradient of the states handed out, or None.
        picks: times of those states, in any order, repeats allowed; or "all".
        boundaries: (b, c, h, 1, n) states after steps every - 1, 2 * every - 1, ...; the state before the first
            step is ``x.initial`` or zero. None where there is none (t <= every).
        every: steps between them; best a multiple of 8 up to `EVERY` (longer ones are walked several times).
        cut: how the work is cut; by default `plan`.

    Returns:
        By the names of `ScanInputs`, shaped like the inputs, contiguous float32.

    Raises:
        ValueError: several channels per head, a delta rule, or too few boundaries.
    """
    if x.head_dim != 1 or x.has_erase:
        got = "a delta rule" if x.has_erase else f"p = {x.head_dim}"
        raise ValueError(f"the fused backward walk has one channel per head and no delta rule, got {got}")
    n_bounds = 0 if boundaries is None else boundaries.shape[1]
    if n_bounds < (x.length - 1) // every:
        raise ValueError(f"{x.length} tokens need {(x.length - 1) // every} boundary states, got {n_bounds}")
    work = _Work(x, dy, dfinal, dstates, picks, boundaries, n_bounds, every, cut)
    return work.run()


class _Work:
    """One backward pass: arguments of the kernels, their buffers and launches."""

    def __init__(
        self,
        x: ScanInputs,
        dy: Tensor | None,
        dfinal: Tensor | None,
        dstates: Tensor | None,
        picks: Sequence[int] | str | None,
        boundaries: Tensor | None,
        n_bounds: int,
        every: int,
        cut: Plan | None,
    ) -> None:
        self.x, self.dy, self.dfinal = x, dy, dfinal
        self.dstates, self.slots, self.mode = _slots(x, dstates, picks)
        self.cut = cut = cut or plan(x, every, listed=self.slots is not None)
        self.boundaries, self.n_bounds, self.every = boundaries, n_bounds, every
        self.unit = _unit(x)
        self.blocks = cdiv(self.unit, cut.heads * cut.per_thread)  # of one unit
        self.n_blocks = self.blocks * (x.n_heads // self.unit)
        self.n_segments = cdiv(x.length, cut.segment)

    def run(self) -> dict[str, Tensor]:
        entering = self._entering() if self.n_segments > 1 else self.dfinal
        return self._walk(entering)

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.value.device)

    def _shared(self) -> dict[str, Any]:
        """What both walks are told."""
        x, cut, ds = self.x, self.cut, self.dstates
        t, h = x.length, x.n_heads
        full = _fills(x, self.unit, cut)
        per_state = (x.log_decay if x.A is None else x.A).shape[-1] > 1  # type: ignore[union-attr]
        return {
            "dt_ptr": x.dt,
            "a_ptr": x.A,
            "log_ptr": x.log_decay,
            "read_ptr": x.read,
            "dy_ptr": self.dy,
            "reset_ptr": x.reset,
            "ds_ptr": ds,
            "slot_ptr": self.slots,
            "one": 1,
            "length": t,
            "n_segments": self.n_segments,
            "per_segment": cut.segment,
            **_strides(x.dt, "dt", "bth"),
            **_strides(x.A, "a", "hn"),
            **_strides(x.log_decay, "log", "bthn"),
            **_strides(x.read, "read", "btgn"),
            **_strides(self.dy, "dy", "bth"),
            **_strides(x.reset, "reset", "bt"),
            **_strides(None if ds is None else ds[..., 0, :], "ds", "bkhn"),
            "H": h,
            "N": x.d_state,
            "UNIT": self.unit,
            "BLOCKS": self.blocks,
            "READ_HEADS": h // x.read.shape[2],
            "KIND": 2 * (x.A is None) + per_state,
            "RESET": x.reset is not None,
            "PICKS": self.mode,
            "DY": self.dy is not None,
            "FULL": full,
            "K": cut.steps,
            "J": cut.per_thread,
            "M": cut.states,
            "D": cut.heads,
            "L": cut.lanes,
            "num_warps": cut.warps,
        }

    def _entering(self) -> Tensor:
        """The adjoint that enters the end of every segment, (b, segments, h, n)."""
        x = self.x
        b, h, n = x.batch, x.n_heads, x.d_state
        ends, decays = (self._new(b, self.n_segments, h, n) for _ in range(2))
        kernels.local_ends[(self.n_blocks, self.n_segments, b)](ends_ptr=ends, decays_ptr=decays, **self._shared())
        block = 128
        final = None if self.dfinal is None else self.dfinal.contiguous()
        kernels.carry[(cdiv(h * n, block), b)](
            ends, decays, final, self.n_segments, h * n, FINAL=final is not None, BLOCK=block, num_warps=block // 32
        )
        return ends

    def _walk(self, entering: Tensor | None) -> dict[str, Tensor]:
        x = self.x
        b, t, h, _ = x.value.shape
        n = x.d_state
        parts = self._new(2, b, self.n_blocks, t, n)
        out = {"value": self._new(b, t, h, 1)}
        if x.dt is not None:
            out["dt"] = self._new(b, t, h)
        if x.log_decay is not None:
            out["log_decay"] = self._new(*x.log_decay.shape)
        if x.initial is not None:
            out["initial"] = self._new(b, h, 1, n)
        da = None if x.A is None else self._new(b, self.n_segments, *x.A.shape)
        kernels.walk_back[(self.n_blocks, self.n_segments, b)](
            value_ptr=x.value,
            write_ptr=x.write,
            initial_ptr=None if x.initial is None else x.initial.contiguous(),
            bounds_ptr=x.value if self.boundaries is None else self.boundaries.contiguous(),
            enter_ptr=None if entering is None else entering.contiguous(),
            dvalue_ptr=out["value"],
            ddt_ptr=out.get("dt"),
            da_ptr=da,
            dlog_ptr=out.get("log_decay"),
            dwrite_ptr=parts[0],
            dread_ptr=parts[1],
            dinitial_ptr=out.get("initial"),
            n_bounds=self.n_bounds,
            **_strides(x.value, "value", "bth"),
            **_strides(x.write, "write", "btgn"),
            WRITE_HEADS=h // x.write.shape[2],
            DT=x.dt is not None,
            INITIAL=x.initial is not None,
            ENTER=entering is not None,
            EACH=self.every,
            HOLD=self.cut.hold,
            **({"maxnreg": self.cut.registers} if self.cut.registers else {}),
            **self._shared(),
        )
        if da is not None:
            out["A"] = _add_up(da.view(1, b * self.n_segments, -1)).view(x.A.shape)  # type: ignore[union-attr]
        return out | self._directions(parts)

    def _directions(self, parts: Tensor) -> dict[str, Tensor]:
        """d write and d read from their parts (2, b, blocks, t, n); blocks of a group lie side by side."""
        x = self.x
        b, t, n = x.batch, x.length, x.d_state
        groups = {"write": x.write.shape[2], "read": x.read.shape[2]}
        if self.dy is None:
            parts[1].zero_()
        if groups["write"] == groups["read"]:
            g = groups["write"]
            both = _add_up(parts.view(2 * b * g, self.n_blocks // g, t * n)).view(2, b, g, t, n).transpose(2, 3)
            return {"write": both[0].contiguous(), "read": both[1].contiguous()}
        return {
            k: _add_up(part.view(b * g, self.n_blocks // g, t * n)).view(b, g, t, n).transpose(1, 2).contiguous()
            for (k, g), part in zip(groups.items(), parts, strict=True)
        }


def _add_up(parts: Tensor) -> Tensor:
    """(outer, count, size) summed over count."""
    outer, count, size = parts.shape
    if count == 1:
        return parts[:, 0]
    out = parts.new_empty(outer, size)
    rows, block = min(16, next_power_of_2(count)), 64
    kernels.add_up[(cdiv(size, block) * outer,)](parts, out, count, size, ROWS=rows, BLOCK=block, num_warps=4)
    return out


def _strides(x: Tensor | None, name: str, axes: str) -> dict[str, int]:
    """Strides by axis; 0 along an axis of size 1, which is then broadcast."""
    if x is None:
        return {f"{name}_{axis}": 0 for axis in axes}
    return {f"{name}_{axis}": 0 if size == 1 else s for axis, s, size in zip(axes, x.stride(), x.shape, strict=False)}


def _slots(
    x: ScanInputs, dstates: Tensor | None, picks: Sequence[int] | str | None
) -> tuple[Tensor | None, Tensor | None, int]:
    """Gradients of picked states, each time once; where to find the one of a time (-1: nowhere); the kernels' mode."""
    if dstates is None or picks is None or not dstates.shape[1]:
        return None, None, 0
    if isinstance(picks, str):
        return dstates, None, 2
    times = sorted(set(picks))
    slot = {t: i for i, t in enumerate(times)}
    if len(times) < len(picks):
        index = torch.tensor([slot[t] for t in picks], device=dstates.device)
        shape = (x.batch, len(times), *dstates.shape[2:])
        dstates = torch.zeros(shape, dtype=torch.float32, device=dstates.device).index_add_(1, index, dstates.float())
    else:
        slot = {t: i for i, t in enumerate(picks)}
    table = torch.full((x.length,), -1, dtype=torch.int32, device="cpu")
    table[list(slot)] = torch.tensor(list(slot.values()), dtype=torch.int32, device="cpu")
    return dstates, table.to(dstates.device), 1
