"""Triton kernels of `walk_backward`: the adjoint of the diagonal walk, segments of time side by side.

Every kernel works on a block of heads. One thread holds the states of a few heads and a few entries of n: tensors are
(L, D, M), with D heads and L states spread over threads and M states in the thread, and J of them, in tuples, for J
times as many heads. The shape decides where sums happen: over M and J in registers, over L and D by shuffles.
Triton gives the last axes of a tensor to threads and the first ones to registers, which is all this relies on.
"""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math

import triton
import triton.language as tl

__all__ = ["add_up", "carry", "local_ends", "walk_back"]

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
# The lowest rate that is finite in base 2 too: a finite rate times a step of 0 is 0.
LOWEST = tl.constexpr(-2.3586e38)

# How the decay is given: `dt * A` or a log-decay, one per head or one per state.
RATE_HEAD = tl.constexpr(0)
RATE_STATE = tl.constexpr(1)
LOG_HEAD = tl.constexpr(2)
LOG_STATE = tl.constexpr(3)

# Gradients of states that were handed out: none, at times found through a table, at every time.
SOME = tl.constexpr(1)
EVERY = tl.constexpr(2)


@triton.jit
def _heads(
    block, one, n, N: tl.constexpr, UNIT: tl.constexpr, BLOCKS: tl.constexpr,
    D: tl.constexpr, L: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """The heads of a block, J tensors (L, D, 1), which of them exist, and which of their states (L, D, M).

    A block stays inside its unit of heads.
    """
    first = (block % BLOCKS) * (J * D)
    heads, live, both = (), (), ()
    for j in tl.static_range(J):
        inside = first + (j * D + tl.arange(0, D)[None, :, None] + tl.zeros((L, 1, 1), dtype=tl.int32)) * one
        heads += ((block // BLOCKS) * UNIT + inside,)
        live += (inside < UNIT,)
        both += ((inside < UNIT) & (n < N),)
    return heads, live, both


@triton.jit
def _states(one, M: tl.constexpr, D: tl.constexpr, L: tl.constexpr):
    """The entries of n that a thread holds, (L, D, M)."""
    n = tl.arange(0, M)[None, None, :] * L + tl.arange(0, L)[:, None, None]
    return (n + tl.zeros((L, D, 1), dtype=tl.int32)) * one


@triton.jit
def _places(pointer, stride_h, stride_n, heads, n, J: tl.constexpr):
    """J tensors of addresses (L, D, M): one step of something per head and state; (L, D, 1) where n is 0."""
    out = ()
    for j in tl.static_range(J):
        out += (pointer + heads[j].to(tl.int64) * stride_h + n * stride_n,)
    return out


@triton.jit
def _exists(t, length, FULL: tl.constexpr):
    """Whether there is a step t; one answer for the whole walk where all do."""
    if FULL:
        return length > 0
    return t < length


@triton.jit
def _take(place, mask, FULL: tl.constexpr):
    """What is there in float32, and zero outside of the mask; FULL says that nothing is outside."""
    if FULL:
        return tl.load(place).to(tl.float32)
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _each(places, offset, live, on, J: tl.constexpr, FULL: tl.constexpr):
    """The J tensors of one step at `places`, moved on by `offset`."""
    out = ()
    for j in tl.static_range(J):
        out += (_take(places[j] + offset, live[j] & on, FULL),)
    return out


@triton.jit
def _rates(a_ptr, a_h, a_n, heads, live, n, N: tl.constexpr, J: tl.constexpr, KIND: tl.constexpr):
    """Decay rates in base 2: per head (L, D, 1) or per state; those of a log-decay are one constant."""
    out = ()
    for j in tl.static_range(J):
        if KIND == RATE_STATE:
            at = a_ptr + heads[j] * a_h + n * a_n
            rate = tl.load(at, mask=live[j] & (n < N), other=0.0).to(tl.float32)
            out += (tl.maximum(rate, LOWEST) * LOG2_E,)
        elif KIND == RATE_HEAD:
            rate = tl.load(a_ptr + heads[j] * a_h, mask=live[j], other=0.0).to(tl.float32)
            out += (tl.maximum(rate, LOWEST) * LOG2_E,)
        else:
            out += (LOG2_E,)
    return out


@triton.jit
def _decay(step, rate, keep, RESET: tl.constexpr):
    """exp of a log-decay. -inf gives 0, and a reset is no number of the exponent."""
    a = tl.exp2(step * rate)
    if RESET:
        a *= keep
    return a


@triton.jit
def _kept(reset_ptr, on):
    return tl.where(tl.load(reset_ptr, mask=on, other=0) != 0, 0.0, 1.0)


@triton.jit
def _injected(
    q, ds_ptr, ds_k, ds_h, ds_n, slot_ptr, t, heads, live, n, on, J: tl.constexpr, PICKS: tl.constexpr
):  # fmt: skip
    """Adds the gradient of the state that was handed out after step t, if one was."""
    slot = t
    if PICKS == SOME:
        slot = tl.load(slot_ptr + t, mask=on, other=-1)
    places = _places(ds_ptr + slot.to(tl.int64) * ds_k, ds_h, ds_n, heads, n, J)
    out = ()
    for j in tl.static_range(J):
        out += (q[j] + _take(places[j], live[j] & on & (slot >= 0), False),)
    return out


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
    n = _states(one, M, D, L)
    heads, live, both = _heads(block, one, n, N, UNIT, BLOCKS, D, L, J)
    rates = _rates(a_ptr, a_h, a_n, heads, live, n, N, J, KIND)
    stop = tl.minimum((segment + 1) * per_segment, (length + K - 1) // K * K)
    begin = segment * per_segment
    # Addresses of the K steps that end the segment; they move back by K steps.
    last = (stop - K).to(tl.int64)
    if KIND <= RATE_STATE:
        step_places = _places(dt_ptr + b * dt_b + last * dt_t, dt_h, 0, heads, 0, J)
    elif KIND == LOG_HEAD:
        step_places = _places(log_ptr + b * log_b + last * log_t, log_h, 0, heads, 0, J)
    else:
        step_places = _places(log_ptr + b * log_b + last * log_t, log_h, log_n, heads, n, J)
    STEP: tl.constexpr = dt_t if KIND <= RATE_STATE else log_t
    step_live = both if KIND == LOG_STATE else live
    if DY:
        dy_places = _places(dy_ptr + b * dy_b + last * dy_t, dy_h, 0, heads, 0, J)
        group = (block // BLOCKS) * UNIT // READ_HEADS
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
            on = _exists(t, length, FULL)
            steps = _each(step_places, (u - back) * STEP, step_live, on, J, FULL)
            keep = 1.0
            if RESET:
                keep = _kept(reset_ptr + b * reset_b + t.to(tl.int64) * reset_t, on)
                keeps *= keep
            if PICKS:
                q = _injected(q, ds_ptr + b * ds_b, ds_k, ds_h, ds_n, slot_ptr, t, heads, both, n, on, J, PICKS)
            if DY:
                dy = _each(dy_places, (u - back) * dy_t, live, on, J, FULL)
                read = _take(read_place + (u - back) * read_t, (n < N) & on, FULL)
            now, sums = (), ()
            for j in tl.static_range(J):
                a = _decay(steps[j], rates[j], keep, RESET)
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
    """The states after step t, from those before it, and what the step is made of; u is its offset from `places`."""
    on = _exists(t, length, FULL)
    value = _each(value_places, u * value_t, live, on, J, FULL)
    write = _take(write_place + u * write_t, inside & on, FULL)
    dt = value
    if DT:
        dt = _each(dt_places, u * dt_t, live, on, J, FULL)
    log = dt
    if KIND == LOG_HEAD:
        log = _each(log_places, u * log_t, live, on, J, FULL)
    if KIND == LOG_STATE:
        log = _each(log_places, u * log_t, both, on, J, FULL)
    keep = 1.0
    if RESET:
        keep = _kept(reset_ptr + t.to(tl.int64) * reset_t, on)
    out = ()
    for j in tl.static_range(J):
        source = value[j]
        if DT:
            source *= dt[j]
        out += (_decay(log[j], rates[j], keep, RESET) * state[j] + source * write,)
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
    n = _states(one, M, D, L)
    heads, live, both = _heads(block, one, n, N, UNIT, BLOCKS, D, L, J)
    inside = n < N
    first_lane = (tl.arange(0, L) == 0)[:, None, None]
    first_head = inside & (tl.arange(0, D) == 0)[None, :, None]
    first = (block // BLOCKS) * UNIT
    rates = _rates(a_ptr, a_h, a_n, heads, live, n, N, J, KIND)
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
        value_places = _places(value_ptr + b * value_b + far * value_t, value_h, 0, heads, 0, J)
        write_place = write_ptr + b * write_b + first // WRITE_HEADS * write_g + far * write_t + n * write_n
        dt_places = value_places
        if DT:
            dt_places = _places(dt_ptr + b * dt_b + far * dt_t, dt_h, 0, heads, 0, J)
        log_places = value_places
        if KIND == LOG_HEAD:
            log_places = _places(log_ptr + b * log_b + far * log_t, log_h, 0, heads, 0, J)
        if KIND == LOG_STATE:
            log_places = _places(log_ptr + b * log_b + far * log_t, log_h, log_n, heads, n, J)
        if DY:
            dy_places = _places(dy_ptr + b * dy_b + far * dy_t, dy_h, 0, heads, 0, J)
            read_place = read_ptr + b * read_b + first // READ_HEADS * read_g + far * read_t + n * read_n
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
            on = _exists(t, length, FULL)
            if HOLD:
                value, dt, log, write, keep = held[u]
            else:
                _, value, dt, log, write, keep = _step(
                    state, value_places, dt_places, log_places, write_place, reset_ptr, u, t,
                    rates, live, both, inside, length, value_t, dt_t, log_t, write_t, reset_t,
                    KIND, DT, RESET, FULL, J,
                )  # fmt: skip
            if PICKS:
                q = _injected(q, ds_ptr + b * ds_b, ds_k, ds_h, ds_n, slot_ptr, t, heads, both, n, on, J, PICKS)
            dread = tl.zeros((L, D, M), dtype=tl.float32)
            if DY:
                dy = _each(dy_places, u * dy_t, live, on, J, FULL)
                read = _take(read_place + u * read_t, inside & on, FULL)
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
                dsource = _over_states(q[j] * write)
                q_before = _decay(log[j], rates[j], keep, RESET) * q[j]
                # d loss / d log-decay; 0 wherever the decay is.
                slope = q_before * states[u][j]
                exists = live[j] & on & first_lane
                if KIND == RATE_STATE:
                    ddt = LN_2 * _over_states(slope * rates[j])
                    sums += (da[j] + slope * dt[j],)
                elif KIND == LOG_STATE:
                    tl.store(dlog_ptr + (row + heads[j]) * N + n, slope, mask=both[j] & on)
                    ddt = 0.0
                    sums += (da[j],)
                else:
                    slope = _over_states(slope)
                    ddt = 0.0
                    if KIND == RATE_HEAD:
                        ddt = LN_2 * rates[j] * slope
                        sums += (da[j] + slope * dt[j],)
                    else:
                        tl.store(dlog_ptr + row + heads[j], slope, mask=exists)
                        sums += (da[j],)
                if DT:
                    tl.store(ddt_ptr + row + heads[j], ddt + dsource * value[j], mask=exists)
                    dsource *= dt[j]
                tl.store(dvalue_ptr + row + heads[j], dsource, mask=exists)
                now += (q_before,)
            q, da = now, sums
            at = ((b * tl.num_programs(0) + block) * length + far) * N + u * N + n
            tl.store(dwrite_ptr + at, _over_heads(dwrite), mask=first_head & on)
            if DY:
                tl.store(dread_ptr + at, _over_heads(dread), mask=first_head & on)
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
def _over_states(x):
    """(L, D, M) summed over its states: in the thread, then between threads, each of which holds the sum."""
    x = tl.sum(x, axis=2, keep_dims=True)
    return tl.broadcast_to(tl.sum(x, axis=0, keep_dims=True), x.shape)


@triton.jit
def _over_heads(x):
    """(L, D, M) summed over its heads; every thread holds the sum."""
    return tl.broadcast_to(tl.sum(x, axis=1, keep_dims=True), x.shape)


@triton.jit
def add_up(parts_ptr, out_ptr, count, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(outer, count, size) summed over its middle axis, always in the same order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    outer = tl.program_id(1).to(tl.int64)
    inside = at < size
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for i in range(0, count, ROWS):
        part = i + tl.arange(0, ROWS)
        where = (outer * count + part[:, None]) * size + at[None, :]
        total += tl.load(parts_ptr + where, mask=(part < count)[:, None] & inside[None, :], other=0.0)
    tl.store(out_ptr + outer * size + at, tl.sum(total, axis=0), mask=inside)
