"""The launches behind `lines`: sums of steps by block, their carry outward from the line, the line itself."""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["carry_outward", "line_kernel", "sum_blocks", "weigh"]

# The largest step, and the nats of one that forgets everything: millions of them are finite in float32.
_FORGET = tl.constexpr(1e31)
# Halvings after which float32 is exactly 0.
_UNDERFLOW = tl.constexpr(-150.0)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_steps(step_ptr, place, mask, LOG: tl.constexpr):
    """The step sizes at these places, or the nats that they forget (LOG); 0 outside the mask."""
    steps = tl.load(step_ptr + place, mask=mask, other=0.0).to(tl.float32)
    nats = -steps if LOG else steps
    return tl.where(nats > _FORGET, _FORGET, nats)  # leaves NaN what it is, as a minimum on a GPU does not


@triton.jit
def next_step(position, at, length, ROW: tl.constexpr):
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
def sum_blocks(
    step_ptr, sum_ptr, at, length, channels, first, blocks, step_b, step_t, step_h, step_n,
    ROW: tl.constexpr, LOG: tl.constexpr, M: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sum the steps of one block of tokens for C channels (heads times M states)."""
    across = tl.cdiv(channels, C)
    block = tl.program_id(0) // across
    c = (tl.program_id(0) % across) * C + tl.arange(0, C)
    batch = tl.program_id(1).to(tl.int64)
    step, exists = next_step((first + block) * S + tl.arange(0, S), at, length, ROW)
    place = (
        batch * step_b
        + step.to(tl.int64)[:, None] * step_t
        + ((c // M).to(tl.int64) * step_h + (c % M).to(tl.int64) * step_n)[None, :]
    )
    steps = load_steps(step_ptr, place, exists[:, None] & (c < channels)[None, :], LOG)
    tl.store(sum_ptr + (batch * blocks + block) * channels + c, tl.sum(steps, axis=0), mask=c < channels)


@triton.jit(do_not_specialize=["blocks"])
def carry_outward(
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
def line_kernel(
    step_ptr, carry_ptr, rate_ptr, gain_ptr, fixed_ptr, moving_ptr, edge_ptr, at, length, heads, first, blocks,
    step_b, step_t, step_h, step_n, gain_b, gain_t, gain_h, fixed_b, fixed_g, fixed_n,
    moving_b, moving_t, moving_g, moving_n, fixed_groups, moving_groups, out_ptr, far_ptr, begin,
    ROW: tl.constexpr, LOG: tl.constexpr, WIDE: tl.constexpr, GAIN: tl.constexpr, RESET: tl.constexpr,
    SHARED: tl.constexpr, WEIGHED: tl.constexpr, MOMENTS: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    H: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """S entries of a line for H heads, or (MOMENTS) their mass and the sum of their distances.

    A tile of steps (S, H) is summed outward from the line's side and added to the carry of its block; every state
    then costs a product, an exponential and a product. ``fixed`` is the side of the line that does not move (read of a
    row, write of a column), ``moving`` the other. WEIGHED: ``moving`` is their product, summed over the states
    (`weigh`). SHARED: all heads of the tile lie in one group of either.
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
        # Whether any decay of the tile, in halvings at the entry nearest to the line, is above underflow, or NaN.
        alive = tl.zeros((H,), dtype=tl.int1)
        for j in range(N if WIDE else 1):
            if LOG:
                nats = tl.load(carry_ptr + (h * N + j if WIDE else h), mask=known, other=0.0)
                alive = alive | ((-nats <= _UNDERFLOW) == 0)
            else:
                rate = tl.load(rate_ptr + j * heads + h, mask=known, other=0.0)
                kept = tl.load(carry_ptr + h, mask=known, other=0.0) * rate
                alive = alive | ((kept <= _UNDERFLOW) == 0)
        if tl.max((alive & known).to(tl.int32), axis=0) > 0:
            line = entries(
                step_ptr + batch * step_b, carry_ptr, rate_ptr, fixed_ptr + batch * fixed_b,
                moving_ptr + batch * moving_b, position, reached, h, first_head, at, length, heads, step_t, step_h,
                step_n, fixed_g, fixed_n, moving_t, moving_g, moving_n, fixed_groups, moving_groups,
                ROW, LOG, WIDE, SHARED, WEIGHED, N, S, H, U,
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
def entries(
    step_ptr, carry_ptr, rate_ptr, fixed_ptr, moving_ptr, position, reached, h, first_head, at, length, heads, step_t,
    step_h, step_n, fixed_g, fixed_n, moving_t, moving_g, moving_n, fixed_groups, moving_groups,
    ROW: tl.constexpr, LOG: tl.constexpr, WIDE: tl.constexpr, SHARED: tl.constexpr, WEIGHED: tl.constexpr,
    N: tl.constexpr, S: tl.constexpr, H: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """The entries (S, H) of a line without dt of the source, 0 where not reached."""
    known = h < heads
    step, exists = next_step(position, at, length, ROW)
    step_ptr += step.to(tl.int64)[:, None] * step_t + h.to(tl.int64)[None, :] * step_h
    stepped = exists[:, None] & known[None, :]
    if SHARED:
        fixed_ptr += tl.cast(first_head * fixed_groups // heads, tl.int64) * fixed_g
        moving_ptr += (
            position.to(tl.int64) * moving_t + tl.cast(first_head * moving_groups // heads, tl.int64) * moving_g
        )
    else:
        fixed_ptr += (h * fixed_groups // heads).to(tl.int64) * fixed_g
        group = ((h * moving_groups // heads).to(tl.int64) * moving_g)[None, :]
        moving_ptr += position.to(tl.int64)[:, None] * moving_t + group
    clock = tl.zeros((S, H), dtype=tl.float32)
    if not (LOG and WIDE):
        clock = tl.cumsum(load_steps(step_ptr, 0, stepped, LOG), axis=0)
        clock += tl.load(carry_ptr + h, mask=known, other=0.0)[None, :]
    line = tl.zeros((S, H), dtype=tl.float32)
    if WIDE:
        for j in tl.range(0, N, loop_unroll_factor=U if N % U == 0 else 1):
            if LOG:
                clock = tl.cumsum(load_steps(step_ptr, j * step_n, stepped, LOG), axis=0)
                clock += tl.load(carry_ptr + h * N + j, mask=known, other=0.0)[None, :]
                kept = tl.exp2(clock * -_LOG2_E)
            else:
                kept = tl.exp2(clock * tl.load(rate_ptr + j * heads + h, mask=known, other=0.0)[None, :])
            line += kept * products(fixed_ptr + j * fixed_n, moving_ptr + j * moving_n, reached, known, SHARED)
    else:
        if WEIGHED:
            if SHARED:
                line += tl.load(moving_ptr, mask=reached, other=0.0)[:, None]
            else:
                line = tl.load(moving_ptr, mask=reached[:, None] & known[None, :], other=0.0)
        else:
            for j in range(N):
                line += products(fixed_ptr + j * fixed_n, moving_ptr + j * moving_n, reached, known, SHARED)
        if LOG:
            line *= tl.exp2(clock * -_LOG2_E)
        else:
            line *= tl.exp2(clock * tl.load(rate_ptr + h, mask=known, other=0.0)[None, :])
    return line


@triton.jit
def products(fixed_ptr, moving_ptr, reached, known, SHARED: tl.constexpr):
    """read times write of one state, (S, H), or (S, 1) where all heads of the tile share both."""
    if SHARED:
        fixed = tl.load(fixed_ptr).to(tl.float32)
        product = (tl.load(moving_ptr, mask=reached, other=0.0).to(tl.float32) * fixed)[:, None]
    else:
        fixed = tl.load(fixed_ptr, mask=known, other=0.0).to(tl.float32)
        moving = tl.load(moving_ptr, mask=reached[:, None] & known[None, :], other=0.0).to(tl.float32)
        product = moving * fixed[None, :]
    return product


@triton.jit(do_not_specialize=["low", "high"])
def weigh(
    fixed_ptr, moving_ptr, weight_ptr, low, high, length, fixed_b, fixed_g, fixed_n, moving_b, moving_t, moving_g,
    moving_n, groups, fixed_groups, moving_groups, N: tl.constexpr, NB: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """read times write summed over the states, (b, groups, length), at the positions low to high."""
    group = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    position = low + tl.program_id(0) * S + tl.arange(0, S)
    fixed_ptr += batch * fixed_b + tl.cast(group * fixed_groups // groups, tl.int64) * fixed_g
    moving_ptr += batch * moving_b + tl.cast(group * moving_groups // groups, tl.int64) * moving_g
    moving_ptr += position.to(tl.int64)[:, None] * moving_t
    weight = tl.zeros((S,), dtype=tl.float32)
    for start in range(0, N, NB):
        n = start + tl.arange(0, NB)
        fixed = tl.load(fixed_ptr + n * fixed_n, mask=n < N, other=0.0).to(tl.float32)
        inside = (position <= high)[:, None] & (n < N)[None, :]
        moving = tl.load(moving_ptr + (n * moving_n)[None, :], mask=inside, other=0.0).to(tl.float32)
        weight += tl.sum(moving * fixed[None, :], axis=1)
    tl.store(weight_ptr + (batch * groups + group) * length + position, weight, mask=position <= high)
