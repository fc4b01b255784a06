"""Single rows and columns of the implicit attention in three launches, for sequences of a million tokens.

    M[t, s] = dt[s] sum_n read[t, n] write[s, n] exp(sum of log-decays over s + 1 .. t)

Sums of log-decays start at the line itself and run outward, backwards from t for a row and forwards from s for a
column, so that only numbers of one sign are added and no difference is taken. Time is cut into blocks. The first
launch sums the steps of every block, the second carries the sums outward over blocks in float64, and in the third
every block of tokens and heads adds its own running sum to what lies between it and the line and takes the
exponentials. A block that has underflowed for every state writes zeros and reads nothing. Where the decay is dt * A
one sum of dt serves all states of a head.

A step that forgets everything (log-decay -inf) counts as `_FORGET` nats: sums that do not contain it never see it,
and sums that do are zero decay. A reset cuts the line off at one position per batch row.

Steps are channel-contiguous, lines are time-contiguous: tiles (time, heads) are loaded along heads and transposed on
chip when they are stored. Memory beyond the result: two numbers for each block and head.
"""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import ScanInputs
from ..segments import base2

__all__ = ["Tuning", "column", "distance", "row"]

# The largest step, and the nats of one that forgets everything: millions of them are finite in float32.
_FORGET = tl.constexpr(1e31)
# Halvings after which float32 is exactly 0.
_UNDERFLOW = tl.constexpr(-150.0)
_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Tuning:
    """Sizes of tiles: ``tokens`` x ``heads`` with ``warps`` for the line, ``unroll`` states at once, and ``channels``
    of steps to sum with ``sum_warps``."""

    tokens: int = 64
    heads: int = 64
    warps: int = 4
    unroll: int = 4
    channels: int = 128
    sum_warps: int = 4


def row(x: ScanInputs, t: int, tuning: Tuning | None = None) -> Tensor:
    """M[t, :], (b, h, s) in float32; entries after t are exactly 0.

    Args:
        x: a recurrence without a delta rule on a CUDA device, at most float32; groups, resets and any strides.
        t: 0 <= t < length.
        tuning: sizes of tiles, chosen by shape when None.
    """
    line = _Line(x, t, True, tuning)
    out = torch.empty(x.batch, x.n_heads, x.length, dtype=torch.float32, device=x.value.device)
    line.write(out)
    return out


def column(x: ScanInputs, s: int, tuning: Tuning | None = None) -> Tensor:
    """M[:, s], (b, h, t) in float32; entries before s are exactly 0. Arguments as for `row`."""
    line = _Line(x, s, False, tuning)
    out = torch.empty(x.batch, x.n_heads, x.length, dtype=torch.float32, device=x.value.device)
    line.write(out)
    return out


def distance(x: ScanInputs, rows: Sequence[int], tuning: Tuning | None = None) -> Tensor:
    """Mean distance of chosen rows in tokens, (b, h, len(rows)) in float32; NaN where a row is all zero.

    sum_s (t - s) |M[t, s]| / sum_s |M[t, s]|, without holding a row: every block adds up its own part.
    """
    found = [_Line(x, t, True, tuning).moments() for t in rows]
    if not found:
        return torch.empty(x.batch, x.n_heads, 0, dtype=torch.float32, device=x.value.device)
    return torch.stack(found, -1).to(torch.float32)


