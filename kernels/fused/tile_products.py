"""Tiles left of the diagonal, as products of n-vectors through the start of their rows' block."""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from .tile_parts import falling, product, rates, read_rows, rising, write_columns

__all__ = ["left_tile", "row_factors", "scaled_tile", "shared_tile"]


@triton.jit
def row_factors(
    u, rate_ptr, rise_ptr, count_ptr, i, n, n_states, padded,
    KIND: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    # The factors of rows i; u are the rows of read.
    return u * rising(rise_ptr, count_ptr, i, n, rates(rate_ptr, n, KIND), n_states, padded, KIND, COUNT)


@triton.jit
def column_factors(
    v, rate_ptr, fall_ptr, gain_ptr, count_ptr, start_ptr, starts_ptr, j, n, k, r, n_states, padded, blocks,
    KIND: tl.constexpr, GAIN: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    # The factors of columns j, up to the start of block r; v are the columns of write.
    v *= falling(
        fall_ptr, count_ptr, start_ptr, starts_ptr, j, n, rates(rate_ptr, n, KIND), k, r, n_states, padded,
        blocks, KIND, COUNT,
    )  # fmt: skip
    if GAIN:
        v *= tl.load(gain_ptr + j)[None, :]
    return v


@triton.jit
def left_tile(
    u, v, read_ptr, write_ptr, rate_ptr, rise_ptr, fall_ptr, gain_ptr, count_ptr, start_ptr, starts_ptr, i, j, k, r,
    length, n_states, padded, blocks, read_t, read_n, write_t, write_n,
    KIND: tl.constexpr, GAIN: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # The tile of rows i (block r) and columns j (an earlier block k) where states decay apart; u are the first
    # STEP row factors, v the first STEP columns of write.
    n = tl.arange(0, STEP)
    v = column_factors(
        v, rate_ptr, fall_ptr, gain_ptr, count_ptr, start_ptr, starts_ptr, j, n, k, r, n_states, padded, blocks,
        KIND, GAIN, COUNT,
    )  # fmt: skip
    tile = product(u, v, PRECISION)
    for lead in tl.range(STEP, N, STEP, num_stages=1):
        n = lead + tl.arange(0, STEP)
        u = read_rows(read_ptr, i, n, length, n_states, read_t, read_n)
        u = row_factors(u, rate_ptr, rise_ptr, count_ptr, i, n, n_states, padded, KIND, COUNT)
        v = write_columns(write_ptr, j, n, length, n_states, write_t, write_n)
        v = column_factors(
            v, rate_ptr, fall_ptr, gain_ptr, count_ptr, start_ptr, starts_ptr, j, n, k, r, n_states, padded, blocks,
            KIND, GAIN, COUNT,
        )  # fmt: skip
        tile += product(u, v, PRECISION)
    return tile


@triton.jit
def scaled_tile(
    shared, rise_ptr, fall_ptr, gain_ptr, count_ptr, start_ptr, starts_ptr, i, j, k, r, padded, blocks,
    GAIN: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    # The same tile where a head has one decay, which scales rows and columns of shared = read @ write^T.
    n = tl.arange(0, 1)
    column = falling(fall_ptr, count_ptr, start_ptr, starts_ptr, j, n, n, k, r, 1, padded, blocks, 0, COUNT)
    if GAIN:
        column *= tl.load(gain_ptr + j)[None, :]
    return shared * rising(rise_ptr, count_ptr, i, n, n, 1, padded, 0, COUNT) * column


@triton.jit
def shared_tile(
    read_ptr, write_ptr, i, j, length, n_states, read_t, read_n, write_t, write_n,
    N: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # read @ write^T.
    tile = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for lead in tl.range(0, N, STEP, num_stages=1):
        n = lead + tl.arange(0, STEP)
        tile += product(
            read_rows(read_ptr, i, n, length, n_states, read_t, read_n),
            write_columns(write_ptr, j, n, length, n_states, write_t, write_n),
            PRECISION,
        )
    return tile
