"""One token of the sequential walk in Triton: its pieces loaded, the state moved on, what was asked for written."""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

__all__ = ["ENDS", "EVERY", "LISTED", "NONE", "RESUME", "WHOLE", "Cut", "fetch", "softplus", "token"]

LOG2_E = tl.constexpr(1.4426950408889634)

# Cut.PASS, what is done about time: one program walks all of it, or finds the end of a segment from a zero state and
# its decay, or walks a segment from the state that enters it.
WHOLE = tl.constexpr(0)
ENDS = tl.constexpr(1)
RESUME = tl.constexpr(2)

# Cut.STATES, which states are written: none, those after every k-th token, those that a table lists.
NONE = tl.constexpr(0)
EVERY = tl.constexpr(1)
LISTED = tl.constexpr(2)


class Cut(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
        P, n: channels of a head, numbers of a channel's state.
        H, N, U: rows of a program, n rounded up to a power of two, tokens fetched ahead.
        rows: h * p.
        HEADS: 1 where all rows of any program belong to one head, else H.
        WRITES, READS, ERASES: 1 where all rows of any program belong to one group of that direction, else H.
        FULL_R, FULL_N, EVEN: no program has rows, states or a last window that stick out.
        DT, FACTORED, PER_STATE, RESET, ERASE, INITIAL: pieces of the recurrence; FACTORED is dt * A, PER_STATE n decays
            a head.
        BIAS, SOFTPLUS, SKIP, GATE: what a Mamba-1 mixer does around it.
        OUTPUT, STATES, ALIGNED, NORMS: what is written (ALIGNED: only the last token of U can be due).
        PASS: WHOLE, ENDS or RESUME.
        x_t ... reset_t: strides of time. Known, they are part of a load's address; unknown, an instruction or two more.
    """

    P: int
    n: int
    H: int
    N: int
    U: int
    rows: int
    HEADS: int
    WRITES: int
    READS: int
    ERASES: int
    FULL_R: bool
    FULL_N: bool
    EVEN: bool
    DT: bool
    FACTORED: bool
    PER_STATE: bool
    RESET: bool
    ERASE: bool
    INITIAL: bool
    BIAS: bool
    SOFTPLUS: bool
    SKIP: bool
    GATE: bool
    x_t: int
    dt_t: int
    log_t: int
    write_t: int
    read_t: int
    seen_t: int
    cut_t: int
    gate_t: int
    reset_t: int
    OUTPUT: bool = False
    STATES: int = 0
    ALIGNED: bool = False
    NORMS: bool = False
    PASS: int = 0


@triton.jit
def _load(pointer, mask, FULL: tl.constexpr):
    """A piece of one token in float32, zero where there is no row."""
    if FULL:
        value = tl.load(pointer)
    else:
        value = tl.load(pointer, mask=mask, other=0.0)
    return value.to(tl.float32)


@triton.jit
def _store(pointer, value, mask, live, TAIL: tl.constexpr, FULL: tl.constexpr):
    if TAIL:
        tl.store(pointer, value, mask=mask & live)
    elif FULL:
        tl.store(pointer, value)
    else:
        tl.store(pointer, value, mask=mask)


@triton.jit
def fetch(u, at, masks, F: tl.constexpr):
    """Everything that token ``u`` after the pointers ``at`` brings; pieces that are absent repeat another one."""
    x_at, dt_at, log_at, write_at, read_at, seen_at, cut_at, gate_at, reset_at, slot_at = at
    row, head, head_n, write_n, read_n, erase_n = masks
    FULL: tl.constexpr = F.FULL_R and F.FULL_N
    x = _load(x_at + u * F.x_t, row, F.FULL_R)
    write = _load(write_at + u * F.write_t, write_n, FULL)
    dt = x
    log = x
    read = x
    seen = x
    cut = x
    gate = x
    reset = x
    slot = x
    if F.DT:
        dt = _load(dt_at + u * F.dt_t, head, F.FULL_R)
    if not F.FACTORED:
        if F.PER_STATE:
            log = _load(log_at + u * F.log_t, head_n, FULL)
        else:
            log = _load(log_at + u * F.log_t, head, F.FULL_R)
    if F.OUTPUT:
        read = _load(read_at + u * F.read_t, read_n, FULL)
    if F.ERASE:
        seen = _load(seen_at + u * F.seen_t, erase_n, FULL)
        cut = _load(cut_at + u * F.cut_t, erase_n, FULL)
    if F.GATE:
        gate = _load(gate_at + u * F.gate_t, row, F.FULL_R)
    if F.RESET:
        reset = tl.load(reset_at + u * F.reset_t)
    if F.STATES == LISTED:
        slot = tl.load(slot_at + u)
    return x, dt, log, write, read, seen, cut, gate, reset, slot


@triton.jit
def softplus(x):
    """log(1 + exp(x)) with full relative accuracy at either end; x itself above 20, as torch and mamba_ssm have it.

    log(1 + s) = 2 artanh(s / (2 + s)), whose series ends after seven terms because the argument is at most 1/3.
    """
    small = tl.exp2(-tl.abs(x) * LOG2_E)
    z = small / (2.0 + small)
    w = z * z
    series = 1.0 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13))))))
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + 2.0 * z * series)


@triton.jit
def token(
    state, total, pieces, fixed, live, time, u, outputs, places, masks, size, every, F: tl.constexpr, TAIL: tl.constexpr
):
    """One token: the state after it and the product of decays; writes what was asked for.

    ``live`` is whether the token counts (looked at in the TAIL only), ``time`` its position, ``u`` its position in the
    window that ``places`` point to.
    """
    x, dt, log, write, read, seen, cut, gate, reset, slot = pieces
    a, bias, skip = fixed
    y_ptr, norm_ptr, kept_ptr, states_ptr = outputs
    row_at, tile_at, listed_at = places
    inside, tile_mask = masks
    FULL: tl.constexpr = F.FULL_R and F.FULL_N
    if F.BIAS:
        dt = dt + bias
    if F.SOFTPLUS:
        dt = softplus(dt)
    if F.FACTORED:
        decay = tl.exp2(dt[:, None] * a)
    elif F.PER_STATE:
        decay = tl.exp2(log * LOG2_E)
    else:
        decay = tl.exp2(log * LOG2_E)[:, None]
    if F.RESET:
        decay = tl.where(reset != 0, 0.0, decay)
    source = x
    if F.DT:
        source = x * dt
    if TAIL:
        decay = tl.where(live, decay, 1.0)
        source = tl.where(live, source, 0.0)
    written = source[:, None] * write
    if F.NORMS or F.ERASE:
        state = state * decay
        if F.ERASE:
            erased = tl.sum(state * seen, axis=1)[:, None] * cut
            if TAIL:
                erased = tl.where(live, erased, 0.0)
            state = state - erased
        if F.NORMS:
            kept = tl.sum(state * state, axis=1)
            if F.P == 1:
                kept = tl.sqrt(kept)
            _store(kept_ptr + (row_at + u * F.rows), kept, inside, live, TAIL, F.FULL_R)
        state = state + written
    else:
        state = tl.fma(state, tl.broadcast_to(decay, state.shape), written)
    if F.PASS == ENDS:
        total = total * decay
    if F.NORMS:
        norm = tl.sum(state * state, axis=1)
        if F.P == 1:
            norm = tl.sqrt(norm)
        _store(norm_ptr + (row_at + u * F.rows), norm, inside, live, TAIL, F.FULL_R)
    if F.OUTPUT:
        y = tl.sum(state * read, axis=1)
        if F.SKIP:
            y += x * skip
        if F.GATE:
            y *= gate / (1.0 + tl.exp2(-gate * LOG2_E))
        _store(y_ptr + (row_at + u * F.rows), y, inside, live, TAIL, F.FULL_R)
    if F.STATES == EVERY:
        if every == 1:
            _store(states_ptr + (tile_at + u * size), state, tile_mask, live, TAIL, FULL)
        elif not F.ALIGNED:
            due = (time + 1) % every == 0
            if TAIL:
                due = due & live
            tl.store(states_ptr + (listed_at + time // every * size), state, mask=tile_mask & due)
    if F.STATES == LISTED:
        due = slot >= 0
        if TAIL:
            due = due & live
        tl.store(states_ptr + (listed_at + slot * size), state, mask=tile_mask & due)
    return state, total
