"""The Triton kernel of the sequential walk: states of a block of rows in registers, tokens one after the other.

Rows are channels, ``r = h * p + c``; a program owns ``H`` of them and all n states, a tile (H, N). One token is

    state = exp2(rate) * state + (value * dt) x write          y = sum over n of state * read

A walk is a chain, so the only thing that can be slow is waiting: a load takes 500 ns, a token 30. A token's pieces are therefore
loaded ``U`` tokens before they are needed and wait in registers, in the tuple ``queue``. The compiler could not do that on its own, because
it may not move a load above a store. Loads have no masks in time, which would cost an instruction each: the window of U tokens that is loaded last is
shifted back to end with the sequence, and tokens that it repeats are the identity (decay 1, nothing written).

Shapes of the pieces follow from what the rows of a program share: ``HEADS`` is 1 where all of them belong to one head, else H; ``WRITES``,
``READS`` and ``ERASES`` are 1 where all of them belong to one group, else H.
"""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)

# What is done about time.
WHOLE = tl.constexpr(0)  # one program walks all of it
ENDS = tl.constexpr(1)  # the end of each segment from a zero state, and its decay
RESUME = tl.constexpr(2)  # each segment from the state that enters it

# Which states are written.
NONE = tl.constexpr(0)
EVERY = tl.constexpr(1)
LISTED = tl.constexpr(2)


@triton.jit
def _load(pointer, mask, FULL: tl.constexpr):
    """A piece of one token in float32, zero where there is no row."""
    if FULL:
        value = tl.load(pointer)
    else:
        value = tl.load(pointer, mask=mask, other=0.0)
    return value.to(tl.float32)


@triton.jit
def _fetch(
    u, at, steps, masks,
    DT: tl.constexpr, FACTORED: tl.constexpr, PER_STATE: tl.constexpr, RESET: tl.constexpr, ERASE: tl.constexpr, GATE: tl.constexpr,
    READ: tl.constexpr, LIST: tl.constexpr, FULL_R: tl.constexpr, FULL_N: tl.constexpr,
):  # fmt: skip
    """Everything that token ``u`` after the pointers ``at`` brings; pieces that are absent repeat another one."""
    x_at, dt_at, log_at, write_at, read_at, seen_at, cut_at, gate_at, reset_at, slot_at = at
    x_step, dt_step, log_step, write_step, read_step, seen_step, cut_step, gate_step, reset_step, slot_step = steps
    row, head, head_n, write_n, read_n, erase_n = masks
    FULL: tl.constexpr = FULL_R and FULL_N
    x = _load(x_at + u * x_step, row, FULL_R)
    write = _load(write_at + u * write_step, write_n, FULL)
    dt = x
    log = x
    read = x
    seen = x
    cut = x
    gate = x
    reset = x
    slot = x
    if DT:
        dt = _load(dt_at + u * dt_step, head, FULL_R)
    if not FACTORED:
        if PER_STATE:
            log = _load(log_at + u * log_step, head_n, FULL)
        else:
            log = _load(log_at + u * log_step, head, FULL_R)
    if READ:
        read = _load(read_at + u * read_step, read_n, FULL)
    if ERASE:
        seen = _load(seen_at + u * seen_step, erase_n, FULL)
        cut = _load(cut_at + u * cut_step, erase_n, FULL)
    if GATE:
        gate = _load(gate_at + u * gate_step, row, FULL_R)
    if RESET:
        reset = tl.load(reset_at + u * reset_step)
    if LIST:
        slot = tl.load(slot_at + u * slot_step)
    return x, dt, log, write, read, seen, cut, gate, reset, slot


@triton.jit
def softplus(x):
    """log(1 + exp(x)), and x itself above 20; exact to float32 for very negative x as well."""
    small = tl.exp(-tl.abs(x))
    # log1p: log(1 + s) / ((1 + s) - 1) * s undoes the rounding of 1 + s.
    one = 1.0 + small
    log1p = tl.where(one == 1.0, small, tl.log(one) * (small / tl.where(one == 1.0, 1.0, one - 1.0)))
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + log1p)


@triton.jit
def _store(pointer, value, mask, live, TAIL: tl.constexpr, FULL: tl.constexpr):
    if TAIL:
        tl.store(pointer, value, mask=mask & live)
    elif FULL:
        tl.store(pointer, value)
    else:
        tl.store(pointer, value, mask=mask)


