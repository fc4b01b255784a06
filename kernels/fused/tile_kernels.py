"""Kernels of the tiles: blocks of rows written out or weighed, and tiles reduced over heads.

A tile left of the diagonal is a product of n-vectors through the start of its rows' block; the tile on the
diagonal is halved again and again in the same way, down to sub-blocks that take exact differences.
"""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from .tile_parts import (
    absolute,
    diagonal_scalar,
    exact,
    falling,
    nested,
    product,
    rates,
    read_rows,
    rising,
    write_columns,
)

__all__ = ["reduce_kernel", "rows_kernel"]


@triton.jit
def _row_factors(
    u, rate_ptr, rise_ptr, count_ptr, i, n, n_states, padded,
    KIND: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    # The factors of rows i; u are the rows of read.
    if KIND == 0:
        return u
    return u * rising(rise_ptr, count_ptr, i, n, rates(rate_ptr, n, KIND), n_states, padded, KIND, COUNT)


@triton.jit
def _column_factors(
    v, rate_ptr, fall_ptr, gain_ptr, count_ptr, start_ptr, starts_ptr, j, n, k, r, n_states, padded, blocks,
    KIND: tl.constexpr, GAIN: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    # The factors of columns j, up to the start of block r; v are the columns of write.
    if KIND == 0:
        return v
    v *= falling(
        fall_ptr, count_ptr, start_ptr, starts_ptr, j, n, rates(rate_ptr, n, KIND), k, r, n_states, padded,
        blocks, KIND, COUNT,
    )  # fmt: skip
    if GAIN:
        v *= tl.load(gain_ptr + j)[None, :]
    return v


@triton.jit
def _left(
    u, v, read_ptr, write_ptr, rate_ptr, rise_ptr, fall_ptr, gain_ptr, count_ptr, start_ptr, starts_ptr, i, j, k, r,
    length, n_states, padded, blocks, read_t, read_n, write_t, write_n,
    KIND: tl.constexpr, GAIN: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # The tile of rows i (block r) and columns j (an earlier block k); u are the first STEP row factors, v the
    # first STEP columns of write.
    n = tl.arange(0, STEP)
    v = _column_factors(
        v, rate_ptr, fall_ptr, gain_ptr, count_ptr, start_ptr, starts_ptr, j, n, k, r, n_states, padded, blocks,
        KIND, GAIN, COUNT,
    )  # fmt: skip
    tile = product(u, v, PRECISION)
    for lead in tl.static_range(STEP, N, STEP):
        n = lead + tl.arange(0, STEP)
        u = read_rows(read_ptr, i, n, length, n_states, read_t, read_n)
        u = _row_factors(u, rate_ptr, rise_ptr, count_ptr, i, n, n_states, padded, KIND, COUNT)
        v = write_columns(write_ptr, j, n, length, n_states, write_t, write_n)
        v = _column_factors(
            v, rate_ptr, fall_ptr, gain_ptr, count_ptr, start_ptr, starts_ptr, j, n, k, r, n_states, padded, blocks,
            KIND, GAIN, COUNT,
        )  # fmt: skip
        tile += product(u, v, PRECISION)
    if KIND == 0:
        # One decay per head scales rows and columns of read @ write^T.
        n = tl.arange(0, 1)
        tile *= rising(rise_ptr, count_ptr, i, n, n, n_states, padded, KIND, COUNT)
        column = falling(
            fall_ptr, count_ptr, start_ptr, starts_ptr, j, n, n, k, r, n_states, padded, blocks, KIND, COUNT
        )
        if GAIN:
            column *= tl.load(gain_ptr + j)[None, :]
        tile *= column
    return tile


@triton.jit
def _shared(
    read_ptr, write_ptr, i, j, length, n_states, read_t, read_n, write_t, write_n,
    N: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, STEP)
    tile = product(
        read_rows(read_ptr, i, n, length, n_states, read_t, read_n),
        write_columns(write_ptr, j, n, length, n_states, write_t, write_n),
        PRECISION,
    )
    for lead in tl.static_range(STEP, N, STEP):
        n = lead + tl.arange(0, STEP)
        tile += product(
            read_rows(read_ptr, i, n, length, n_states, read_t, read_n),
            write_columns(write_ptr, j, n, length, n_states, write_t, write_n),
            PRECISION,
        )
    return tile


@triton.jit
def rows_kernel(
    read_ptr, write_ptr, rate_ptr, rise_ptr, rest_ptr, fall_ptr, gain_ptr, count_ptr, start_ptr, starts_ptr, out_ptr,
    length, first_row, stop, heads, read_heads, write_heads, n_states, padded, blocks, row_blocks,
    read_b, read_t, read_g, read_n, write_b, write_t, write_g, write_n,
    KIND: tl.constexpr, GAIN: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, SMALL: tl.constexpr,
    N: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, WEIGH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # One program: one block of rows of one head. Writes rows first_row to stop of M, columns 0 to stop, or
    # (WEIGH) sum_s (t - s) |M[t, s]| / sum_s |M[t, s]| of each row.
    pid = tl.program_id(0)
    bh = (pid // row_blocks).to(tl.int64)
    r = pid % row_blocks + first_row // BLOCK
    b, h = bh // heads, bh % heads
    read_ptr += b * read_b + h // read_heads * read_g
    write_ptr += b * write_b + h // write_heads * write_g
    rate_ptr += h * N
    channel = bh * n_states if KIND == 2 else bh
    rise_ptr += channel * padded
    rest_ptr += channel * padded
    fall_ptr += channel * padded
    count_ptr += channel * padded
    start_ptr += channel * (blocks + 1)
    starts_ptr += channel * (blocks + 1)
    gain_ptr += bh * padded
    place = tl.arange(0, BLOCK)
    i = r * BLOCK + place
    n = tl.arange(0, STEP)
    wanted = (i >= first_row) & (i < stop)
    to = out_ptr + (bh * (stop - first_row) + (i - first_row).to(tl.int64)[:, None]) * stop + place[None, :]
    u = read_rows(read_ptr, i, n, length, n_states, read_t, read_n)
    u = _row_factors(u, rate_ptr, rise_ptr, count_ptr, i, n, n_states, padded, KIND, COUNT)
    mass = tl.zeros([BLOCK], tl.float32)
    far = tl.zeros([BLOCK], tl.float32)
    for k in tl.range(0, r, num_stages=STAGES):
        j = k * BLOCK + place
        v = write_columns(write_ptr, j, n, length, n_states, write_t, write_n)
        tile = _left(
            u, v, read_ptr, write_ptr, rate_ptr, rise_ptr, fall_ptr, gain_ptr, count_ptr, start_ptr, starts_ptr, i, j, k, r, length, n_states, padded, blocks, read_t, read_n, write_t, write_n,
            KIND, GAIN, COUNT, N, STEP, PRECISION,
        )  # fmt: skip
        if WEIGH:
            # Only non-negative numbers are added: distances are counted from the first row of the block.
            tile = absolute(tile)
            total = tl.sum(tile, 1)
            mass += total
            apart = ((r - k) * BLOCK - place).to(tl.float32)
            far += tl.sum(tile * apart[None, :], 1) + place.to(tl.float32) * total
        else:
            tl.store(to + k * BLOCK, tile, mask=wanted[:, None])
    if KIND == 0:
        shared = _shared(
            read_ptr, write_ptr, i, i, length, n_states, read_t, read_n, write_t, write_n, N, STEP, PRECISION
        )
        tile = diagonal_scalar(shared, rise_ptr, rest_ptr, gain_ptr, count_ptr, r * BLOCK, GAIN, COUNT, BLOCK)
        keep = wanted[:, None] & (i < stop)[None, :]
    else:
        tile = nested(
            read_ptr, write_ptr, rate_ptr, rise_ptr, rest_ptr, gain_ptr, count_ptr, r * BLOCK, length, n_states, padded,
            read_t, read_n, write_t, write_n, KIND, GAIN, COUNT, BLOCK, SMALL, N, STEP, PRECISION,
        )  # fmt: skip
        keep = wanted[:, None] & (i < stop)[None, :] & ((place // SMALL)[:, None] != (place // SMALL)[None, :])
        small = exact(
            read_ptr, write_ptr, rate_ptr, rise_ptr, rest_ptr, gain_ptr, count_ptr, r * BLOCK, length, n_states, padded,
            read_t, read_n, write_t, write_n, KIND, GAIN, COUNT, BLOCK, SMALL,
        )  # fmt: skip
        at = r * BLOCK + tl.arange(0, BLOCK // SMALL)[:, None, None] * SMALL
        row = at + tl.arange(0, SMALL)[None, :, None]
        column = at + tl.arange(0, SMALL)[None, None, :]
        if WEIGH:
            small = absolute(small)
            mass += tl.reshape(tl.sum(small, 2), [BLOCK])
            apart = tl.maximum(row - column, 0).to(tl.float32)
            far += tl.reshape(tl.sum(small * apart, 2), [BLOCK])
        else:
            inner = out_ptr + (bh * (stop - first_row) + (row - first_row).to(tl.int64)) * stop + column
            tl.store(inner, small, mask=(row >= first_row) & (row < stop) & (column < stop))
    if WEIGH:
        tile = absolute(tile)
        apart = tl.maximum(place[:, None] - place[None, :], 0).to(tl.float32)
        mass += tl.sum(tile, 1)
        far += tl.sum(tile * apart, 1)
        mean = tl.where(mass > 0, far / tl.where(mass > 0, mass, 1.0), float("nan"))
        tl.store(out_ptr + bh * (stop - first_row) + i - first_row, mean, mask=wanted)
    else:
        tl.store(to + r * BLOCK, tile, mask=keep)
        zero = tl.zeros([BLOCK, BLOCK], tl.float32)
        for k in range(r + 1, tl.cdiv(stop, BLOCK)):
            tl.store(to + k * BLOCK, zero, mask=wanted[:, None] & (k * BLOCK + place < stop)[None, :])


@triton.jit
def _add(total, tile, HOW: tl.constexpr):
    if HOW == "mean":
        return total + tile
    elif HOW == "mean_abs":
        return total + absolute(tile)
    elif HOW == "norm":
        return total + tile * tile
    else:
        return tl.maximum(total, absolute(tile))


@triton.jit
def reduce_kernel(
    read_ptr, write_ptr, rate_ptr, rise_ptr, rest_ptr, fall_ptr, gain_ptr, count_ptr, start_ptr, starts_ptr, out_ptr,
    length, heads, part, parts, read_heads, write_heads, n_states, padded, blocks, scale,
    read_b, read_t, read_g, read_n, write_b, write_t, write_g, write_n,
    KIND: tl.constexpr, GAIN: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, SMALL: tl.constexpr,
    N: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, HOW: tl.constexpr, DIAGONAL: tl.constexpr,
    ONE_READ: tl.constexpr, ONE_WRITE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # One program: one tile, over heads z * part to (z + 1) * part. Writes a partial map out[z, b], scaled (the
    # root of "norm" is taken where the partial maps meet). DIAGONAL: the tiles on the diagonal, and zeros above.
    pid = tl.program_id(0)
    z = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    if DIAGONAL:
        r = pid
        k = pid
    else:
        # Tiles below the diagonal, row by row: pid = r (r - 1) / 2 + k.
        r = ((tl.sqrt(8.0 * pid.to(tl.float32) + 1.0) + 1.0) * 0.5).to(tl.int32)
        r = tl.where(r * (r - 1) // 2 > pid, r - 1, r)
        r = tl.where(r * (r + 1) // 2 <= pid, r + 1, r)
        k = pid - r * (r - 1) // 2
    place = tl.arange(0, BLOCK)
    i, j = r * BLOCK + place, k * BLOCK + place
    n = tl.arange(0, STEP)
    read_ptr += b * read_b
    write_ptr += b * write_b
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    within = tl.zeros([BLOCK // SMALL, SMALL, SMALL], tl.float32)
    # Shared by every head where there is one group.
    read = read_rows(read_ptr, i, n, length, n_states, read_t, read_n)
    write = write_columns(write_ptr, j, n, length, n_states, write_t, write_n)
    for h in tl.range(z * part, tl.minimum((z + 1) * part, heads), num_stages=STAGES):
        bh = b * heads + h
        reads, writes = read_ptr, write_ptr
        if not ONE_READ:
            reads += h // read_heads * read_g
        if not ONE_WRITE:
            writes += h // write_heads * write_g
        rate = rate_ptr + h * N
        channel = bh * n_states if KIND == 2 else bh
        rise, rest, fall = rise_ptr + channel * padded, rest_ptr + channel * padded, fall_ptr + channel * padded
        count, gain = count_ptr + channel * padded, gain_ptr + bh * padded
        start, starts = start_ptr + channel * (blocks + 1), starts_ptr + channel * (blocks + 1)
        if DIAGONAL:
            if KIND == 0:
                shared = _shared(
                    reads, writes, i, i, length, n_states, read_t, read_n, write_t, write_n, N, STEP, PRECISION
                )
                tile = diagonal_scalar(shared, rise, rest, gain, count, r * BLOCK, GAIN, COUNT, BLOCK)
            else:
                tile = nested(
                    reads, writes, rate, rise, rest, gain, count, r * BLOCK, length, n_states, padded,
                    read_t, read_n, write_t, write_n, KIND, GAIN, COUNT, BLOCK, SMALL, N, STEP, PRECISION,
                )  # fmt: skip
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
            u = _row_factors(read, rate, rise, count, i, n, n_states, padded, KIND, COUNT)
            tile = _left(
                u, write, reads, writes, rate, rise, fall, gain, count, start, starts, i, j, k, r,
                length, n_states, padded, blocks, read_t, read_n, write_t, write_n,
                KIND, GAIN, COUNT, N, STEP, PRECISION,
            )  # fmt: skip
        total = _add(total, tile, HOW)
    size = length.to(tl.int64)
    base = out_ptr + (z * tl.num_programs(2) + b) * size * size
    rows = i.to(tl.int64)[:, None]
    known = (i < length)[:, None] & (j < length)[None, :]
    if DIAGONAL and KIND != 0:
        known = known & ((place // SMALL)[:, None] != (place // SMALL)[None, :])
        at = r * BLOCK + tl.arange(0, BLOCK // SMALL)[:, None, None] * SMALL
        row, column = at + tl.arange(0, SMALL)[None, :, None], at + tl.arange(0, SMALL)[None, None, :]
        tl.store(base + row.to(tl.int64) * size + column, within * scale, mask=(row < length) & (column < length))
    tl.store(base + rows * size + j[None, :], total * scale, mask=known)
    if DIAGONAL:
        zero = tl.zeros([BLOCK, BLOCK], tl.float32)
        for after in range(r + 1, blocks):
            j = after * BLOCK + place
            tl.store(base + rows * size + j[None, :], zero, mask=(i < length)[:, None] & (j < length)[None, :])