class _Line:
    """The arguments of one line's launches."""

    def __init__(self, x: ScanInputs, at: int, is_row: bool, tuning: Tuning | None) -> None:
        log = x.log_decay is not None
        steps = x.log_decay if x.log_decay is not None else x.dt[..., None]  # type: ignore[index]
        rate = None if x.A is None else base2(x.A.to(torch.float32)).t().contiguous()  # (m, h)
        wide = (steps if rate is None else x.A).shape[-1] > 1  # type: ignore[union-attr]
        fixed, moving = (x.read[:, at], x.write) if is_row else (x.write[:, at], x.read)
        self.x, self.at, self.is_row, self.steps = x, at, is_row, steps
        self.tuning = tuning = _tuned(x, fixed, moving) if tuning is None else tuning
        heads = tuning.heads
        shared = all(g == 1 or (x.n_heads // g) % heads == 0 for g in (fixed.shape[1], moving.shape[2]))
        # Blocks between the line and the end of its side.
        self.first = 0 if is_row else at // tuning.tokens
        self.blocks = triton.cdiv(at + 1 if is_row else x.length, tuning.tokens) - self.first
        self.channels = x.n_heads * steps.shape[-1]
        carry = self._carry(log)
        gain = x.dt if is_row or x.dt is None else x.dt[:, at:]
        anything = moving
        self.arguments = (
            steps, carry, anything if rate is None else rate, anything if gain is None else gain, fixed, moving,
            anything if x.reset is None else self._edge(x.reset), at, x.length, x.n_heads, self.first, self.blocks,
            *steps.stride(), *((0, 0, 0) if gain is None else gain.stride()), *fixed.stride(), *moving.stride(),
            fixed.shape[1], moving.shape[2],
        )  # fmt: skip
        n = x.d_state
        self.options = {
            "ROW": is_row, "LOG": log, "WIDE": wide, "GAIN": gain is not None, "RESET": x.reset is not None,
            "SHARED": shared, "N": n, "NB": min(32, triton.next_power_of_2(n)), "S": tuning.tokens, "H": heads,
            "U": tuning.unroll, "num_warps": tuning.warps,
        }  # fmt: skip

    def write(self, out: Tensor) -> None:
        blocks = triton.cdiv(self.x.length, self.tuning.tokens) * triton.cdiv(self.x.n_heads, self.tuning.heads)
        _line[(blocks, self.x.batch)](*self.arguments, out, out, 0, MOMENTS=False, **self.options)

    def moments(self) -> Tensor:
        """Mean distance of the row, (b, h) in float64."""
        shape = (self.x.batch, self.blocks, self.x.n_heads)
        weight, far = (torch.empty(shape, dtype=torch.float32, device=self.x.value.device) for _ in range(2))
        blocks = self.blocks * triton.cdiv(self.x.n_heads, self.tuning.heads)
        _line[(blocks, self.x.batch)](*self.arguments, weight, far, self.first, MOMENTS=True, **self.options)
        return far.sum(1, dtype=torch.float64) / weight.sum(1, dtype=torch.float64)

    def _carry(self, log: bool) -> Tensor:
        """Nats (or time) of the steps between each block and the line, (b, blocks, channels)."""
        x, tuning = self.x, self.tuning
        sums, carry = (
            torch.empty(x.batch, self.blocks, self.channels, dtype=torch.float32, device=x.value.device)
            for _ in range(2)
        )
        m = self.steps.shape[-1]
        grid = (self.blocks * triton.cdiv(self.channels, tuning.channels), x.batch)
        _sum_blocks[grid](
            self.steps, sums, self.at, x.length, self.channels, self.first, self.blocks, *self.steps.stride(),
            ROW=self.is_row, LOG=log, M=m, S=tuning.tokens, C=tuning.channels, num_warps=tuning.sum_warps,
        )  # fmt: skip
        few = 8
        grid = (triton.cdiv(self.channels, few), x.batch)
        _carry_outward[grid](sums, carry, self.channels, self.blocks, ROW=self.is_row, K=256, C=few, num_warps=4)
        return carry

    def _edge(self, reset: Tensor) -> Tensor:
        """(b,) the outermost position that the line reaches before a reset cuts it off."""
        length, at = self.x.length, self.at
        place = torch.arange(length, device=reset.device)
        if self.is_row:
            return torch.where(reset & (place <= at), place, 0).amax(1)
        return torch.where(reset & (place > at), place, length).amin(1) - 1


def _tuned(x: ScanInputs, fixed: Tensor, moving: Tensor) -> Tuning:
    """Tiles of heads that share their groups where these are not tiny."""
    heads = min(64, triton.next_power_of_2(x.n_heads))
    for g in (fixed.shape[1], moving.shape[2]):
        while g > 1 and heads > 8 and (x.n_heads // g) % heads:
            heads //= 2
    tokens = min(4096 // heads, max(16, triton.next_power_of_2(x.length)))
    return Tuning(tokens=tokens, heads=heads)


@triton.jit
def _load_steps(step_ptr, place, mask, LOG: tl.constexpr):
    """The step sizes at these places, or the nats that they forget (LOG); 0 outside the mask."""
    steps = tl.load(step_ptr + place, mask=mask, other=0.0).to(tl.float32)
    return tl.minimum(-steps if LOG else steps, _FORGET)


@triton.jit
def _stepped(position, at, length, ROW: tl.constexpr):
    """The step that takes the line from one entry to the next further out, and whether it exists.

    Source s of row t has decayed by the steps s + 1 .. t, token t of column s by s + 1 .. t.
    """
    if ROW:
        step = position + 1
        exists = step <= at
    else:
        step = position
        exists = (step > at) & (step < length)
    return step, exists


@triton.jit(do_not_specialize=["at", "first", "blocks"])
def _sum_blocks(
    step_ptr, sum_ptr, at, length, channels, first, blocks, step_b, step_t, step_h, step_n,
    ROW: tl.constexpr, LOG: tl.constexpr, M: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sum the steps of one block of tokens for C channels (heads times M states)."""
    across = tl.cdiv(channels, C)
    block = tl.program_id(0) // across
    c = (tl.program_id(0) % across) * C + tl.arange(0, C)
    batch = tl.program_id(1).to(tl.int64)
    step, exists = _stepped((first + block) * S + tl.arange(0, S), at, length, ROW)
    place = (
        batch * step_b
        + step.to(tl.int64)[:, None] * step_t
        + ((c // M).to(tl.int64) * step_h + c % M * step_n)[None, :]
    )
    steps = _load_steps(step_ptr, place, exists[:, None] & (c < channels)[None, :], LOG)
    tl.store(sum_ptr + (batch * blocks + block) * channels + c, tl.sum(steps, axis=0), mask=c < channels)


@triton.jit(do_not_specialize=["blocks"])
def _carry_outward(
    sum_ptr, carry_ptr, channels, blocks, ROW: tl.constexpr, K: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Sum the blocks between the line and each block, in float64, K blocks at a time."""
    c = tl.program_id(0) * C + tl.arange(0, C)
    base = tl.program_id(1).to(tl.int64) * blocks
    running = tl.zeros((C,), dtype=tl.float64)
    for start in range(0, blocks, K):
        outward = start + tl.arange(0, K)
        # The next block inward: its sum is the newest that this block lies behind.
        if ROW:
            here, inward = blocks - 1 - outward, blocks - outward
        else:
            here, inward = outward, outward - 1
        known = (c < channels)[None, :]
        place = (base + inward)[:, None] * channels + c[None, :]
        sums = tl.load(sum_ptr + place, mask=((outward > 0) & (outward < blocks))[:, None] & known, other=0.0)
        sums = sums.to(tl.float64)
        carry = tl.cumsum(sums, axis=0) + running[None, :]
        place = (base + here)[:, None] * channels + c[None, :]
        tl.store(carry_ptr + place, carry.to(tl.float32), mask=(outward < blocks)[:, None] & known)
        running += tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["at", "first", "blocks", "begin"])
def _line(
    step_ptr, carry_ptr, rate_ptr, gain_ptr, fixed_ptr, moving_ptr, edge_ptr, at, length, heads, first, blocks,
    step_b, step_t, step_h, step_n, gain_b, gain_t, gain_h, fixed_b, fixed_g, fixed_n,
    moving_b, moving_t, moving_g, moving_n, fixed_groups, moving_groups, out_ptr, far_ptr, begin,
    ROW: tl.constexpr, LOG: tl.constexpr, WIDE: tl.constexpr, GAIN: tl.constexpr, RESET: tl.constexpr,
    SHARED: tl.constexpr, MOMENTS: tl.constexpr, N: tl.constexpr, NB: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    U: tl.constexpr,
):  # fmt: skip
    """S entries of a line for H heads, or (MOMENTS) their mass and the sum of their distances.

    A tile of steps (S, H) is summed outward from the line's side and added to the carry of its block; every state
    then costs a product, an exponential and a product. ``fixed`` is the side of the line that does not move (read of a
    row, write of a column), ``moving`` the other. SHARED: all heads of the tile lie in one group of either.
    """
    across = tl.cdiv(heads, H)
    block = begin + tl.program_id(0) // across
    first_head = (tl.program_id(0) % across) * H
    h = first_head + tl.arange(0, H)
    batch = tl.program_id(1).to(tl.int64)
    known = h < heads
    position = block * S + ((S - 1) - tl.arange(0, S) if ROW else tl.arange(0, S))
    if ROW:
        low, high = 0, at
    else:
        low, high = at, length - 1
    if RESET:
        edge = tl.load(edge_ptr + batch).to(tl.int32)
        if ROW:
            low = edge
        else:
            high = edge
    reached = (position >= low) & (position <= high)
    line = tl.zeros((S, H), dtype=tl.float32)
    if (block * S <= high) & (block * S + S > low):
        carry_ptr += (batch * blocks + block - first) * heads * (N if LOG and WIDE else 1)
        # The slowest decay of the tile, in halvings, at the entry nearest to the line.
        slowest = tl.full((H,), float("-inf"), dtype=tl.float32)
        for j in range(N if WIDE else 1):
            if LOG:
                nats = tl.load(carry_ptr + (h * N + j if WIDE else h), mask=known, other=0.0)
                slowest = tl.maximum(slowest, -nats)
            else:
                rate = tl.load(rate_ptr + j * heads + h, mask=known, other=0.0)
                slowest = tl.maximum(slowest, tl.load(carry_ptr + h, mask=known, other=0.0) * rate)
        if tl.max(tl.where(known, slowest, float("-inf")), axis=0) > _UNDERFLOW:
            line = _entries(
                step_ptr + batch * step_b, carry_ptr, rate_ptr, fixed_ptr + batch * fixed_b,
                moving_ptr + batch * moving_b, position, reached, h, first_head, at, length, heads, step_t, step_h,
                step_n, fixed_g, fixed_n, moving_t, moving_g, moving_n, fixed_groups, moving_groups,
                ROW, LOG, WIDE, SHARED, N, NB, S, H, U,
            )  # fmt: skip
            if GAIN:
                # dt of the source: of every entry of a row, of the line itself for a column.
                if ROW:
                    place = batch * gain_b + position.to(tl.int64)[:, None] * gain_t + h.to(tl.int64)[None, :] * gain_h
                    line *= tl.load(gain_ptr + place, mask=reached[:, None] & known[None, :], other=0.0).to(tl.float32)
                else:
                    place = batch * gain_b + h.to(tl.int64) * gain_h
                    line *= tl.load(gain_ptr + place, mask=known, other=0.0).to(tl.float32)[None, :]
    if MOMENTS:
        mass = tl.abs(line)
        place = (batch * blocks + block - first) * heads + h
        tl.store(out_ptr + place, tl.sum(mass, axis=0), mask=known)
        tl.store(far_ptr + place, tl.sum(mass * (at - position).to(tl.float32)[:, None], axis=0), mask=known)
    else:
        place = (batch * heads + h)[None, :] * length + position[:, None]
        tl.store(out_ptr + place, line, mask=(position < length)[:, None] & known[None, :])


@triton.jit
def _entries(
    step_ptr, carry_ptr, rate_ptr, fixed_ptr, moving_ptr, position, reached, h, first_head, at, length, heads, step_t,
    step_h, step_n, fixed_g, fixed_n, moving_t, moving_g, moving_n, fixed_groups, moving_groups,
    ROW: tl.constexpr, LOG: tl.constexpr, WIDE: tl.constexpr, SHARED: tl.constexpr, N: tl.constexpr, NB: tl.constexpr,
    S: tl.constexpr, H: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """The entries (S, H) of a line without dt of the source, 0 where not reached."""
    known = h < heads
    step, exists = _stepped(position, at, length, ROW)
    step_ptr += step.to(tl.int64)[:, None] * step_t + h.to(tl.int64)[None, :] * step_h
    stepped = exists[:, None] & known[None, :]
    if SHARED:
        fixed_ptr += first_head * fixed_groups // heads * fixed_g
        moving_ptr += position.to(tl.int64) * moving_t + first_head * moving_groups // heads * moving_g
    else:
        fixed_ptr += h * fixed_groups // heads * fixed_g
        group = (h * moving_groups // heads * moving_g)[None, :]
        moving_ptr += position.to(tl.int64)[:, None] * moving_t + group
    clock = tl.zeros((S, H), dtype=tl.float32)
    if not (LOG and WIDE):
        clock = tl.cumsum(_load_steps(step_ptr, 0, stepped, LOG), axis=0)
        clock += tl.load(carry_ptr + h, mask=known, other=0.0)[None, :]
    line = tl.zeros((S, H), dtype=tl.float32)
    if WIDE:
        for j in tl.range(0, N, loop_unroll_factor=U if N % U == 0 else 1):
            if LOG:
                clock = tl.cumsum(_load_steps(step_ptr, j * step_n, stepped, LOG), axis=0)
                clock += tl.load(carry_ptr + h * N + j, mask=known, other=0.0)[None, :]
                kept = tl.exp2(clock * -_LOG2_E)
            else:
                kept = tl.exp2(clock * tl.load(rate_ptr + j * heads + h, mask=known, other=0.0)[None, :])
            if SHARED:
                fixed = tl.load(fixed_ptr + j * fixed_n).to(tl.float32)
                moving = tl.load(moving_ptr + j * moving_n, mask=reached, other=0.0).to(tl.float32)
                line += kept * (moving * fixed)[:, None]
            else:
                line += kept * _products(fixed_ptr, moving_ptr, j, fixed_n, moving_n, reached, known)
    else:
        if LOG:
            kept = tl.exp2(clock * -_LOG2_E)
        else:
            kept = tl.exp2(clock * tl.load(rate_ptr + h, mask=known, other=0.0)[None, :])
        if SHARED:
            weight = tl.zeros((S,), dtype=tl.float32)
            for start in range(0, N, NB):
                n = start + tl.arange(0, NB)
                fixed = tl.load(fixed_ptr + n * fixed_n, mask=n < N, other=0.0).to(tl.float32)
                inside = reached[:, None] & (n < N)[None, :]
                moving = tl.load(moving_ptr[:, None] + (n * moving_n)[None, :], mask=inside, other=0.0).to(tl.float32)
                weight += tl.sum(moving * fixed[None, :], axis=1)
            line = kept * weight[:, None]
        else:
            for j in range(N):
                line += _products(fixed_ptr, moving_ptr, j, fixed_n, moving_n, reached, known)
            line *= kept
    return line


@triton.jit
def _products(fixed_ptr, moving_ptr, j, fixed_n, moving_n, reached, known):
    """read times write of state j where every head has its own, (S, H)."""
    fixed = tl.load(fixed_ptr + j * fixed_n, mask=known, other=0.0).to(tl.float32)
    inside = reached[:, None] & known[None, :]
    return tl.load(moving_ptr + j * moving_n, mask=inside, other=0.0).to(tl.float32) * fixed[None, :]
