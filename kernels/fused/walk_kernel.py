"""The Triton kernel of the sequential walk: states of a block of rows in registers, tokens one after the other.

Rows are channels, ``r = h * p + c``; a program owns H of them and all n states, a tile (H, N). One token is

    state = exp2(rate) * state + (value * dt) x write          y = sum over n of state * read

A walk is a chain, so the only thing that can be slow is waiting: a load takes 500 ns, a token 30. A token's pieces are
therefore loaded U tokens before they are needed and wait in registers, in the tuple ``queue``. The compiler could not
do that on its own, because it may not move a load above a store. Loads have no masks in time, which would cost an
instruction each: the window of U tokens that is loaded last is shifted back to end with the sequence, and tokens that
it repeats are the identity (decay 1, nothing written).
"""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False
# A queue starts as the empty tuple and grows.
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from .walk_token import ENDS, EVERY, LOG2_E, RESUME, WHOLE, fetch, token

__all__ = ["walk_kernel"]

LOWEST = tl.constexpr(-2.3e38)  # times LOG2_E it is still finite


@triton.jit
def walk_kernel(
    x_ptr, dt_ptr, a_ptr, log_ptr, write_ptr, read_ptr, seen_ptr, cut_ptr, reset_ptr, initial_ptr,
    bias_ptr, skip_ptr, gate_ptr, slot_ptr,
    y_ptr, final_ptr, states_ptr, norm_ptr, kept_ptr, end_ptr, decay_ptr,
    x_b, x_h, x_p, dt_b, dt_h, a_h, a_n, log_b, log_h, log_n,
    write_b, write_g, write_n, read_b, read_g, read_n, seen_b, seen_g, seen_n, cut_b, cut_g, cut_n,
    reset_b, initial_b, initial_h, initial_p, initial_n, bias_h, skip_h, gate_b, gate_h,
    length, segments, per_segment, picks, every, write_rows, read_rows, seen_rows, cut_rows,
    F: tl.constexpr,
):  # fmt: skip
    """``F`` is a `walk_token.Cut`. ``X_b`` and the like are strides, ``X_rows`` the rows of a group; tokens per_segment
    is a multiple of U; ``picks`` states are handed out; buffers ending in _ptr from y on are contiguous."""
    H: tl.constexpr = F.H
    N: tl.constexpr = F.N
    U: tl.constexpr = F.U
    block = tl.program_id(0)
    parts = segments
    if F.PASS == ENDS:
        parts = segments - 1  # nobody waits for the end of the last one
    batch = (tl.program_id(1) // parts).to(tl.int64)
    segment = tl.program_id(1) % parts

    row = block * H + tl.arange(0, H)
    lane = tl.arange(0, N)
    inside = row < F.rows
    inside_n = (lane < F.n)[None, :]
    tile_mask = inside[:, None] & inside_n
    by_head = block * H + tl.arange(0, F.HEADS)
    by_writer = block * H + tl.arange(0, F.WRITES)
    by_reader = block * H + tl.arange(0, F.READS)
    by_eraser = block * H + tl.arange(0, F.ERASES)
    head = by_head // F.P
    inside_h = by_head < F.rows
    inside_hn = inside_h[:, None] & inside_n
    masks = (
        inside, inside_h, inside_hn, (by_writer < F.rows)[:, None] & inside_n,
        (by_reader < F.rows)[:, None] & inside_n, (by_eraser < F.rows)[:, None] & inside_n,
    )  # fmt: skip
    tile = row[:, None] * F.n + lane[None, :]  # of anything (rows, n) that is contiguous
    size = tl.full((), F.n, tl.int64) * F.rows  # numbers in the states of one token

    first = segment * per_segment
    last = tl.minimum(first + per_segment, length)
    window = tl.minimum(first, length - U)  # start of the U tokens that wait in the queue
    begin = window.to(tl.int64)
    # 64 bits, because the stride of a channel is all of time where channels come before time in memory.
    own = (row // F.P).to(tl.int64)
    head = head.to(tl.int64)
    writer = (by_writer // write_rows).to(tl.int64)[:, None]
    reader = (by_reader // read_rows).to(tl.int64)[:, None]
    lanes = lane.to(tl.int64)[None, :]
    seen_row = (by_eraser // seen_rows).to(tl.int64)[:, None]
    cut_row = (by_eraser // cut_rows).to(tl.int64)[:, None]
    at = (
        x_ptr + (batch * x_b + begin * F.x_t) + own * x_h + (row % F.P).to(tl.int64) * x_p,
        dt_ptr + (batch * dt_b + begin * F.dt_t) + head * dt_h,
        log_ptr + (batch * log_b + begin * F.log_t) + head * log_h,
        write_ptr + (batch * write_b + begin * F.write_t) + writer * write_g + lanes * write_n,
        read_ptr + (batch * read_b + begin * F.read_t) + reader * read_g + lanes * read_n,
        seen_ptr + (batch * seen_b + begin * F.seen_t) + seen_row * seen_g + lanes * seen_n,
        cut_ptr + (batch * cut_b + begin * F.cut_t) + cut_row * cut_g + lanes * cut_n,
        gate_ptr + (batch * gate_b + begin * F.gate_t) + own * gate_h,
        reset_ptr + batch * reset_b + begin * F.reset_t,
        slot_ptr + begin,
    )  # fmt: skip
    if F.PER_STATE and not F.FACTORED:
        at = at[:2] + (at[2][:, None] + lanes * log_n,) + at[3:]

    # What does not change with time.
    a = tl.zeros((1, 1), tl.float32)
    bias = tl.zeros((1,), tl.float32)
    skip = tl.zeros((1,), tl.float32)
    if F.FACTORED:
        if F.PER_STATE:
            a = tl.load(a_ptr + head[:, None] * a_h + lane[None, :] * a_n, mask=inside_hn, other=0.0)
        else:
            a = tl.load(a_ptr + head * a_h, mask=inside_h, other=0.0)[:, None]
        a = a.to(tl.float32)
        # Finite, because 0 * inf is NaN; a NaN stays, which a maximum on a GPU would drop.
        a = tl.where(a < LOWEST, LOWEST, a) * LOG2_E
    if F.BIAS:
        bias = tl.load(bias_ptr + head * bias_h, mask=inside_h, other=0.0).to(tl.float32)
    if F.SKIP:
        skip = tl.load(skip_ptr + row * skip_h, mask=inside, other=0.0).to(tl.float32)
    fixed = (a, bias, skip)
    outputs = (y_ptr, norm_ptr, kept_ptr, states_ptr)
    stored = (inside, tile_mask)
    listed_at = batch * picks * size + tile

    # Zeros, but loaded: the compiler lays a tile out over threads as its loads want it, here 4 neighbours of a channel
    # a thread, and without a load it would lay out the loop otherwise and convert between the two.
    state = tl.load(end_ptr + tile, mask=tile_mask & (length < 0), other=0.0)
    total = state + 1.0  # the product of decays
    if F.INITIAL and F.PASS != ENDS:
        where = own[:, None] * initial_h + (row % F.P)[:, None] * initial_p + lane[None, :] * initial_n
        state += tl.load(initial_ptr + batch * initial_b + where, mask=tile_mask, other=0.0).to(tl.float32)
    if F.PASS == RESUME:
        # The carry over the segments before this one; as many side by side as the registers hold.
        CARRY: tl.constexpr = 8 if H * N <= 256 else 2
        for start in range(0, segment, CARRY):
            ends = ()
            for s in tl.static_range(CARRY):
                before = (batch * (segments - 1) + start + s) * size + tile
                there = tile_mask & (start + s < segment)
                end = tl.load(end_ptr + before, mask=there, other=0.0)
                ends = ends + ((end, tl.load(decay_ptr + before, mask=there, other=1.0)),)
            for s in tl.static_range(CARRY):
                end, decay = ends[s]
                state = decay * state + end

    queue = ()
    for u in tl.static_range(U):
        queue = queue + (fetch(u, at, masks, F),)
    whole = first + (last - first) // U * U
    for start in range(first, whole, U):
        places = ((batch * length + start) * F.rows + row, (batch * length + start) * size + tile, listed_at)
        move = tl.minimum(start + U, length - U) - window
        window += move
        at = (
            at[0] + move * F.x_t, at[1] + move * F.dt_t, at[2] + move * F.log_t, at[3] + move * F.write_t,
            at[4] + move * F.read_t, at[5] + move * F.seen_t, at[6] + move * F.cut_t, at[7] + move * F.gate_t,
            at[8] + move * F.reset_t, at[9] + move,
        )  # fmt: skip
        ahead = ()
        for u in tl.static_range(U):
            ahead = ahead + (fetch(u, at, masks, F),)
            state, total = token(
                state, total, queue[u], fixed, True, start + u, u, outputs, places, stored, size, every, F, False
            )  # fmt: skip
        queue = ahead
        if F.STATES == EVERY and F.ALIGNED:
            # every is a multiple of U: only the last token of U can be due.
            due = (start + U) % every == 0
            tl.store(states_ptr + (listed_at + ((start + U) // every - 1) * size), state, mask=tile_mask & due)
    if not F.EVEN:
        # Loaded again: a queue that left the loop would have two layouts in it, and every load twice.
        queue = ()
        for u in tl.static_range(U):
            queue = queue + (fetch(u, at, masks, F),)
        places = ((batch * length + window) * F.rows + row, (batch * length + window) * size + tile, listed_at)
        for u in tl.static_range(U):
            live = (window + u >= whole) & (window + u < last)
            state, total = token(
                state, total, queue[u], fixed, live, window + u, u, outputs, places, stored, size, every, F, True
            )  # fmt: skip

    if F.PASS == ENDS:
        here = (batch * parts + segment) * size
        tl.store(end_ptr + here + tile, state, mask=tile_mask)
        tl.store(decay_ptr + here + tile, total, mask=tile_mask)
    elif F.PASS == WHOLE:
        tl.store(final_ptr + batch * size + tile, state, mask=tile_mask)
    else:
        tl.store(final_ptr + batch * size + tile, state, mask=tile_mask & (segment == segments - 1))
