"""Pieces of the tile kernels: loads, decays to and from a boundary, products, and the tile on the diagonal.

Pointers are those of one batch row and head (the tables of `tile_clock`) or of one batch row and group
(``read``, ``write``). Decays come as (rows, 1) or (rows, n) and (1, columns) or (n, columns).
"""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

__all__ = [
    "absolute",
    "diagonal_scalar",
    "exact",
    "falling",
    "nested",
    "product",
    "rates",
    "read_rows",
    "rising",
    "write_columns",
]

_COMPILED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1")


@triton.jit
def _exp2(x):
    # libdevice's flushes results below 1e-38 to zero, which saves the three instructions that rescale around it.
    return libdevice.exp2(x) if _COMPILED else tl.exp2(x)


@triton.jit
def absolute(x):
    # libdevice's is a sign bit that additions can drop for free.
    return libdevice.abs(x) if _COMPILED else tl.abs(x)


@triton.jit
def rates(rate_ptr, n, KIND: tl.constexpr):
    # Halvings per unit of the clock, where the clock does not count them itself. The table is as wide as any n.
    if KIND == 1:
        return tl.load(rate_ptr + n)
    else:
        return n


@triton.jit
def read_rows(read_ptr, i, n, length, n_states, read_t, read_n, allowed=True):
    # 0 where not allowed, a condition on rows or on rows and states.
    known = (i < length)[:, None] & (n < n_states)[None, :] & allowed
    return tl.load(read_ptr + i.to(tl.int64)[:, None] * read_t + n[None, :] * read_n, mask=known, other=0.0).to(
        tl.float32
    )


@triton.jit
def write_columns(write_ptr, j, n, length, n_states, write_t, write_n):
    known = (j < length)[None, :] & (n < n_states)[:, None]
    return tl.load(write_ptr + j.to(tl.int64)[None, :] * write_t + n[:, None] * write_n, mask=known, other=0.0).to(
        tl.float32
    )


@triton.jit
def _row_table(ptr, i, n, n_states, size, PER_STATE: tl.constexpr):
    if PER_STATE:
        return tl.load(ptr + n[None, :] * size + i[:, None], mask=(n < n_states)[None, :], other=0)
    else:
        return tl.load(ptr + i)[:, None]


@triton.jit
def _column_table(ptr, j, n, n_states, size, PER_STATE: tl.constexpr):
    if PER_STATE:
        return tl.load(ptr + n[:, None] * size + j[None, :], mask=(n < n_states)[:, None], other=0)
    else:
        return tl.load(ptr + j)[None, :]


@triton.jit
def _state_table(ptr, k, n, n_states, size, PER_STATE: tl.constexpr):
    # One place k of a table: a scalar, or one number per state.
    if PER_STATE:
        return tl.load(ptr + n * size + k, mask=n < n_states, other=0)
    else:
        return tl.load(ptr + k)


@triton.jit
def decay(distance, rate, KIND: tl.constexpr):
    if KIND == 1:
        return _exp2(-rate * distance)
    else:
        return _exp2(-distance)


@triton.jit
def rising(rise_ptr, count_ptr, i, n, rate, n_states, padded, KIND: tl.constexpr, COUNT: tl.constexpr):
    # Decay from the start of the block to rows i.
    kept = decay(_row_table(rise_ptr, i, n, n_states, padded, KIND == 2), rate[None, :], KIND)
    if COUNT:
        # A product: Triton 3.6 cannot bring the condition itself into the layout of a matrix unit's operand.
        kept *= tl.where(_row_table(count_ptr, i, n, n_states, padded, KIND == 2) == 0, 1.0, 0.0)
    return kept


