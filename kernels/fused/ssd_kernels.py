"""Kernels of `ssd`: the walk from chunk to chunk, outputs, states at chosen times.

Two kernels for the outputs. `_outputs_shared` takes several heads of a group at a time and forms ``read @ write^T``
once for them; that matrix stays in registers, which leaves room for operands of one part only (precision "bf16").
`_outputs` takes one head at a time, in square tiles that are formed anew, and fits the three parts of float32.
"""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from .products import dot

__all__ = ["_carry", "_outputs", "_outputs_shared", "_picked"]


@triton.jit
def _carry(
    value_ptr, write_ptr, weight_ptr, through_ptr, initial_ptr, picks_ptr, dstates_ptr, every_ptr, final_ptr,
    length, heads, per_group, chunks, picks, p_size, n_size,
    value_b, value_t, value_h, write_b, write_t, write_g,
    L: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_PICKS: tl.constexpr, REVERSE: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    # One program: a (BP, BN) tile of one head's state, all chunks in order (from the last one in reverse).
    #     every[c] = state;  state = through[c] * state + (value * weight)^T @ write
    # and, for gradients, weight * gradient of every state that was handed out.
    head = tl.program_id(0) % heads
    row = (tl.program_id(0) // heads).to(tl.int64)
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    place = tl.arange(0, ROWS)
    tile = p[:, None] * n_size + n[None, :]
    in_tile = (p < p_size)[:, None] & (n < n_size)[None, :]
    one = (row * heads + head) * p_size * n_size
    state = tl.zeros((BP, BN), dtype=tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + one + tile, mask=in_tile, other=0.0).to(tl.float32)
    value_ptr += row * value_b + head.to(tl.int64) * value_h
    write_ptr += row * write_b + (head // per_group).to(tl.int64) * write_g
    value_at = place[:, None] * value_t + p[None, :]
    write_at = place[:, None] * write_t + n[None, :]
    clock = (row * heads + head) * chunks
    for k in range(chunks):
        chunk = k
        if REVERSE:
            chunk = chunks - 1 - k
        tl.store(every_ptr + ((row * chunks + chunk) * heads + head) * p_size * n_size + tile, state, mask=in_tile)
        state *= tl.load(through_ptr + clock + chunk)
        for sub in tl.static_range(L // ROWS):
            begin = tl.cast(chunk, tl.int64) * L + sub * ROWS
            real = (place < length - begin)[:, None]
            value = tl.load(value_ptr + begin * value_t + value_at, mask=real & (p < p_size)[None, :], other=0.0)
            write = tl.load(write_ptr + begin * write_t + write_at, mask=real & (n < n_size)[None, :], other=0.0)
            weight = tl.load(weight_ptr + (clock + chunk) * L + sub * ROWS + place)
            weighted = tl.trans(value.to(tl.float32) * weight[:, None])
            state = dot(weighted, write, state, A, B, INTERPRET)
        if HAS_PICKS:
            for s in range(tl.load(picks_ptr + chunk), tl.load(picks_ptr + chunk + 1)):
                at = tl.load(picks_ptr + chunks + 1 + s)
                pick = row * picks + tl.load(picks_ptr + chunks + 1 + picks + s)
                upstream = dstates_ptr + (pick * heads + head) * p_size * n_size + tile
                kept = tl.load(weight_ptr + clock * L + at)
                state += kept * tl.load(upstream, mask=in_tile, other=0.0).to(tl.float32)
    tl.store(final_ptr + one + tile, state, mask=in_tile)


@triton.jit
def _outputs_shared(
    value_ptr, write_ptr, read_ptr, high_ptr, low_ptr, forgets_ptr, dt_ptr, every_ptr, y_ptr,
    length, heads, per_write, per_read, chunks, p_size, n_size,
    value_b, value_t, value_h, write_b, write_t, write_g, read_b, read_t, read_g,
    L: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    TOGETHER: tl.constexpr, HAS_DT: tl.constexpr, COUNT: tl.constexpr, LOW: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, V: tl.constexpr, F: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    # One program: ROWS tokens of a chunk, TOGETHER heads that share read @ write^T (ROWS, L), BP channels of each.
    #     y = (read @ write^T * decay between) @ (dt * value) + decay from start * read @ state^T
    first = tl.program_id(0) % (heads // TOGETHER) * TOGETHER
    stretch = tl.program_id(0) // (heads // TOGETHER)
    part, chunk = stretch % (L // ROWS), stretch // (L // ROWS) % chunks
    row = (stretch // (L // ROWS) // chunks).to(tl.int64)
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    later, earlier = part * ROWS + tl.arange(0, ROWS), tl.arange(0, L)
    begin = chunk.to(tl.int64) * L
    real, wrote = (later < length - begin)[:, None], (earlier < length - begin)[:, None]
    read_at = read_ptr + row * read_b + begin * read_t + (first // per_read).to(tl.int64) * read_g
    read_at += later[:, None] * read_t + n[None, :]
    write_at = write_ptr + row * write_b + begin * write_t + (first // per_write).to(tl.int64) * write_g
    write_at += earlier[:, None] * write_t + n[None, :]
    read = tl.load(read_at, mask=real & (n < n_size)[None, :], other=0.0)
    write = tl.load(write_at, mask=wrote & (n < n_size)[None, :], other=0.0)
    alike = dot(read, tl.trans(write), tl.zeros((ROWS, L), dtype=tl.float32), R, W, INTERPRET)
    for i in tl.static_range(1, TILES):
        more = tl.load(read_at + i * BN, mask=real & (i * BN + n < n_size)[None, :], other=0.0)
        write = tl.load(write_at + i * BN, mask=wrote & (i * BN + n < n_size)[None, :], other=0.0)
        alike = dot(more, tl.trans(write), alike, R, W, INTERPRET)
    alike = tl.where(later[:, None] >= earlier[None, :], alike, 0.0)
    value_at = earlier[:, None] * value_t + p[None, :]
    y_at = later[:, None] * (heads * p_size) + p[None, :]
    every_at = p[None, :] * n_size + n[:, None]
    for k in range(TOGETHER):
        head = first + k
        clock = ((row * heads + head) * chunks + chunk) * L
        high_i, high_j = tl.load(high_ptr + clock + later), tl.load(high_ptr + clock + earlier)
        every = every_ptr + ((row * chunks + chunk) * heads + head) * p_size * n_size
        state = tl.load(every + every_at, mask=(n < n_size)[:, None] & (p < p_size)[None, :], other=0.0)
        y = dot(read, state, tl.zeros((ROWS, BP), dtype=tl.float32), R, F, INTERPRET)
        for i in tl.static_range(1, TILES):
            more = tl.load(read_at + i * BN, mask=real & (i * BN + n < n_size)[None, :], other=0.0)
            in_state = (i * BN + n < n_size)[:, None] & (p < p_size)[None, :]
            state = tl.load(every + every_at + i * BN, mask=in_state, other=0.0)
            y = dot(more, state, y, R, F, INTERPRET)
        start = tl.exp2(high_i)
        steps = high_i[:, None] - high_j[None, :]
        if LOW:
            low_i, low_j = tl.load(low_ptr + clock + later), tl.load(low_ptr + clock + earlier)
            steps += low_i[:, None] - low_j[None, :]
        # What is not causal is 0 in `alike` already; the bound keeps it from becoming 0 times infinity.
        matrix = tl.exp2(tl.where(steps > 64.0, 64.0, steps)) * alike
        if COUNT:
            forgets_i, forgets_j = tl.load(forgets_ptr + clock + later), tl.load(forgets_ptr + clock + earlier)
            start = tl.where(forgets_i == 0, start, 0.0)
            matrix = tl.where(forgets_i[:, None] == forgets_j[None, :], matrix, 0.0)
        if HAS_DT:
            matrix *= tl.load(dt_ptr + clock + earlier)[None, :]
        y *= start[:, None]
        from_value = value_ptr + row * value_b + begin * value_t + head.to(tl.int64) * value_h
        value = tl.load(from_value + value_at, mask=wrote & (p < p_size)[None, :], other=0.0)
        y = dot(matrix, value, y, F, V, INTERPRET)
        to = y_ptr + ((row * length + begin) * heads + head) * p_size
        tl.store(to + y_at, y, mask=real & (p < p_size)[None, :])


@triton.jit
def _outputs(
    value_ptr, write_ptr, read_ptr, high_ptr, low_ptr, forgets_ptr, dt_ptr, every_ptr, y_ptr,
    length, heads, per_write, per_read, chunks, p_size, n_size,
    value_b, value_t, value_h, write_b, write_t, write_g, read_b, read_t, read_g,
    L: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    HAS_DT: tl.constexpr, COUNT: tl.constexpr, LOW: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, V: tl.constexpr, F: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    # One program: ROWS tokens of one head's chunk, BP channels.
    head, stretch = tl.program_id(0) % heads, tl.program_id(0) // heads
    part, chunk = stretch % (L // ROWS), stretch // (L // ROWS) % chunks
    row = (stretch // (L // ROWS) // chunks).to(tl.int64)
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    place = tl.arange(0, ROWS)
    later = part * ROWS + place
    begin = chunk.to(tl.int64) * L
    real, in_p, in_n = (later < length - begin)[:, None], (p < p_size)[None, :], (n < n_size)[None, :]
    read_ptr += row * read_b + begin * read_t + (head // per_read).to(tl.int64) * read_g
    write_ptr += row * write_b + begin * write_t + (head // per_write).to(tl.int64) * write_g
    value_ptr += row * value_b + begin * value_t + head.to(tl.int64) * value_h
    clock = ((row * heads + head) * chunks + chunk) * L
    read_at = read_ptr + later[:, None] * read_t + n[None, :]
    every = every_ptr + ((row * chunks + chunk) * heads + head) * p_size * n_size + p[None, :] * n_size + n[:, None]
    read = tl.load(read_at, mask=real & in_n, other=0.0)
    state = tl.load(every, mask=(n < n_size)[:, None] & in_p, other=0.0)
    y = dot(read, state, tl.zeros((ROWS, BP), dtype=tl.float32), R, F, INTERPRET)
    for i in tl.static_range(1, TILES):
        more = i * BN + n < n_size
        state = tl.load(every + i * BN, mask=more[:, None] & in_p, other=0.0)
        y = dot(tl.load(read_at + i * BN, real & more[None, :], 0.0), state, y, R, F, INTERPRET)
    high_i = tl.load(high_ptr + clock + later)
    start = tl.exp2(high_i)
    if LOW:
        low_i = tl.load(low_ptr + clock + later)
    if COUNT:
        forgets_i = tl.load(forgets_ptr + clock + later)
        start = tl.where(forgets_i == 0, start, 0.0)
    y *= start[:, None]
    for s in range(part + 1):
        earlier = s * ROWS + place
        wrote = (earlier < length - begin)[:, None]
        write_at = write_ptr + earlier[:, None] * write_t + n[None, :]
        write = tl.load(write_at, mask=wrote & in_n, other=0.0)
        value = tl.load(value_ptr + earlier[:, None] * value_t + p[None, :], mask=wrote & in_p, other=0.0)
        alike = dot(read, tl.trans(write), tl.zeros((ROWS, ROWS), dtype=tl.float32), R, W, INTERPRET)
        for i in tl.static_range(1, TILES):
            also = (i * BN + n < n_size)[None, :]
            late, soon = tl.load(read_at + i * BN, real & also, 0.0), tl.load(write_at + i * BN, wrote & also, 0.0)
            alike = dot(late, tl.trans(soon), alike, R, W, INTERPRET)
        steps = high_i[:, None] - tl.load(high_ptr + clock + earlier)[None, :]
        if LOW:
            steps += low_i[:, None] - tl.load(low_ptr + clock + earlier)[None, :]
        alike *= tl.exp2(tl.where(later[:, None] >= earlier[None, :], steps, float("-inf")))
        if COUNT:
            alike = tl.where(forgets_i[:, None] == tl.load(forgets_ptr + clock + earlier)[None, :], alike, 0.0)
        if HAS_DT:
            alike *= tl.load(dt_ptr + clock + earlier)[None, :]
        y = dot(alike, value, y, F, V, INTERPRET)
    to = y_ptr + ((row * length + begin) * heads + head) * p_size
    tl.store(to + later[:, None] * (heads * p_size) + p[None, :], y, mask=real & in_p)


@triton.jit
def _picked(
    value_ptr, write_ptr, high_ptr, low_ptr, forgets_ptr, dt_ptr, every_ptr, at_ptr, states_ptr,
    heads, per_group, chunks, picks, p_size, n_size,
    value_b, value_t, value_h, write_b, write_t, write_g,
    L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HAS_DT: tl.constexpr, COUNT: tl.constexpr,
    V: tl.constexpr, W: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    # One program: a tile of one head's state after one picked token, from the state entering its chunk.
    head, pick = tl.program_id(0) % heads, tl.program_id(0) // heads % picks
    row = (tl.program_id(0) // heads // picks).to(tl.int64)
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    at = tl.load(at_ptr + pick)
    chunk = at // L
    place = tl.arange(0, L)
    time = chunk.to(tl.int64) * L + place
    seen = time <= at
    clock = ((row * heads + head) * chunks + chunk) * L
    high, low = tl.load(high_ptr + clock + place), tl.load(low_ptr + clock + place)
    high_at, low_at = tl.load(high_ptr + clock + at % L), tl.load(low_ptr + clock + at % L)
    connected = seen
    start = tl.exp2(high_at)
    if COUNT:
        forgets_at = tl.load(forgets_ptr + clock + at % L)
        connected = connected & (tl.load(forgets_ptr + clock + place) == forgets_at)
        start = tl.where(forgets_at == 0, start, 0.0)
    weight = tl.exp2(tl.where(connected, (high_at - high) + (low_at - low), float("-inf")))
    if HAS_DT:
        weight *= tl.load(dt_ptr + clock + place)
    tile = p[:, None] * n_size + n[None, :]
    in_tile = (p < p_size)[:, None] & (n < n_size)[None, :]
    value_ptr += row * value_b + head.to(tl.int64) * value_h
    write_ptr += row * write_b + (head // per_group).to(tl.int64) * write_g
    in_p, in_n = seen[:, None] & (p < p_size)[None, :], seen[:, None] & (n < n_size)[None, :]
    value = tl.load(value_ptr + time[:, None] * value_t + p[None, :], mask=in_p, other=0.0)
    write = tl.load(write_ptr + time[:, None] * write_t + n[None, :], mask=in_n, other=0.0)
    every = every_ptr + ((row * chunks + chunk) * heads + head) * p_size * n_size
    state = tl.load(every + tile, mask=in_tile, other=0.0).to(tl.float32) * start
    state = dot(tl.trans(value.to(tl.float32) * weight[:, None]), write, state, V, W, INTERPRET)
    states_ptr += ((row * picks + pick) * heads + head) * p_size * n_size
    tl.store(states_ptr + tile, state, mask=in_tile)
