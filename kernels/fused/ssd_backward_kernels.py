"""The chunk-local parts of `ssd_backward`: gradients of values, of read and write, and of the decays.

Letters: i the token that reads, j the one that wrote, D[i, j] the decay between them, H the state entering the chunk,
G the gradient of the state leaving it. What a pair adds to the loss, to first order in its decay, is
Z[i, j] = (read_i . write_j) (dy_i . value_j) D[i, j] dt_j.
"""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from .products import dot

__all__ = ["_keys", "_rates", "_values"]


@triton.jit
def _decay(high_ptr, low_ptr, forgets_ptr, i, j, COUNT: tl.constexpr):
    """exp2 of the clock at places i minus that at places j, broadcast; 0 across a forgotten past, bounded."""
    steps = (tl.load(high_ptr + i) - tl.load(high_ptr + j)) + (tl.load(low_ptr + i) - tl.load(low_ptr + j))
    decay = tl.exp2(tl.where(steps > 64.0, 64.0, steps))
    if COUNT:
        decay = tl.where(tl.load(forgets_ptr + i) == tl.load(forgets_ptr + j), decay, 0.0)
    return decay


@triton.jit
def _start(high_ptr, forgets_ptr, i, COUNT: tl.constexpr):
    """Decay from the chunk's start to places i."""
    decay = tl.exp2(tl.load(high_ptr + i))
    if COUNT:
        decay = tl.where(tl.load(forgets_ptr + i) == 0, decay, 0.0)
    return decay


