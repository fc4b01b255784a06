"""Triton kernels of `walk_backward`: the adjoint of the diagonal walk, segments of time side by side.

Every kernel works on a block of heads, laid out in registers as `walk_backward_tiles` says.
"""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from .walk_backward_tiles import (
    LN_2,
    LOG_HEAD,
    LOG_STATE,
    RATE_HEAD,
    RATE_STATE,
    decay_of,
    exists,
    heads_of,
    injected,
    kept,
    over_heads,
    over_states,
    places,
    rates_of,
    states_of,
    take,
    take_each,
)

__all__ = ["add_up", "carry", "local_ends", "walk_back"]


@triton.jit(do_not_specialize=["one", "n_segments", "per_segment"])
def local_ends(
    dt_ptr, a_ptr, log_ptr, read_ptr, dy_ptr, reset_ptr, ds_ptr, slot_ptr, ends_ptr, decays_ptr,
    one, length, n_segments, per_segment,
    dt_b, dt_h, a_h, a_n, log_b, log_h, log_n, read_b, read_g, read_n, dy_b, dy_h, reset_b, ds_b, ds_k, ds_h, ds_n,
    dt_t: tl.constexpr, log_t: tl.constexpr, read_t: tl.constexpr, dy_t: tl.constexpr, reset_t: tl.constexpr,
    H: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr, BLOCKS: tl.constexpr, READ_HEADS: tl.constexpr,
    KIND: tl.constexpr, RESET: tl.constexpr, PICKS: tl.constexpr, DY: tl.constexpr, FULL: tl.constexpr,
    K: tl.constexpr, J: tl.constexpr, M: tl.constexpr, D: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """What leaves each segment through its start when nothing enters its end, and the decay across the segment."""
    block, segment, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = states_of(one, M, D, L)
    heads, live, both = heads_of(block, one, n, N, UNIT, BLOCKS, D, L, J)
    rates = rates_of(a_ptr, a_h, a_n, heads, live, n, N, J, KIND)
    stop = tl.minimum((segment + 1) * per_segment, (length + K - 1) // K * K)
    begin = segment * per_segment
    # Addresses of the K steps that end the segment; they move back by K steps.
    last = (stop - K).to(tl.int64)
    if KIND <= RATE_STATE:
        step_places = places(dt_ptr + b * dt_b + last * dt_t, dt_h, 0, heads, 0, J)
    elif KIND == LOG_HEAD:
        step_places = places(log_ptr + b * log_b + last * log_t, log_h, 0, heads, 0, J)
    else:
        step_places = places(log_ptr + b * log_b + last * log_t, log_h, log_n, heads, n, J)
    STEP: tl.constexpr = dt_t if KIND <= RATE_STATE else log_t
    step_live = both if KIND == LOG_STATE else live
    if DY:
        dy_places = places(dy_ptr + b * dy_b + last * dy_t, dy_h, 0, heads, 0, J)
        group = ((block // BLOCKS) * UNIT // READ_HEADS).to(tl.int64)
        read_place = read_ptr + b * read_b + group * read_g + last * read_t + n * read_n
    q, total = (), ()
    for _ in tl.static_range(J):
        q += (tl.zeros((L, D, M), dtype=tl.float32),)
        if KIND == LOG_STATE:
            total += (tl.zeros((L, D, M), dtype=tl.float32),)
        else:
            total += (tl.zeros((L, D, 1), dtype=tl.float32),)
    keeps = tl.full((1, 1, 1), 1.0, dtype=tl.float32)
    for i in range((stop - begin) // K):
        back = (last - (stop - (i + 1) * K)).to(tl.int64)
        for u in tl.static_range(K - 1, -1, -1):
            t = stop - (i + 1) * K + u
            on = exists(t, length, FULL)
            steps = take_each(step_places, (u - back) * STEP, step_live, on, J, FULL)
            keep = 1.0
            if RESET:
                keep = kept(reset_ptr + b * reset_b + t.to(tl.int64) * reset_t, on)
                keeps *= keep
            if PICKS:
                q = injected(q, ds_ptr + b * ds_b, ds_k, ds_h, ds_n, slot_ptr, t, heads, both, n, on, J, PICKS)
            if DY:
                dy = take_each(dy_places, (u - back) * dy_t, live, on, J, FULL)
                read = take(read_place + (u - back) * read_t, (n < N) & on, FULL)
            now, sums = (), ()
            for j in tl.static_range(J):
                a = decay_of(steps[j], rates[j], keep, RESET)
                if DY:
                    now += (a * (q[j] + dy[j] * read),)
                else:
                    now += (a * q[j],)
                sums += (total[j] + steps[j],)
            q, total = now, sums
    for j in tl.static_range(J):
        at = ((b * n_segments + segment) * H + heads[j]) * N + n
        tl.store(ends_ptr + at, q[j], mask=both[j])
        tl.store(decays_ptr + at, tl.exp2(total[j] * rates[j]) * keeps, mask=both[j])


@triton.jit
def carry(ends_ptr, decays_ptr, final_ptr, n_segments, size, FINAL: tl.constexpr, BLOCK: tl.constexpr):
    """Turns what leaves each segment into what enters its end, in place, from the last segment to the first."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1).to(tl.int64)
    inside = at < size
    q = tl.zeros((BLOCK,), dtype=tl.float32)
    if FINAL:
        q = tl.load(final_ptr + b * size + at, mask=inside, other=0.0).to(tl.float32)
    for i in range(n_segments):
        here = (b * n_segments + n_segments - 1 - i) * size + at
        end = tl.load(ends_ptr + here, mask=inside, other=0.0)
        decay = tl.load(decays_ptr + here, mask=inside, other=0.0)
        tl.store(ends_ptr + here, q, mask=inside)
        q = end + decay * q


@triton.jit
def _step(
    state, value_places, dt_places, log_places, write_place, reset_ptr, u, t, rates, live, both, inside, length,
    value_t: tl.constexpr, dt_t: tl.constexpr, log_t: tl.constexpr, write_t: tl.constexpr, reset_t: tl.constexpr,
    KIND: tl.constexpr, DT: tl.constexpr, RESET: tl.constexpr, FULL: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """The states after step t, from those before it, and what the step is made of; u is its offset from `spots`."""
    on = exists(t, length, FULL)
    value = take_each(value_places, u * value_t, live, on, J, FULL)
    write = take(write_place + u * write_t, inside & on, FULL)
    dt = value
    if DT:
        dt = take_each(dt_places, u * dt_t, live, on, J, FULL)
    log = dt
    if KIND == LOG_HEAD:
        log = take_each(log_places, u * log_t, live, on, J, FULL)
    if KIND == LOG_STATE:
        log = take_each(log_places, u * log_t, both, on, J, FULL)
    keep = 1.0
    if RESET:
        keep = kept(reset_ptr + t.to(tl.int64) * reset_t, on)
    out = ()
    for j in tl.static_range(J):
        source = value[j]
        if DT:
            source *= dt[j]
        out += (decay_of(log[j], rates[j], keep, RESET) * state[j] + source * write,)
    return out, value, dt, log, write, keep


@triton.jit(do_not_specialize=["one", "n_segments", "per_segment"])
def walk_back(
    value_ptr, dt_ptr, a_ptr, log_ptr, write_ptr, read_ptr, dy_ptr, reset_ptr, ds_ptr, slot_ptr,
    initial_ptr, bounds_ptr, enter_ptr,
    dvalue_ptr, ddt_ptr, da_ptr, dlog_ptr, dwrite_ptr, dread_ptr, dinitial_ptr,
    one, length, n_segments, per_segment, n_bounds,
    value_b, value_h, dt_b, dt_h, a_h, a_n, log_b, log_h, log_n,
    write_b, write_g, write_n, read_b, read_g, read_n, dy_b, dy_h, reset_b, ds_b, ds_k, ds_h, ds_n,
    value_t: tl.constexpr, dt_t: tl.constexpr, log_t: tl.constexpr, write_t: tl.constexpr, read_t: tl.constexpr,
    dy_t: tl.constexpr, reset_t: tl.constexpr,
    H: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr, BLOCKS: tl.constexpr,
    WRITE_HEADS: tl.constexpr, READ_HEADS: tl.constexpr,
    KIND: tl.constexpr, DT: tl.constexpr, RESET: tl.constexpr, PICKS: tl.constexpr, DY: tl.constexpr,
    INITIAL: tl.constexpr, ENTER: tl.constexpr, FULL: tl.constexpr, HOLD: tl.constexpr,
    EACH: tl.constexpr, K: tl.constexpr,
    J: tl.constexpr, M: tl.constexpr, D: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """All gradients of one segment: K steps forward with their states in registers, the same steps back, and so on.

    States come from memory before every EACH steps (a multiple of K). With HOLD the inputs of the K steps stay in
    registers too; without, they are read again.
    """
    block, segment, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = states_of(one, M, D, L)
    heads, live, both = heads_of(block, one, n, N, UNIT, BLOCKS, D, L, J)
    inside = n < N
    first_lane = (tl.arange(0, L) == 0)[:, None, None]
    first_head = inside & (tl.arange(0, D) == 0)[None, :, None]
    first = (block // BLOCKS) * UNIT
    rates = rates_of(a_ptr, a_h, a_n, heads, live, n, N, J, KIND)
    q, da = (), ()
    for j in tl.static_range(J):
        if ENTER:
            entry = enter_ptr + ((b * n_segments + segment) * H + heads[j]) * N + n
            q += (tl.load(entry, mask=both[j], other=0.0).to(tl.float32),)
        else:
            q += (tl.zeros((L, D, M), dtype=tl.float32),)
        if KIND == RATE_STATE:
            da += (tl.zeros((L, D, M), dtype=tl.float32),)
        else:
            da += (tl.zeros((L, D, 1), dtype=tl.float32),)
    if RESET:
        reset_ptr += b * reset_b
    stop = tl.minimum((segment + 1) * per_segment, (length + K - 1) // K * K)
    for i in range((stop - segment * per_segment) // K):
        start = stop - (i + 1) * K
        far = start.to(tl.int64)
        value_places = places(value_ptr + b * value_b + far * value_t, value_h, 0, heads, 0, J)
        write_place = (
            write_ptr + b * write_b + (first // WRITE_HEADS).to(tl.int64) * write_g + far * write_t + n * write_n
        )
        dt_places = value_places
        if DT:
            dt_places = places(dt_ptr + b * dt_b + far * dt_t, dt_h, 0, heads, 0, J)
        log_places = value_places
        if KIND == LOG_HEAD:
            log_places = places(log_ptr + b * log_b + far * log_t, log_h, 0, heads, 0, J)
        if KIND == LOG_STATE:
            log_places = places(log_ptr + b * log_b + far * log_t, log_h, log_n, heads, n, J)
        if DY:
            dy_places = places(dy_ptr + b * dy_b + far * dy_t, dy_h, 0, heads, 0, J)
            read_place = read_ptr + b * read_b + (first // READ_HEADS).to(tl.int64) * read_g + far * read_t + n * read_n
        # The state before step `start`: from memory, then forward to it where EACH is several K.
        state = ()
        bound = start // EACH
        for j in tl.static_range(J):
            at = ((b * n_bounds + bound - 1) * H + heads[j]) * N + n
            found = tl.load(bounds_ptr + at, mask=both[j] & (bound > 0), other=0.0).to(tl.float32)
            if INITIAL:
                at = (b * H + heads[j]) * N + n
                found += tl.load(initial_ptr + at, mask=both[j] & (bound == 0), other=0.0).to(tl.float32)
            state += (found,)
        if EACH > K:
            for again in range(start - bound * EACH):
                t = bound * EACH + again
                state, _, _, _, _, _ = _step(
                    state, value_places, dt_places, log_places, write_place, reset_ptr, (t - start).to(tl.int64), t,
                    rates, live, both, inside, length, value_t, dt_t, log_t, write_t, reset_t,
                    KIND, DT, RESET, FULL, J,
                )  # fmt: skip
        states = (state,)
        held = ()
        for u in tl.static_range(K):
            state, value, dt, log, write, keep = _step(
                state, value_places, dt_places, log_places, write_place, reset_ptr, u, start + u,
                rates, live, both, inside, length, value_t, dt_t, log_t, write_t, reset_t,
                KIND, DT, RESET, FULL, J,
            )  # fmt: skip
            states += (state,)
            if HOLD:
                held += ((value, dt, log, write, keep),)
        for u in tl.static_range(K - 1, -1, -1):
            t = start + u
            on = exists(t, length, FULL)
            if HOLD:
                value, dt, log, write, keep = held[u]
            else:
                _, value, dt, log, write, keep = _step(
                    state, value_places, dt_places, log_places, write_place, reset_ptr, u, t,
                    rates, live, both, inside, length, value_t, dt_t, log_t, write_t, reset_t,
                    KIND, DT, RESET, FULL, J,
                )  # fmt: skip
            if PICKS:
                q = injected(q, ds_ptr + b * ds_b, ds_k, ds_h, ds_n, slot_ptr, t, heads, both, n, on, J, PICKS)
            dread = tl.zeros((L, D, M), dtype=tl.float32)
            if DY:
                dy = take_each(dy_places, u * dy_t, live, on, J, FULL)
                read = take(read_place + u * read_t, inside & on, FULL)
                now = ()
                for j in tl.static_range(J):
                    dread += dy[j] * states[u + 1][j]
                    now += (q[j] + dy[j] * read,)
                q = now
            dwrite = tl.zeros((L, D, M), dtype=tl.float32)
            now, sums = (), ()
            row = (b * length + far) * H + u * H
            for j in tl.static_range(J):
                source = value[j]
                if DT:
                    source *= dt[j]
                dwrite += source * q[j]
                dsource = over_states(q[j] * write)
                q_before = decay_of(log[j], rates[j], keep, RESET) * q[j]
                # d loss / d log-decay; 0 wherever the decay is.
                slope = q_before * states[u][j]
                present = live[j] & on & first_lane
                if KIND == RATE_STATE:
                    ddt = LN_2 * over_states(slope * rates[j])
                    sums += (da[j] + slope * dt[j],)
                elif KIND == LOG_STATE:
                    tl.store(dlog_ptr + (row + heads[j]) * N + n, slope, mask=both[j] & on)
                    ddt = 0.0
                    sums += (da[j],)
                else:
                    slope = over_states(slope)
                    ddt = 0.0
                    if KIND == RATE_HEAD:
                        ddt = LN_2 * rates[j] * slope
                        sums += (da[j] + slope * dt[j],)
                    else:
                        tl.store(dlog_ptr + row + heads[j], slope, mask=present)
                        sums += (da[j],)
                if DT:
                    tl.store(ddt_ptr + row + heads[j], ddt + dsource * value[j], mask=present)
                    dsource *= dt[j]
                tl.store(dvalue_ptr + row + heads[j], dsource, mask=present)
                now += (q_before,)
            q, da = now, sums
            at = ((b * tl.num_programs(0) + block) * length + far) * N + u * N + n
            tl.store(dwrite_ptr + at, over_heads(dwrite), mask=first_head & on)
            if DY:
                tl.store(dread_ptr + at, over_heads(dread), mask=first_head & on)
    for j in tl.static_range(J):
        if KIND == RATE_STATE:
            at = da_ptr + ((b * n_segments + segment) * H + heads[j]) * N + n
            tl.store(at, da[j], mask=both[j])
        elif KIND == RATE_HEAD:
            at = da_ptr + (b * n_segments + segment) * H + heads[j]
            tl.store(at, da[j], mask=live[j] & first_lane)
        if INITIAL:
            at = dinitial_ptr + (b * H + heads[j]) * N + n
            tl.store(at, q[j], mask=both[j] & (segment == 0))


@triton.jit
def add_up(parts_ptr, out_ptr, count, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(outer, count, size) summed over its middle axis, always in the same order."""
    across = tl.cdiv(size, BLOCK)
    at = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    outer = (tl.program_id(0) // across).to(tl.int64)
    inside = at < size
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for i in range(0, count, ROWS):
        part = i + tl.arange(0, ROWS)
        where = (outer * count + part[:, None]) * size + at[None, :]
        total += tl.load(parts_ptr + where, mask=(part < count)[:, None] & inside[None, :], other=0.0)
    tl.store(out_ptr + outer * size + at, tl.sum(total, axis=0), mask=inside)