@triton.jit
def _token(
    state, total, pieces, fixed, live, token, u, outputs, places, masks, rows, size, every,
    DT: tl.constexpr, FACTORED: tl.constexpr, PER_STATE: tl.constexpr, RESET: tl.constexpr, ERASE: tl.constexpr, GATE: tl.constexpr,
    BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, SKIP: tl.constexpr,
    OUTPUT: tl.constexpr, STATES: tl.constexpr, ALIGNED: tl.constexpr, NORMS: tl.constexpr, ENDS_ONLY: tl.constexpr, P: tl.constexpr,
    TAIL: tl.constexpr, FULL_R: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """One token: the state after it, the product of decays, and everything that is written about it."""
    x, dt, log, write, read, seen, cut, gate, reset, slot = pieces
    a, bias, skip = fixed
    y_ptr, norm_ptr, kept_ptr, states_ptr = outputs
    row_at, tile_at, listed_at = places
    inside, tile_mask = masks
    if BIAS:
        dt = dt + bias
    if SOFTPLUS:
        dt = softplus(dt)
    if FACTORED:
        decay = tl.exp2(dt[:, None] * a)
    elif PER_STATE:
        decay = tl.exp2(log * LOG2_E)
    else:
        decay = tl.exp2(log * LOG2_E)[:, None]
    if RESET:
        decay = tl.where(reset != 0, 0.0, decay)
    source = x
    if DT:
        source = x * dt
    if TAIL:
        decay = tl.where(live, decay, 1.0)
        source = tl.where(live, source, 0.0)
    written = source[:, None] * write
    if NORMS or ERASE:
        state = state * decay
        if ERASE:
            erased = tl.sum(state * seen, axis=1)[:, None] * cut
            if TAIL:
                erased = tl.where(live, erased, 0.0)
            state = state - erased
        if NORMS:
            kept = tl.sum(state * state, axis=1)
            if P == 1:
                kept = tl.sqrt(kept)
            _store(kept_ptr + (row_at + u * rows), kept, inside, live, TAIL, FULL_R)
        state = state + written
    else:
        state = tl.fma(state, tl.broadcast_to(decay, state.shape), written)
    if ENDS_ONLY:
        total = total * decay
    if NORMS:
        norm = tl.sum(state * state, axis=1)
        if P == 1:
            norm = tl.sqrt(norm)
        _store(norm_ptr + (row_at + u * rows), norm, inside, live, TAIL, FULL_R)
    if OUTPUT:
        y = tl.sum(state * read, axis=1)
        if SKIP:
            y += x * skip
        if GATE:
            y *= gate / (1.0 + tl.exp(-gate))
        _store(y_ptr + (row_at + u * rows), y, inside, live, TAIL, FULL_R)
    if STATES == EVERY:
        if every == 1:
            _store(states_ptr + (tile_at + u * size), state, tile_mask, live, TAIL, FULL)
        elif not ALIGNED:
            due = (token + 1) % every == 0
            if TAIL:
                due = due & live
            tl.store(states_ptr + (listed_at + token // every * size), state, mask=tile_mask & due)
    if STATES == LISTED:
        due = slot >= 0
        if TAIL:
            due = due & live
        tl.store(states_ptr + (listed_at + slot * size), state, mask=tile_mask & due)
    return state, total


@triton.jit
def walk_kernel(
    x_ptr, dt_ptr, a_ptr, log_ptr, write_ptr, read_ptr, seen_ptr, cut_ptr, reset_ptr, initial_ptr,
    bias_ptr, skip_ptr, gate_ptr, slot_ptr,
    y_ptr, final_ptr, states_ptr, norm_ptr, kept_ptr, end_ptr, decay_ptr,
    x_b, x_h, x_p, dt_b, dt_h, a_h, a_n, log_b, log_h, log_n,
    write_b, write_g, write_n, read_b, read_g, read_n, seen_b, seen_g, seen_n, cut_b, cut_g, cut_n,
    reset_b, initial_b, initial_h, initial_p, initial_n, bias_h, skip_h, gate_b, gate_h,
    length, segments, per_segment, picks, every, write_rows, read_rows, seen_rows, cut_rows,
    x_t: tl.constexpr, dt_t: tl.constexpr, log_t: tl.constexpr, write_t: tl.constexpr, read_t: tl.constexpr, seen_t: tl.constexpr,
    cut_t: tl.constexpr, reset_t: tl.constexpr, gate_t: tl.constexpr, rows: tl.constexpr,
    P: tl.constexpr, n: tl.constexpr, H: tl.constexpr, N: tl.constexpr, U: tl.constexpr,
    HEADS: tl.constexpr, WRITES: tl.constexpr, READS: tl.constexpr, ERASES: tl.constexpr,
    DT: tl.constexpr, FACTORED: tl.constexpr, PER_STATE: tl.constexpr, RESET: tl.constexpr, ERASE: tl.constexpr,
    INITIAL: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr,
    OUTPUT: tl.constexpr, STATES: tl.constexpr, ALIGNED: tl.constexpr, NORMS: tl.constexpr, PASS: tl.constexpr,
    FULL_R: tl.constexpr, FULL_N: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    parts = segments
    if PASS == ENDS:
        parts = segments - 1  # nobody waits for the end of the last one
    batch = (tl.program_id(1) // parts).to(tl.int64)
    segment = tl.program_id(1) % parts

    row = block * H + tl.arange(0, H)
    lane = tl.arange(0, N)
    inside = row < rows
    inside_n = (lane < n)[None, :]
    tile_mask = inside[:, None] & inside_n
    head = (block * H + tl.arange(0, HEADS)) // P
    inside_h = (block * H + tl.arange(0, HEADS)) < rows
    writer = (block * H + tl.arange(0, WRITES)) // write_rows
    reader = (block * H + tl.arange(0, READS)) // read_rows
    eraser = (block * H + tl.arange(0, ERASES)) // seen_rows
    cutter = (block * H + tl.arange(0, ERASES)) // cut_rows
    inside_w = ((block * H + tl.arange(0, WRITES)) < rows)[:, None] & inside_n
    inside_r = ((block * H + tl.arange(0, READS)) < rows)[:, None] & inside_n
    inside_e = ((block * H + tl.arange(0, ERASES)) < rows)[:, None] & inside_n
    tile = row[:, None] * n + lane[None, :]  # of anything (rows, n) that is contiguous
    size = tl.full((), n, tl.int64) * rows  # numbers in the states of one token
    FULL: tl.constexpr = FULL_R and FULL_N

    first = segment * per_segment
    last = tl.minimum(first + per_segment, length)
    window = tl.minimum(first, length - U)  # the U tokens that wait in the queue
    begin = window.to(tl.int64)

    # Pointers to the first token of the window.
    at = (
        x_ptr + (batch * x_b + begin * x_t) + (row // P) * x_h + (row % P) * x_p,
        dt_ptr + (batch * dt_b + begin * dt_t) + head * dt_h,
        log_ptr + (batch * log_b + begin * log_t) + head * log_h,
        write_ptr + (batch * write_b + begin * write_t) + writer[:, None] * write_g + lane[None, :] * write_n,
        read_ptr + (batch * read_b + begin * read_t) + reader[:, None] * read_g + lane[None, :] * read_n,
        seen_ptr + (batch * seen_b + begin * seen_t) + eraser[:, None] * seen_g + lane[None, :] * seen_n,
        cut_ptr + (batch * cut_b + begin * cut_t) + cutter[:, None] * cut_g + lane[None, :] * cut_n,
        gate_ptr + (batch * gate_b + begin * gate_t) + row * gate_h,
        reset_ptr + (batch * reset_b + begin * reset_t),
        slot_ptr + begin,
    )  # fmt: skip
    if PER_STATE and not FACTORED:
        at = at[:2] + (at[2][:, None] + lane[None, :] * log_n,) + at[3:]
    # A step of known size is part of a load's address; otherwise it is an instruction or two.
    steps = (x_t, dt_t, log_t, write_t, read_t, seen_t, cut_t, gate_t, reset_t, 1)
    masks = (inside, inside_h, inside_h[:, None] & inside_n, inside_w, inside_r, inside_e)

    # What does not change with time.
    a = tl.zeros((1, 1), tl.float32)
    bias = tl.zeros((1,), tl.float32)
    skip = tl.zeros((1,), tl.float32)
    if FACTORED:
        if PER_STATE:
            a = tl.load(a_ptr + head[:, None] * a_h + lane[None, :] * a_n, mask=inside_h[:, None] & inside_n, other=0.0)
        else:
            a = tl.load(a_ptr + head * a_h, mask=inside_h, other=0.0)[:, None]
        a = tl.maximum(a.to(tl.float32) * LOG2_E, LOWEST)  # finite, because 0 * inf is NaN
    if BIAS:
        bias = tl.load(bias_ptr + head * bias_h, mask=inside_h, other=0.0).to(tl.float32)
    if SKIP:
        skip = tl.load(skip_ptr + row * skip_h, mask=inside, other=0.0).to(tl.float32)

    state = tl.zeros((H, N), tl.float32)
    if INITIAL and PASS != ENDS:
        where = (row // P)[:, None] * initial_h + (row % P)[:, None] * initial_p + lane[None, :] * initial_n
        state += tl.load(initial_ptr + batch * initial_b + where, mask=tile_mask, other=0.0).to(tl.float32)
    if PASS == RESUME:
        # The carry over the segments before this one.
        for s in range(segment):
            before = (batch * (segments - 1) + s) * size
            end = tl.load(end_ptr + before + tile, mask=tile_mask, other=0.0)
            state = tl.load(decay_ptr + before + tile, mask=tile_mask, other=0.0) * state + end
    total = tl.full((H, N), 1.0, tl.float32)

    fixed = (a, bias, skip)
    outputs = (y_ptr, norm_ptr, kept_ptr, states_ptr)
    stored = (inside, tile_mask)
    listed_at = batch * picks * size + tile

    queue = ()
    for u in tl.static_range(U):
        queue = queue + (
            _fetch(u, at, steps, masks, DT, FACTORED, PER_STATE, RESET, ERASE, GATE, OUTPUT, STATES == LISTED, FULL_R, FULL_N),
        )  # fmt: skip
    whole = first + (last - first) // U * U
    for start in range(first, whole, U):
        places = ((batch * length + start) * rows + row, (batch * length + start) * size + tile, listed_at)
        move = tl.minimum(start + U, length - U) - window
        window += move
        at = (
            at[0] + move * x_t, at[1] + move * dt_t, at[2] + move * log_t, at[3] + move * write_t, at[4] + move * read_t,
            at[5] + move * seen_t, at[6] + move * cut_t, at[7] + move * gate_t, at[8] + move * reset_t, at[9] + move,
        )  # fmt: skip
        ahead = ()
        for u in tl.static_range(U):
            ahead = ahead + (
                _fetch(u, at, steps, masks, DT, FACTORED, PER_STATE, RESET, ERASE, GATE, OUTPUT, STATES == LISTED, FULL_R, FULL_N),
            )  # fmt: skip
            state, total = _token(
                state, total, queue[u], fixed, True, start + u, u, outputs, places, stored, rows, size, every,
                DT, FACTORED, PER_STATE, RESET, ERASE, GATE, BIAS, SOFTPLUS, SKIP,
                OUTPUT, STATES, ALIGNED, NORMS, PASS == ENDS, P, False, FULL_R, FULL,
            )  # fmt: skip
        queue = ahead
        if STATES == EVERY and ALIGNED:
            # every is a multiple of U: only the last token of a block can be due.
            due = (start + U) % every == 0
            tl.store(states_ptr + (listed_at + ((start + U) // every - 1) * size), state, mask=tile_mask & due)
    if not EVEN:
        places = ((batch * length + window) * rows + row, (batch * length + window) * size + tile, listed_at)
        for u in tl.static_range(U):
            live = (window + u >= whole) & (window + u < last)
            state, total = _token(
                state, total, queue[u], fixed, live, window + u, u, outputs, places, stored, rows, size, every,
                DT, FACTORED, PER_STATE, RESET, ERASE, GATE, BIAS, SOFTPLUS, SKIP,
                OUTPUT, STATES, ALIGNED, NORMS, PASS == ENDS, P, True, FULL_R, FULL,
            )  # fmt: skip

    if PASS == ENDS:
        here = (batch * parts + segment) * size
        tl.store(end_ptr + here + tile, state, mask=tile_mask)
        tl.store(decay_ptr + here + tile, total, mask=tile_mask)
    elif PASS == WHOLE:
        tl.store(final_ptr + batch * size + tile, state, mask=tile_mask)
    else:
        tl.store(final_ptr + batch * size + tile, state, mask=tile_mask & (segment == segments - 1))