@triton.jit
def _values(
    value_ptr, write_ptr, read_ptr, dy_ptr, high_ptr, low_ptr, forgets_ptr, dt_ptr, after_ptr,
    picks_ptr, dstates_ptr, dvalue_ptr, direct_ptr, crossed_ptr,
    batch, length, heads, per_write, per_read, chunks, picks, p_size, n_size,
    value_b, value_t, value_h, write_b, write_t, write_g, read_b, read_t, read_g, dy_b, dy_t, dy_h,
    L: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    HAS_DT: tl.constexpr, COUNT: tl.constexpr, HAS_PICKS: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, V: tl.constexpr, F: tl.constexpr, Z: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    # One program: ROWS written tokens j of one head's chunk, BP channels. With E[j, i] = (write_j . read_i) D[i, j]:
    #     d value_j = dt_j (E @ dy + decay to end * write_j @ G^T)
    #     d log_decay_k gets sum_{j < k <= i} Z[i, j]: a product with ones, then a sum; never a difference of sums.
    # Readers i come in tiles of ROWS, the last first: what lies ahead of a tile crosses all of its steps.
    head, stretch = tl.program_id(0) % heads, tl.program_id(0) // heads
    part, chunk = stretch % (L // ROWS), stretch // (L // ROWS) % chunks
    row = (stretch // (L // ROWS) // chunks).to(tl.int64)
    p, n = tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, BN)
    place = tl.arange(0, ROWS)
    j = part * ROWS + place
    begin = chunk.to(tl.int64) * L
    wrote, in_p, in_n = (j < length - begin)[:, None], (p < p_size)[None, :], (n < n_size)[None, :]
    read_ptr += row * read_b + begin * read_t + (head // per_read).to(tl.int64) * read_g
    write_ptr += row * write_b + begin * write_t + (head // per_write).to(tl.int64) * write_g
    value_ptr += row * value_b + begin * value_t + head.to(tl.int64) * value_h
    dy_ptr += row * dy_b + begin * dy_t + head.to(tl.int64) * dy_h
    write_at = write_ptr + j[:, None] * write_t + n[None, :]
    line = (row * heads + head) * chunks + chunk
    high, low, forgets = high_ptr + line * L, low_ptr + line * L, forgets_ptr
    if COUNT:
        forgets += line * L
    write = tl.load(write_at, mask=wrote & in_n, other=0.0)
    value = tl.load(value_ptr + j[:, None] * value_t + p[None, :], mask=wrote & in_p, other=0.0)
    tile = p[None, :] * n_size + n[:, None]
    after = after_ptr + ((row * chunks + chunk) * heads + head) * p_size * n_size + tile
    core = _against(write_at, wrote, after, in_p, n, n_size, write, BP, BN, TILES, W, F, INTERPRET)
    core *= _decay(high, low, forgets, tl.full((1,), L - 1, tl.int32), j, COUNT)[:, None]
    if HAS_PICKS:
        for s in range(tl.load(picks_ptr + chunk), tl.load(picks_ptr + chunk + 1)):
            at = tl.load(picks_ptr + chunks + 1 + s) % L
            kept = tl.where(j <= at, _decay(high, low, forgets, tl.zeros((1,), tl.int32) + at, j, COUNT), 0.0)
            pick = row * picks + tl.load(picks_ptr + chunks + 1 + picks + s)
            upstream = dstates_ptr + (pick * heads + head) * p_size * n_size + tile
            got = _against(write_at, wrote, upstream, in_p, n, n_size, write, BP, BN, TILES, W, F, INTERPRET)
            core += got * kept[:, None]
    ones = (place[:, None] >= place[None, :]).to(tl.float32)
    ahead = tl.zeros((ROWS,), dtype=tl.float32)
    crossed_ptr += (((tl.program_id(1) * (L // ROWS) + part) * batch * heads * chunks) + line) * L
    for s in range(L // ROWS - part):
        i = (L // ROWS - 1 - s) * ROWS + place
        reads = (i < length - begin)[:, None]
        read_at = read_ptr + i[:, None] * read_t + n[None, :]
        read = tl.load(read_at, mask=reads & in_n, other=0.0)
        dy = tl.load(dy_ptr + i[:, None] * dy_t + p[None, :], mask=reads & in_p, other=0.0).to(tl.float32)
        alike = dot(write, tl.trans(read), tl.zeros((ROWS, ROWS), dtype=tl.float32), W, R, INTERPRET)
        for u in tl.static_range(1, TILES):
            more = (u * BN + n < n_size)[None, :]
            late, soon = tl.load(read_at + u * BN, reads & more, 0.0), tl.load(write_at + u * BN, wrote & more, 0.0)
            alike = dot(soon, tl.trans(late), alike, W, R, INTERPRET)
        alike = tl.where(j[:, None] <= i[None, :], alike, 0.0)
        alike *= _decay(high, low, forgets, i[None, :], j[:, None], COUNT)
        core = dot(alike, dy, core, F, F, INTERPRET)
        pair = dot(value, tl.trans(dy), tl.zeros((ROWS, ROWS), dtype=tl.float32), V, F, INTERPRET) * alike
        if HAS_DT:
            pair *= tl.load(dt_ptr + line * L + j)[:, None]
        beyond = dot(pair, ones, tl.zeros((ROWS, ROWS), dtype=tl.float32), Z, 1, INTERPRET) + ahead[:, None]
        tl.store(crossed_ptr + i, tl.sum(tl.where(j[:, None] < i[None, :], beyond, 0.0), axis=0))
        ahead += tl.sum(pair, axis=1)
    direct = direct_ptr + (tl.program_id(1) * batch * heads * chunks + line) * L
    tl.store(direct + j, tl.sum(core * value.to(tl.float32), axis=1))
    if HAS_DT:
        core *= tl.load(dt_ptr + line * L + j)[:, None]
    to = dvalue_ptr + ((row * length + begin) * heads + head) * p_size
    tl.store(to + j[:, None] * (heads * p_size) + p[None, :], core, mask=wrote & in_p)


@triton.jit
def _against(
    write_at, wrote, state_at, in_p, n, n_size, write,
    BP: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, W: tl.constexpr, F: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """write @ state^T over all of n; ``write`` is the first tile, already loaded."""
    state = tl.load(state_at, mask=(n < n_size)[:, None] & in_p, other=0.0).to(tl.float32)
    found = dot(write, state, tl.zeros((write.shape[0], BP), dtype=tl.float32), W, F, INTERPRET)
    for u in tl.static_range(1, TILES):
        more = u * BN + n < n_size
        state = tl.load(state_at + u * BN, mask=more[:, None] & in_p, other=0.0).to(tl.float32)
        found = dot(tl.load(write_at + u * BN, wrote & more[None, :], 0.0), state, found, W, F, INTERPRET)
    return found


@triton.jit
def _inner(
    one_ptr, two_ptr, p, n, p_size, n_size, P_TILES: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Sum over p and the columns n of the product of two states."""
    total = tl.zeros((BP, BN), dtype=tl.float32)
    for m in tl.static_range(P_TILES):
        q = m * BP + p
        tile, inside = q[:, None] * n_size + n[None, :], (q < p_size)[:, None] & (n < n_size)[None, :]
        one = tl.load(one_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        total += one * tl.load(two_ptr + tile, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(tl.sum(total, axis=1), axis=0)


@triton.jit
def _keys(
    mine_ptr, other_ptr, key_ptr, far_ptr, high_ptr, low_ptr, forgets_ptr, dt_ptr, state_ptr, entering_ptr,
    picks_ptr, dstates_ptr, dkey_ptr, side_ptr, met_ptr, picked_ptr,
    batch, length, heads, per_key, per_far, chunks, picks, p_size, n_size,
    mine_b, mine_t, mine_h, other_b, other_t, other_h, key_b, key_t, key_g, far_b, far_t, far_g,
    L: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, P_TILES: tl.constexpr,
    TOGETHER: tl.constexpr, HAS_DT: tl.constexpr, COUNT: tl.constexpr, HAS_PICKS: tl.constexpr, WRITE: tl.constexpr,
    M: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, F: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    # One program: ROWS tokens of a chunk, BN states, TOGETHER heads, summed over in order. Rows are readers i
    # (key = read, mine = dy, state = H) or, with WRITE, writers j (key = write, mine = value, state = G).
    #     d read_i  = sum_j (dy_i . value_j) D[i, j] dt_j write_j + decay from start * dy_i @ H
    #     d write_j = sum_i (dy_i . value_j) D[i, j] dt_j read_i  + dt_j decay to end * value_j @ G
    # The second terms, times the key, are what the token shares with H or G: side. met = sum(H * G).
    block, stretch = tl.program_id(0) % (heads // TOGETHER), tl.program_id(0) // (heads // TOGETHER)
    first = block * TOGETHER
    part, chunk = stretch % (L // ROWS), stretch // (L // ROWS) % chunks
    row = (stretch // (L // ROWS) // chunks).to(tl.int64)
    tile_n = tl.program_id(1)
    p, n = tl.arange(0, BP), tile_n * BN + tl.arange(0, BN)
    r, c = part * ROWS + tl.arange(0, ROWS), tl.arange(0, L)
    begin = chunk.to(tl.int64) * L
    in_r, in_c, in_n = (r < length - begin)[:, None], (c < length - begin)[:, None], (n < n_size)[None, :]
    key_ptr += row * key_b + begin * key_t + (first // per_key).to(tl.int64) * key_g
    far_ptr += row * far_b + begin * far_t + (first // per_far).to(tl.int64) * far_g
    mine_ptr += row * mine_b + begin * mine_t
    other_ptr += row * other_b + begin * other_t
    dkey = tl.zeros((ROWS, BN), dtype=tl.float32)
    lines = batch * heads * chunks
    # Two walks over the heads, so that neither needs all accumulators at a time.
    for k in range(TOGETHER):
        head = (first + k).to(tl.int64)
        line = (row * heads + head) * chunks + chunk
        high, low, forgets = high_ptr + line * L, low_ptr + line * L, forgets_ptr
        if COUNT:
            forgets += line * L
        offset = ((row * chunks + chunk) * heads + head) * p_size * n_size
        seen = tl.zeros((ROWS, BN), dtype=tl.float32)
        for m in tl.static_range(P_TILES):
            q = m * BP + p
            tile, in_tile = q[:, None] * n_size + n[None, :], (q < p_size)[:, None] & in_n
            mine_at = mine_ptr + head * mine_h + r[:, None] * mine_t + q[None, :]
            mine = tl.load(mine_at, mask=in_r & (q < p_size)[None, :], other=0.0)
            state = tl.load(state_ptr + offset + tile, mask=in_tile, other=0.0).to(tl.float32)
            seen = dot(mine, state, seen, M, F, INTERPRET)
        if WRITE:
            weight = _decay(high, low, forgets, tl.full((1,), L - 1, tl.int32), r, COUNT)
            if HAS_DT:
                weight *= tl.load(dt_ptr + line * L + r)
            met = _inner(state_ptr + offset, entering_ptr + offset, p, n, p_size, n_size, P_TILES, BP, BN)
            tl.store(met_ptr + tile_n * lines + line, met, mask=part == 0)
        else:
            weight = _start(high, forgets, r, COUNT)
        seen *= weight[:, None]
        # Loaded here, for every head again: kept across the walk it would not fit the registers.
        key = tl.load(key_ptr + r[:, None] * key_t + n[None, :], mask=in_r & in_n, other=0.0).to(tl.float32)
        tl.store(side_ptr + (tile_n * lines + line) * L + r, tl.sum(seen * key, axis=1))
        dkey += seen
        if HAS_PICKS and WRITE:
            for s in range(tl.load(picks_ptr + chunk), tl.load(picks_ptr + chunk + 1)):
                at = tl.load(picks_ptr + chunks + 1 + s) % L
                weight = tl.where(r <= at, _decay(high, low, forgets, tl.zeros((1,), tl.int32) + at, r, COUNT), 0.0)
                if HAS_DT:
                    weight *= tl.load(dt_ptr + line * L + r)
                pick = row * picks + tl.load(picks_ptr + chunks + 1 + picks + s)
                upstream = dstates_ptr + (pick * heads + head) * p_size * n_size
                seen = tl.zeros((ROWS, BN), dtype=tl.float32)
                for m in tl.static_range(P_TILES):
                    q = m * BP + p
                    tile, in_tile = q[:, None] * n_size + n[None, :], (q < p_size)[:, None] & in_n
                    mine_at = mine_ptr + head * mine_h + r[:, None] * mine_t + q[None, :]
                    mine = tl.load(mine_at, mask=in_r & (q < p_size)[None, :], other=0.0)
                    state = tl.load(upstream + tile, mask=in_tile, other=0.0).to(tl.float32)
                    seen = dot(mine, state, seen, M, F, INTERPRET)
                met = _inner(upstream, entering_ptr + offset, p, n, p_size, n_size, P_TILES, BP, BN)
                seen *= weight[:, None]
                # Per pick: L numbers of the tokens, then the one of the entering state.
                to = picked_ptr + (((tile_n * picks + s) * batch + row) * heads + head) * (L + 1)
                tl.store(to + r, tl.sum(seen * key, axis=1))
                tl.store(to + L, met, mask=part == 0)
                dkey += seen
    pairs = tl.zeros((ROWS, L), dtype=tl.float32)
    for k in range(TOGETHER):
        head = (first + k).to(tl.int64)
        line = (row * heads + head) * chunks + chunk
        high, low, forgets = high_ptr + line * L, low_ptr + line * L, forgets_ptr
        if COUNT:
            forgets += line * L
        pair = tl.zeros((ROWS, L), dtype=tl.float32)
        for m in tl.static_range(P_TILES):
            q = m * BP + p
            in_p = (q < p_size)[None, :]
            mine = tl.load(mine_ptr + head * mine_h + r[:, None] * mine_t + q[None, :], mask=in_r & in_p, other=0.0)
            other = tl.load(other_ptr + head * other_h + c[:, None] * other_t + q[None, :], mask=in_c & in_p, other=0.0)
            pair = dot(mine, tl.trans(other), pair, M, Q, INTERPRET)
        if WRITE:
            pair *= _decay(high, low, forgets, c[None, :], r[:, None], COUNT)
            if HAS_DT:
                pair *= tl.load(dt_ptr + line * L + r)[:, None]
        else:
            pair *= _decay(high, low, forgets, r[:, None], c[None, :], COUNT)
            if HAS_DT:
                pair *= tl.load(dt_ptr + line * L + c)[None, :]
        pairs += pair
    causal = (r[:, None] <= c[None, :]) if WRITE else (r[:, None] >= c[None, :])
    far = tl.load(far_ptr + c[:, None] * far_t + n[None, :], mask=in_c & in_n, other=0.0)
    dkey = dot(tl.where(causal, pairs, 0.0), far, dkey, F, K, INTERPRET)
    to = dkey_ptr + ((row * length + begin) * (heads // TOGETHER) + block) * n_size
    tl.store(to + r[:, None] * (heads // TOGETHER * n_size) + n[None, :], dkey, mask=in_r & in_n)


@triton.jit
def _rates(
    high_ptr, forgets_ptr, dt_ptr, a_ptr, through_ptr, direct_ptr, crossed_ptr, start_ptr, end_ptr, met_ptr,
    picks_ptr, picked_ptr, dlog_ptr, ddt_ptr, da_ptr,
    batch, length, heads, chunks, picks, a_h,
    L: tl.constexpr, ROWS: tl.constexpr, P_TILES: tl.constexpr, N_TILES: tl.constexpr,
    HAS_LOG: tl.constexpr, HAS_DT: tl.constexpr, COUNT: tl.constexpr, HAS_PICKS: tl.constexpr,
):  # fmt: skip
    # One program: one chunk of one head. Gathers what every step's decay is part of:
    #     pairs across it; sum_{i >= k} of what readers took from H; sum_{j < k} of what writers left in G; H met G.
    line = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    head = tl.program_id(0) // chunks % heads
    row = (tl.program_id(0) // chunks // heads).to(tl.int64)
    lines = batch * heads * chunks
    k = tl.arange(0, L)
    begin = chunk.to(tl.int64) * L
    real = k < length - begin
    rate = tl.zeros((L,), dtype=tl.float32)
    for m in tl.static_range(P_TILES * (L // ROWS)):
        # Writers of a later part cross none of a tile's steps, and left that tile unwritten.
        reached = k // ROWS >= m % (L // ROWS)
        rate += tl.load(crossed_ptr + (m * lines + line) * L + k, mask=reached, other=0.0)
    through = tl.load(through_ptr + line)
    for m in tl.static_range(N_TILES):
        start = tl.load(start_ptr + (m * lines + line) * L + k)
        # Those before k: the sums are shifted by one, nothing is subtracted again.
        end = tl.load(end_ptr + (m * lines + line) * L + k - 1, mask=k > 0, other=0.0)
        rate += tl.cumsum(start, axis=0, reverse=True) + tl.cumsum(end, axis=0)
        rate += through * tl.load(met_ptr + m * lines + line)
        if HAS_PICKS:
            for s in range(tl.load(picks_ptr + chunk), tl.load(picks_ptr + chunk + 1)):
                at = tl.load(picks_ptr + chunks + 1 + s) % L
                seen = picked_ptr + (((m * picks + s) * batch + row) * heads + head) * (L + 1)
                left = tl.load(seen + k - 1, mask=k > 0, other=0.0)
                kept = tl.exp2(tl.load(high_ptr + line * L + at))
                if COUNT:
                    kept = tl.where(tl.load(forgets_ptr + line * L + at) == 0, kept, 0.0)
                rate += tl.where(k <= at, tl.cumsum(left, axis=0) + kept * tl.load(seen + L), 0.0)
    to = (row * length + begin + k) * heads + head
    if HAS_DT:
        ddt = tl.zeros((L,), dtype=tl.float32)
        for m in tl.static_range(P_TILES):
            ddt += tl.load(direct_ptr + (m * lines + line) * L + k)
        if not HAS_LOG:
            ddt += rate * tl.load(a_ptr + head * a_h).to(tl.float32)
            dt = tl.load(dt_ptr + line * L + k)
            tl.store(da_ptr + (row * chunks + chunk) * heads + head, tl.sum(tl.where(real, rate * dt, 0.0), axis=0))
        tl.store(ddt_ptr + to, ddt, mask=real)
    if HAS_LOG:
        tl.store(dlog_ptr + to, rate, mask=real)