@triton.jit
def falling(
    fall_ptr, count_ptr, start_ptr, starts_ptr, j, n, rate, k, row_block, n_states, padded, blocks,
    KIND: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    # Decay from columns j of block k to the start of a later block of rows.
    until = _state_table(start_ptr, row_block, n, n_states, blocks + 1, KIND == 2)
    gap = (until - _state_table(start_ptr, k + 1, n, n_states, blocks + 1, KIND == 2)).to(tl.float32)
    inside = _column_table(fall_ptr, j, n, n_states, padded, KIND == 2)
    if KIND == 2:
        kept = decay(inside + gap[:, None], rate, KIND)
    else:
        kept = decay(inside + gap, rate[:, None], KIND)
    if COUNT:
        marks = _state_table(starts_ptr, row_block, n, n_states, blocks + 1, KIND == 2)
        since = marks - _state_table(starts_ptr, k, n, n_states, blocks + 1, KIND == 2)
        inside_marks = _column_table(count_ptr, j, n, n_states, padded, KIND == 2)
        if KIND == 2:
            kept = tl.where(inside_marks == since[:, None], kept, 0.0)
        else:
            kept = tl.where(inside_marks == since, kept, 0.0)
    return kept


@triton.jit
def _high(x):
    # x rounded to the 11 bits that a tf32 unit reads.
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def product(u, v, PRECISION: tl.constexpr):
    # u @ v of float32 on tf32 units: high and low parts of both, low @ low left out (2^-22 of the product).
    # The smallest come first. Triton's own "tf32x3" also filters NaN, at the price of a pass over the tile.
    if PRECISION == "split":
        high, top = _high(u), _high(v)
        tile = tl.dot(u - high, top, input_precision="tf32")
        tile = tl.dot(high, v - top, tile, input_precision="tf32")
        return tl.dot(high, top, tile, input_precision="tf32")
    else:
        return tl.dot(u, v, input_precision=PRECISION)


@triton.jit
def level_tile(
    read_ptr, write_ptr, rate_ptr, rise_ptr, rest_ptr, gain_ptr, count_ptr, first, length, n_states, padded,
    read_t, read_n, write_t, write_n,
    KIND: tl.constexpr, GAIN: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr, HALF: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # In every span of 2 * HALF tokens: rows of its second half, columns of its first, through the edge between.
    place = tl.arange(0, BLOCK)
    i = first + place
    edge = first + place // (2 * HALF) * (2 * HALF) + HALF - 1
    later = place % (2 * HALF) >= HALF
    tile = tl.zeros([BLOCK, BLOCK], tl.float32)
    STATES: tl.constexpr = KIND == 2
    for lead in tl.range(0, N, STEP, num_stages=1):
        n = lead + tl.arange(0, STEP)
        rate = rates(rate_ptr, n, KIND)
        up = _row_table(rise_ptr, i, n, n_states, padded, STATES) - _row_table(
            rise_ptr, edge, n, n_states, padded, STATES
        )
        up += _row_table(rest_ptr, i, n, n_states, padded, STATES) - _row_table(
            rest_ptr, edge, n, n_states, padded, STATES
        )
        allowed = later[:, None]
        down = _column_table(rise_ptr, edge, n, n_states, padded, STATES) - _column_table(
            rise_ptr, i, n, n_states, padded, STATES
        )
        down += _column_table(rest_ptr, edge, n, n_states, padded, STATES) - _column_table(
            rest_ptr, i, n, n_states, padded, STATES
        )
        open_ = later[None, :] == 0
        # In the other half the difference has the wrong sign and could overflow.
        u = decay(tl.where(allowed, up, 0.0), rate[None, :], KIND)
        v = decay(tl.where(open_, down, 0.0), rate[:, None], KIND)
        if COUNT:
            allowed = allowed & (
                _row_table(count_ptr, i, n, n_states, padded, STATES)
                == _row_table(count_ptr, edge, n, n_states, padded, STATES)
            )
            open_ = open_ & (
                _column_table(count_ptr, i, n, n_states, padded, STATES)
                == _column_table(count_ptr, edge, n, n_states, padded, STATES)
            )
        u *= read_rows(read_ptr, i, n, length, n_states, read_t, read_n, allowed)
        if GAIN:
            v *= tl.load(gain_ptr + i)[None, :]
        v = tl.where(open_, v * write_columns(write_ptr, i, n, length, n_states, write_t, write_n), 0.0)
        tile += product(u, v, PRECISION)
    # Also what is 0 already, unless NaN came in: it stays with the pairs that it belongs to.
    same = (place // (2 * HALF))[:, None] == (place // (2 * HALF))[None, :]
    return tl.where(same & later[:, None] & (later[None, :] == 0), tile, 0.0)


@triton.jit
def nested(
    read_ptr, write_ptr, rate_ptr, rise_ptr, rest_ptr, gain_ptr, count_ptr, first, length, n_states, padded,
    read_t, read_n, write_t, write_n,
    KIND: tl.constexpr, GAIN: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr, SMALL: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The tile on the diagonal without its diagonal sub-blocks of SMALL, by spans of BLOCK, BLOCK / 2, ...
    out = tl.zeros([BLOCK, BLOCK], tl.float32)
    for level in tl.static_range(6):
        if (BLOCK >> (level + 1)) >= SMALL:
            out += level_tile(
                read_ptr, write_ptr, rate_ptr, rise_ptr, rest_ptr, gain_ptr, count_ptr, first, length, n_states, padded,
                read_t, read_n, write_t, write_n,
                KIND, GAIN, COUNT, BLOCK, BLOCK >> (level + 1), N, STEP, PRECISION,
            )  # fmt: skip
    return out


@triton.jit
def exact(
    read_ptr, write_ptr, rate_ptr, rise_ptr, rest_ptr, gain_ptr, count_ptr, first, length, n_states, padded,
    read_t, read_n, write_t, write_n,
    KIND: tl.constexpr, GAIN: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    # The diagonal sub-blocks, (BLOCK / SMALL, SMALL, SMALL): exact differences, one exponential per state.
    sub = tl.arange(0, BLOCK // SMALL)[:, None, None] * SMALL
    place = tl.arange(0, SMALL)
    i = first + sub + place[None, :, None]
    j = first + sub + place[None, None, :]
    causal = place[None, :, None] >= place[None, None, :]
    rows, columns = (i < length), (j < length)
    out = tl.zeros([BLOCK // SMALL, SMALL, SMALL], tl.float32)
    steps = out
    connected = causal
    if KIND == 1:
        steps = (tl.load(rise_ptr + i) - tl.load(rise_ptr + j)) + (tl.load(rest_ptr + i) - tl.load(rest_ptr + j))
        # Above the diagonal the difference has the wrong sign and could overflow.
        steps = tl.where(causal, steps, 0.0)
        if COUNT:
            connected = causal & (tl.load(count_ptr + i) == tl.load(count_ptr + j))
    for n in range(n_states):
        if KIND == 1:
            kept = _exp2(-tl.load(rate_ptr + n) * steps)
        else:
            at = n * padded
            apart = tl.load(rise_ptr + at + i) - tl.load(rise_ptr + at + j)
            apart += tl.load(rest_ptr + at + i) - tl.load(rest_ptr + at + j)
            kept = _exp2(-tl.where(causal, apart, 0.0))
            if COUNT:
                kept = tl.where(tl.load(count_ptr + at + i) == tl.load(count_ptr + at + j), kept, 0.0)
        r = tl.load(read_ptr + i.to(tl.int64) * read_t + n * read_n, mask=rows, other=0.0).to(tl.float32)
        w = tl.load(write_ptr + j.to(tl.int64) * write_t + n * write_n, mask=columns, other=0.0).to(tl.float32)
        out += (r * w) * kept
    if GAIN:
        out *= tl.load(gain_ptr + j)
    return tl.where(connected, out, 0.0)


@triton.jit
def diagonal_scalar(
    shared, rise_ptr, rest_ptr, gain_ptr, count_ptr, first,
    GAIN: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The tile on the diagonal where a head has one decay; shared is read @ write^T.
    i = first + tl.arange(0, BLOCK)
    allowed = i[:, None] >= i[None, :]
    near, rest = tl.load(rise_ptr + i), tl.load(rest_ptr + i)
    steps = (near[:, None] - near[None, :]) + (rest[:, None] - rest[None, :])
    kept = _exp2(-tl.where(allowed, steps, 0.0))
    if COUNT:
        marks = tl.load(count_ptr + i)
        allowed = allowed & (marks[:, None] == marks[None, :])
    tile = shared * kept
    if GAIN:
        tile *= tl.load(gain_ptr + i)[None, :]
    return tl.where(allowed, tile, 0.0)
