"""Clocks of the tiles: how much every position decays, by blocks of time, as tables for the tile kernels.

A clock counts halvings (base-2 log-decay, positive). It restarts in every block of time and is summed in
float64, so the differences that the tiles take lose no digits, whatever the neighbours' steps are. A decay of
exactly zero (a reset, or a log-decay below exp's range) never enters a sum: it is counted beside it, and two
positions are connected where their counts agree.
"""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import ScanInputs
from ..segments import FORGET, LOG2_E
from .rounding import cdiv, next_power_of_2

__all__ = ["PER_HEAD", "PER_STATE", "RATES", "Clocks", "clocks"]

PER_HEAD, RATES, PER_STATE = 0, 1, 2
"""Kinds of decay: one per head; dt * A with a rate per state, whose clock is in units of dt; a log-decay per state."""

# exp2 of minus this is 0: a longer step forgets just as well, and would cost its neighbours their digits.
_LONGEST = 1100.0


@dataclass(frozen=True)
class Clocks:
    """Tables over padded time (a multiple of `block`) and channels c = h, or h * n with a decay per state.

    Attributes:
        kind: `PER_HEAD`, `RATES` or `PER_STATE`.
        block: tokens of a block; clocks restart in each.
        padded: tokens of a table row.
        blocks: number of blocks.
        rise, rest: (b, c, padded) clock since the block began, as the sum of two float32.
        fall: (b, c, padded) clock from a position to the end of its block.
        gain: (b, h, padded) dt, or None where nothing scales the write.
        count: (b, c, padded) int32 how often everything was forgotten since the block began, or None.
        start: (b, c, blocks + 1) float64 clock at the start of every block.
        starts: (b, c, blocks + 1) int32 count at the start of every block, or None.
        rate: (h, n made a power of 2, at least 16) halvings per unit of the clock for `RATES`, else None.
    """

    kind: int
    block: int
    padded: int
    blocks: int
    rise: Tensor
    rest: Tensor
    fall: Tensor
    gain: Tensor | None
    count: Tensor | None
    start: Tensor
    starts: Tensor | None
    rate: Tensor | None


@triton.jit
def _at_most(x, limit):
    # Unlike a minimum on a GPU, this leaves NaN what it is.
    return tl.where(x > limit, limit, x)


