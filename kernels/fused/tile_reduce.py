"""The kernels that reduce tiles over heads.

A program takes one tile and a share of the heads. Where that is all of them it writes its tile of the result,
otherwise a partial tile, and `finish_kernel` adds the shares in their order. Tiles on the diagonal cost many times
what the others do and are few, so their heads are always shared.
"""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from .tile_parts import absolute, decay, diagonal_scalar, exact, level_tile, product, read_rows, write_columns
from .tile_products import left_tile, row_factors, scaled_tile, shared_tile

__all__ = ["finish_kernel", "reduce_kernel", "reduce_rates_kernel"]


@triton.jit
def _larger(a, b):
    # A GPU's plain maximum drops NaN.
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _add(total, tile, HOW: tl.constexpr):
    if HOW == "mean":
        return total + tile
    elif HOW == "mean_abs":
        return total + absolute(tile)
    elif HOW == "norm":
        return total + tile * tile
    else:
        return _larger(total, absolute(tile))


@triton.jit
def _below(pid):
    # Tiles below the diagonal, row by row: pid = r (r - 1) / 2 + k.
    r = ((tl.sqrt(8.0 * pid.to(tl.float32) + 1.0) + 1.0) * 0.5).to(tl.int32)
    r = tl.where(r * (r - 1) // 2 > pid, r - 1, r)
    r = tl.where(r * (r + 1) // 2 <= pid, r + 1, r)
    return r, pid - r * (r - 1) // 2


@triton.jit
def _write(out_ptr, total, i, j, length, scale, HOW: tl.constexpr):
    if HOW == "norm":
        total = tl.sqrt(total)
    size = tl.cast(length, tl.int64)
    to = out_ptr + tl.program_id(2).to(tl.int64) * size * size + i.to(tl.int64)[:, None] * size + j[None, :]
    tl.store(to, total * scale, mask=(i < length)[:, None] & (j < length)[None, :])


@triton.jit
def _partial(out_ptr, BLOCK: tl.constexpr):
    # Where this program's partial tile goes: (share, batch, tile, BLOCK, BLOCK).
    share = tl.program_id(1).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    return out_ptr + (share * tl.num_programs(0) + tl.program_id(0)) * (BLOCK * BLOCK)


@triton.jit
def finish_kernel(
    partial_ptr, out_ptr, length, shares, blocks, scale,
    HOW: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program: one tile, from its shares of the heads. On the diagonal also the zeros to its right.
    tiles, pid = tl.num_programs(0), tl.program_id(0)
    place = tl.arange(0, BLOCK)
    if DIAGONAL:
        r, k = pid, pid
    else:
        r, k = _below(pid)
    i, j = r * BLOCK + place, k * BLOCK + place
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for share in range(shares):
        at = (share * tl.num_programs(2) + tl.program_id(2).to(tl.int64)) * tiles + pid
        tile = tl.load(partial_ptr + at * (BLOCK * BLOCK) + place[:, None] * BLOCK + place[None, :])
        total = _larger(total, tile) if HOW == "max_abs" else total + tile
    _write(out_ptr, total, i, j, length, scale, HOW)
    if DIAGONAL:
        zero = tl.zeros([BLOCK, BLOCK], tl.float32)
        for after in range(r + 1, blocks):
            _write(out_ptr, zero, i, after * BLOCK + place, length, scale, HOW)


@triton.jit
def reduce_kernel(
    read_ptr, write_ptr, rate_ptr, rise_ptr, rest_ptr, fall_ptr, gain_ptr, count_ptr, start_ptr, starts_ptr, out_ptr,
    length, heads, part, read_heads, write_heads, n_states, padded, blocks, scale,
    read_b, read_t, read_g, read_n, write_b, write_t, write_g, write_n,
    KIND: tl.constexpr, GAIN: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, SMALL: tl.constexpr,
    N: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, HOW: tl.constexpr, DIAGONAL: tl.constexpr,
    ONE_READ: tl.constexpr, ONE_WRITE: tl.constexpr, PARTIAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # One program: one tile (on the diagonal, or below it), over heads z * part to (z + 1) * part.
    pid = tl.program_id(0)
    z = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    if DIAGONAL:
        r, k = pid, pid
    else:
        r, k = _below(pid)
    place = tl.arange(0, BLOCK)
    i, j = r * BLOCK + place, k * BLOCK + place
    n = tl.arange(0, STEP)
    read_ptr += b * read_b
    write_ptr += b * write_b
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    within = tl.zeros([BLOCK // SMALL, SMALL, SMALL], tl.float32)
    # Shared by every head where there is one group.
    if KIND == 0:
        shared = shared_tile(
            read_ptr, write_ptr, i, j, length, n_states, read_t, read_n, write_t, write_n, N, STEP, PRECISION
        )
    elif not DIAGONAL:
        read = read_rows(read_ptr, i, n, length, n_states, read_t, read_n)
        write = write_columns(write_ptr, j, n, length, n_states, write_t, write_n)
    for h in tl.range(z * part, tl.minimum((z + 1) * part, heads), num_stages=STAGES):
        bh = b * heads + h
        reads, writes = read_ptr, write_ptr
        if not ONE_READ:
            reads += tl.cast(h // read_heads, tl.int64) * read_g
        if not ONE_WRITE:
            writes += tl.cast(h // write_heads, tl.int64) * write_g
        rate = rate_ptr + h * N
        channel = bh * n_states if KIND == 2 else bh
        rise, rest, fall = rise_ptr + channel * padded, rest_ptr + channel * padded, fall_ptr + channel * padded
        count, gain = count_ptr + channel * padded, gain_ptr + bh * padded
        start, starts = start_ptr + channel * (blocks + 1), starts_ptr + channel * (blocks + 1)
        if KIND == 0:
            if not (ONE_READ and ONE_WRITE):
                shared = shared_tile(
                    reads, writes, i, j, length, n_states, read_t, read_n, write_t, write_n, N, STEP, PRECISION
                )
            if DIAGONAL:
                tile = diagonal_scalar(shared, rise, rest, gain, count, r * BLOCK, GAIN, COUNT, BLOCK)
            else:
                tile = scaled_tile(
                    shared, rise, fall, gain, count, start, starts, i, j, k, r, padded, blocks, GAIN, COUNT
                )
            total = _add(total, tile, HOW)
        elif DIAGONAL:
            # Levels do not overlap: each is added by itself, so that only one is held.
            for level in tl.static_range(6):
                if (BLOCK >> (level + 1)) >= SMALL:
                    tile = level_tile(
                        reads, writes, rate, rise, rest, gain, count, r * BLOCK, length, n_states, padded,
                        read_t, read_n, write_t, write_n,
                        KIND, GAIN, COUNT, BLOCK, BLOCK >> (level + 1), N, STEP, PRECISION,
                    )  # fmt: skip
                    total = _add(total, tile, HOW)
            small = exact(
                reads, writes, rate, rise, rest, gain, count, r * BLOCK, length, n_states, padded,
                read_t, read_n, write_t, write_n, KIND, GAIN, COUNT, BLOCK, SMALL,
            )  # fmt: skip
            within = _add(within, small, HOW)
        else:
            if not ONE_READ:
                read = read_rows(reads, i, n, length, n_states, read_t, read_n)
            if not ONE_WRITE:
                write = write_columns(writes, j, n, length, n_states, write_t, write_n)
            u = row_factors(read, rate, rise, count, i, n, n_states, padded, KIND, COUNT)
            tile = left_tile(
                u, write, reads, writes, rate, rise, fall, gain, count, start, starts, i, j, k, r,
                length, n_states, padded, blocks, read_t, read_n, write_t, write_n,
                KIND, GAIN, COUNT, N, STEP, PRECISION,
            )  # fmt: skip
            total = _add(total, tile, HOW)
    if PARTIAL:
        to = _partial(out_ptr, BLOCK)
        kept = to + place[:, None] * BLOCK + place[None, :]
        if DIAGONAL and KIND != 0:
            tl.store(kept, total, mask=(place // SMALL)[:, None] != (place // SMALL)[None, :])
            inner = tl.arange(0, SMALL)
            row = tl.arange(0, BLOCK // SMALL)[:, None, None] * SMALL + inner[None, :, None]
            column = tl.arange(0, BLOCK // SMALL)[:, None, None] * SMALL + inner[None, None, :]
            tl.store(to + row * BLOCK + column, within)
        else:
            tl.store(kept, total)
    else:
        _write(out_ptr, total, i, j, length, scale, HOW)


@triton.jit
def _tables(
    rate_ptr, rise_ptr, fall_ptr, gain_ptr, start_ptr, h, bh, i, j, k, r, n, padded, blocks,
    N: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    rise = tl.load(rise_ptr + bh * padded + i)
    fall = tl.load(fall_ptr + bh * padded + j)
    gain = tl.load(gain_ptr + bh * padded + j) if GAIN else fall
    start = start_ptr + bh * (blocks + 1)
    return rise, fall, gain, tl.load(rate_ptr + h * N + n), tl.load(start + r), tl.load(start + k + 1)


@triton.jit
def reduce_rates_kernel(
    read_ptr, write_ptr, rate_ptr, rise_ptr, fall_ptr, gain_ptr, start_ptr, out_ptr,
    length, heads, part, n_states, padded, blocks, scale, read_b, read_t, read_n, write_b, write_t, write_n,
    GAIN: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, HOW: tl.constexpr,
    PARTIAL: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    # The tiles below the diagonal as in `reduce_kernel`, for what Mamba-1 has: a rate per state, one group, no
    # resets. The next head's clocks are loaded before this head's product.
    pid = tl.program_id(0)
    z = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    r, k = _below(pid)
    place = tl.arange(0, BLOCK)
    i, j = r * BLOCK + place, k * BLOCK + place
    n = tl.arange(0, N)
    read = read_rows(read_ptr + b * read_b, i, n, length, n_states, read_t, read_n)
    write = write_columns(write_ptr + b * write_b, j, n, length, n_states, write_t, write_n)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    first, last = z * part, tl.minimum((z + 1) * part, heads)
    rise, fall, gain, rate, until, since = _tables(
        rate_ptr, rise_ptr, fall_ptr, gain_ptr, start_ptr, first, b * heads + first, i, j, k, r, n, padded, blocks,
        N, GAIN,
    )  # fmt: skip
    for h in tl.range(first, last, num_stages=1, loop_unroll_factor=UNROLL):
        after = tl.minimum(h + 1, last - 1)
        rise_after, fall_after, gain_after, rate_after, until_after, since_after = _tables(
            rate_ptr, rise_ptr, fall_ptr, gain_ptr, start_ptr, after, b * heads + after, i, j, k, r, n, padded, blocks,
            N, GAIN,
        )  # fmt: skip
        gap = (until - since).to(tl.float32)
        u = read * decay(rise[:, None], rate[None, :], 1)
        v = write * decay((fall + gap)[None, :], rate[:, None], 1)
        if GAIN:
            v *= gain[None, :]
        total = _add(total, product(u, v, PRECISION), HOW)
        rise, fall, gain, rate = rise_after, fall_after, gain_after, rate_after
        until, since = until_after, since_after
    if PARTIAL:
        tl.store(_partial(out_ptr, BLOCK) + place[:, None] * BLOCK + place[None, :], total)
    else:
        _write(out_ptr, total, i, j, length, scale, HOW)
