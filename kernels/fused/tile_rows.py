"""The kernel that writes blocks of rows, or weighs them by distance."""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from .tile_parts import absolute, diagonal_scalar, exact, nested, read_rows, write_columns
from .tile_products import left_tile, row_factors, scaled_tile, shared_tile

__all__ = ["rows_kernel"]


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
    if KIND != 0:
        u = read_rows(read_ptr, i, n, length, n_states, read_t, read_n)
        u = row_factors(u, rate_ptr, rise_ptr, count_ptr, i, n, n_states, padded, KIND, COUNT)
    mass = tl.zeros([BLOCK], tl.float32)
    far = tl.zeros([BLOCK], tl.float32)
    for k in tl.range(0, r, num_stages=STAGES):
        j = k * BLOCK + place
        if KIND == 0:
            shared = shared_tile(
                read_ptr, write_ptr, i, j, length, n_states, read_t, read_n, write_t, write_n, N, STEP, PRECISION
            )
            tile = scaled_tile(
                shared, rise_ptr, fall_ptr, gain_ptr, count_ptr, start_ptr, starts_ptr, i, j, k, r, padded, blocks,
                GAIN, COUNT,
            )  # fmt: skip
        else:
            v = write_columns(write_ptr, j, n, length, n_states, write_t, write_n)
            tile = left_tile(
                u, v, read_ptr, write_ptr, rate_ptr, rise_ptr, fall_ptr, gain_ptr, count_ptr, start_ptr, starts_ptr,
                i, j, k, r, length, n_states, padded, blocks, read_t, read_n, write_t, write_n,
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
        shared = shared_tile(
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
