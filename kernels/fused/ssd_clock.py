"""Clocks of a scan with one decay per head: running sums of log-decays that keep their digits in float32.

A chunk's sum is taken in float64 and kept as two float32 numbers, ``high + low``: differences of the two parts,
added, are right to float32 whatever stands between. Where a step may forget everything (a
reset, a log-decay below what float32 can hold) it is counted beside the sum, as in `segments`. Halvings, so that the
kernels use exp2.
"""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import ScanInputs
from .rounding import cdiv, next_power_of_2

__all__ = ["Clocks", "clocks"]


class Clocks(NamedTuple):
    """What the kernels need to know about time, cut into chunks of l tokens.

    Attributes:
        high: (b, h, c, l) float32, halvings since the chunk's start, token's own step included.
        low: (b, h, c, l) float32, what `high` lost.
        forgets: (b, h, c, l) int32, how often everything was forgotten since the chunk's start; None where
            that cannot happen.
        dt: (b, h, c, l) float32, 0 behind the last token; None where the recurrence has no dt.
        to_end: (b, h, c, l) float32, dt times the decay from behind the token to the chunk's end; 0 behind the last
            token.
        from_start: (b, h, c, l) float32, decay from the chunk's start to behind the token; 0 behind the last token.
        through: (b, h, c) float32, decay over the whole chunk.
    """

    high: Tensor
    low: Tensor
    forgets: Tensor | None
    dt: Tensor | None
    to_end: Tensor
    from_start: Tensor
    through: Tensor


@triton.jit
def _clocks(
    log_ptr, dt_ptr, a_ptr, reset_ptr,
    high_ptr, low_ptr, forgets_ptr, dt_out_ptr, to_end_ptr, from_start_ptr, through_ptr,
    length, heads, chunks,
    log_b, log_t, log_h, dt_b, dt_t, dt_h, a_h, reset_b, reset_t,
    HAS_LOG: tl.constexpr, HAS_DT: tl.constexpr, HAS_RESET: tl.constexpr, COUNT: tl.constexpr,
    L: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    # One program: one chunk of one batch row, BH heads. Sums run along axis 0 in float64.
    chunk = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks).to(tl.int64)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    place = tl.arange(0, L)
    time = chunk.to(tl.int64) * L + place
    real = time < length
    inside = real[:, None] & (head < heads)[None, :]
    if HAS_DT:
        where = row * dt_b + time[:, None] * dt_t + head.to(tl.int64)[None, :] * dt_h
        dt = tl.load(dt_ptr + where, mask=inside, other=0.0).to(tl.float32)
    if HAS_LOG:
        where = row * log_b + time[:, None] * log_t + head.to(tl.int64)[None, :] * log_h
        step = tl.load(log_ptr + where, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    else:
        rate = tl.load(a_ptr + head * a_h, mask=head < heads, other=0.0).to(tl.float32).to(tl.float64)
        step = dt.to(tl.float64) * rate[None, :]
    step = step * 1.4426950408889634
    # 2^-130 is 0 in float32 arithmetic, and a larger step would only cost the sum digits.
    gone = step < -130.0
    if COUNT:
        if HAS_RESET:
            reset = tl.load(reset_ptr + row * reset_b + time * reset_t, mask=real, other=0)
            gone = gone | (reset != 0)[:, None]
        step = tl.where(gone, 0.0, step)
    else:
        step = tl.where(gone, -130.0, step)
    sums = tl.cumsum(step, axis=0)
    end = tl.sum(step, axis=0)
    high = sums.to(tl.float32)
    low = (sums - high.to(tl.float64)).to(tl.float32)
    to_end = tl.exp2((end[None, :] - sums).to(tl.float32))
    from_start = tl.exp2(high)
    through = tl.exp2(end.to(tl.float32))
    base = (row * heads + head.to(tl.int64)) * chunks + chunk
    at = base[None, :] * L + place[:, None]
    shown = (head < heads)[None, :] & (place >= 0)[:, None]
    if COUNT:
        counts = tl.cumsum(gone.to(tl.int32), axis=0)
        last = tl.sum(gone.to(tl.int32), axis=0)
        tl.store(forgets_ptr + at, counts, mask=shown)
        to_end = tl.where(counts == last[None, :], to_end, 0.0)
        from_start = tl.where(counts == 0, from_start, 0.0)
        through = tl.where(last == 0, through, 0.0)
    if HAS_DT:
        tl.store(dt_out_ptr + at, dt, mask=shown)
        to_end = to_end * dt
    tl.store(high_ptr + at, high, mask=shown)
    tl.store(low_ptr + at, low, mask=shown)
    tl.store(to_end_ptr + at, tl.where(real[:, None], to_end, 0.0), mask=shown)
    tl.store(from_start_ptr + at, tl.where(real[:, None], from_start, 0.0), mask=shown)
    tl.store(through_ptr + base, through, mask=head < heads)


def clocks(x: ScanInputs, chunk: int) -> Clocks:
    """The clocks of a recurrence with one decay per head.

    Args:
        x: inputs on one device, t >= 1; the decay has a last axis of 1.
        chunk: tokens l per chunk, a power of two.
    """
    b, t, h, _ = x.value.shape
    chunks = cdiv(t, chunk)
    count = x.reset is not None or x.log_decay is not None
    new = x.value.new_empty
    every = (b, h, chunks, chunk)
    # One allocation: at short lengths the time is that of the calls.
    high, low, to_end, from_start, dt = new((5, *every), dtype=torch.float32).unbind(0)
    through = new(every[:3], dtype=torch.float32)
    forgets = new(every, dtype=torch.int32) if count else None
    block = min(8, next_power_of_2(h))
    _clocks[(b * chunks, cdiv(h, block))](
        x.log_decay, x.dt, x.A, x.reset,
        high, low, forgets, dt, to_end, from_start, through,
        t, h, chunks,
        *_strides(x.log_decay, 3), *_strides(x.dt, 3), *_strides(x.A, 1), *_strides(x.reset, 2),
        HAS_LOG=x.log_decay is not None, HAS_DT=x.dt is not None, HAS_RESET=x.reset is not None, COUNT=count,
        L=chunk, BH=block, num_warps=4,
    )  # fmt: skip
    return Clocks(high, low, forgets, dt if x.dt is not None else None, to_end, from_start, through)


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()[:count]