@triton.jit
def _block_clocks(
    step_ptr, a_ptr, dt_ptr, reset_ptr,
    rise_ptr, rest_ptr, fall_ptr, gain_ptr, count_ptr, start_ptr, starts_ptr, rate_ptr,
    length, channels, n_states, padded, blocks,
    step_b, step_t, step_h, step_m, a_h, a_n, dt_b, dt_t, dt_h, reset_b, reset_t,
    FACTORED: tl.constexpr, STATES: tl.constexpr, GAIN: tl.constexpr, RESET: tl.constexpr, COUNT: tl.constexpr,
    M: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr, LONGEST: tl.constexpr,
    FORGETS: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    # One program: one block of time, CHANNELS channels. In: (t, c) as the model keeps it; out: time last.
    block = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    b = tl.program_id(2).to(tl.int64)
    t = block * BLOCK + tl.arange(0, BLOCK)
    head, state = c // M, c % M
    inside = (t < length)[:, None] & (c < channels)[None, :]
    t64, head64 = t.to(tl.int64), head.to(tl.int64)
    if GAIN:
        place = dt_ptr + b * dt_b + t64[:, None] * dt_t + head64[None, :] * dt_h
        gain = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        first = (state == 0) & (c < channels)
        heads = channels // M
        to = (b * heads + head64)[None, :] * padded + t[:, None]
        tl.store(gain_ptr + to, gain, mask=first[None, :] & (t < padded)[:, None])
    if RESET:
        forgets = tl.load(reset_ptr + b * reset_b + t64 * reset_t, mask=t < length, other=0)[:, None] != 0
    else:
        forgets = tl.zeros([BLOCK, 1], tl.int1)
    if FACTORED:
        if STATES:
            n = tl.arange(0, N)
            held = (c < channels)[:, None] & (n < n_states)[None, :]
            rate = -tl.load(a_ptr + head64[:, None] * a_h + n[None, :] * a_n, mask=held, other=0.0).to(tl.float64)
            if block == 0 and b == 0:
                # Finite, since a step of 0 times infinity would be NaN.
                halvings = _at_most(rate * LOG2E, 3.4028234663852886e38).to(tl.float32)
                tl.store(rate_ptr + head[:, None] * N + n[None, :], halvings, mask=(c < channels)[:, None])
            # In units of dt; the longest step that still matters is that of the slowest state that decays.
            slowest = tl.min(tl.where(rate > 0, rate * LOG2E, float("inf")), 1)
            step = _at_most(gain.to(tl.float64), tl.minimum(LONGEST / slowest, 1e30)[None, :])
        else:
            rate = -tl.load(a_ptr + head64 * a_h, mask=c < channels, other=0.0).to(tl.float64)
            step = _at_most(gain.to(tl.float64) * rate[None, :] * LOG2E, LONGEST)
    else:
        place = (
            step_ptr
            + b * step_b
            + t64[:, None] * step_t
            + head64[None, :] * step_h
            + state.to(tl.int64)[None, :] * step_m
        )
        log_decay = tl.load(place, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
        forgets = forgets | (log_decay < FORGETS)
        step = -LOG2E * log_decay
    step = tl.where(forgets, 0.0, step)
    rise = tl.cumsum(step, 0)
    total = tl.sum(step, 0)
    row = b * channels + c
    to = row[None, :] * padded + t[:, None]
    known = (c < channels)[None, :] & (t < padded)[:, None]
    near = rise.to(tl.float32)
    tl.store(rise_ptr + to, near, mask=known)
    tl.store(rest_ptr + to, (rise - near.to(tl.float64)).to(tl.float32), mask=known)
    until = total[None, :] - rise
    tl.store(fall_ptr + to, tl.where(until < 0.0, 0.0, until).to(tl.float32), mask=known)
    # One place on: a running sum over these gives the clock at the start of every block.
    end = row * (blocks + 1) + block + 1
    tl.store(start_ptr + end, total, mask=c < channels)
    if COUNT:
        marks = (forgets & inside).to(tl.int32)
        tl.store(count_ptr + to, tl.cumsum(marks, 0), mask=known)
        tl.store(starts_ptr + end, tl.sum(marks, 0), mask=c < channels)


@triton.jit
def _start_clocks(start_ptr, starts_ptr, rows, blocks, COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    # Totals of blocks, at 1 to blocks, become clocks at the start of every block, at 0 to blocks.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCKS)
    to = row[:, None] * (blocks + 1) + k[None, :]
    known = (row < rows)[:, None] & (k <= blocks)[None, :]
    past = known & (k > 0)[None, :]
    start = tl.cumsum(tl.load(start_ptr + to, mask=past, other=0.0), 1)
    tl.debug_barrier()
    tl.store(start_ptr + to, start, mask=known)
    if COUNT:
        starts = tl.cumsum(tl.load(starts_ptr + to, mask=past, other=0), 1)
        tl.debug_barrier()
        tl.store(starts_ptr + to, starts, mask=known)


def clocks(x: ScanInputs, block: int) -> Clocks:
    """The clock tables of a recurrence without a delta rule, in blocks of ``block`` tokens (a power of 2)."""
    b, length, h, n = x.batch, x.length, x.n_heads, x.d_state
    step = x.log_decay
    states = (x.A if step is None else step).shape[-1] > 1  # type: ignore[union-attr]
    kind = PER_HEAD if not states else RATES if step is None else PER_STATE
    m = n if kind == PER_STATE else 1
    channels, blocks = h * m, -(-length // block)
    padded = blocks * block
    like = x.value
    counted = step is not None or x.reset is not None

    def table(heads: int, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(b, heads, size, dtype=dtype, device=like.device)

    rise, rest, fall = (table(channels, padded, torch.float32) for _ in range(3))
    gain = None if x.dt is None else table(h, padded, torch.float32)
    count = table(channels, padded, torch.int32) if counted else None
    start = table(channels, blocks + 1, torch.float64)
    starts = table(channels, blocks + 1, torch.int32) if counted else None
    wide = max(16, next_power_of_2(n))
    rate = torch.empty(h, wide, dtype=torch.float32, device=like.device) if kind == RATES else None
    side = 16
    _block_clocks[(blocks, cdiv(channels, side), b)](
        step, x.A, x.dt, x.reset, rise, rest, fall, gain, count, start, starts, rate,
        length, channels, n, padded, blocks,
        *((0, 0, 0, 0) if step is None else step.stride()),
        *((0, 0) if x.A is None else x.A.stride()),
        *((0, 0, 0) if x.dt is None else x.dt.stride()),
        *((0, 0) if x.reset is None else x.reset.stride()),
        FACTORED=step is None, STATES=kind == RATES, GAIN=gain is not None, RESET=x.reset is not None, COUNT=counted,
        M=m, BLOCK=block, CHANNELS=side, N=wide, LONGEST=_LONGEST, FORGETS=FORGET, LOG2E=LOG2_E,
    )  # fmt: skip
    rows = 4
    _start_clocks[(cdiv(b * channels, rows),)](
        start, starts, b * channels, blocks, COUNT=counted, ROWS=rows, BLOCKS=next_power_of_2(blocks + 1)
    )
    return Clocks(kind, block, padded, blocks, rise, rest, fall, gain, count, start, starts, rate)
