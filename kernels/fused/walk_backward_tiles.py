"""Tiles of heads and states in registers: what the kernels of `walk_backward_kernels` are made of.

One thread holds the states of a few heads and a few entries of n: tensors are (L, D, M), with L states and D heads
spread over threads and M states in the thread, and J of them, in tuples, for J times as many heads. The shape decides
where sums happen: over M and J in registers, over L and D by shuffles. Addresses are formed so that the compiler does
not see which axis is contiguous (`one`): it then gives the first axes to threads and the last to registers, for every
load, store and sum alike, and nothing has to change its layout in between.
"""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

import math

import triton
import triton.language as tl

__all__ = [
    "EVERY",
    "LN_2",
    "LOG_HEAD",
    "LOG_STATE",
    "RATE_HEAD",
    "RATE_STATE",
    "SOME",
    "decay_of",
    "exists",
    "heads_of",
    "injected",
    "kept",
    "over_heads",
    "over_states",
    "places",
    "rates_of",
    "states_of",
    "take",
    "take_each",
]

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
def heads_of(
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
def states_of(one, M: tl.constexpr, D: tl.constexpr, L: tl.constexpr):
    """The entries of n that a thread holds, (L, D, M)."""
    n = tl.arange(0, M)[None, None, :] * L + tl.arange(0, L)[:, None, None]
    return (n + tl.zeros((L, D, 1), dtype=tl.int32)) * one


@triton.jit
def places(pointer, stride_h, stride_n, heads, n, J: tl.constexpr):
    """J tensors of addresses (L, D, M): one step of something per head and state; (L, D, 1) where n is 0."""
    out = ()
    for j in tl.static_range(J):
        out += (pointer + heads[j].to(tl.int64) * stride_h + n * stride_n,)
    return out


@triton.jit
def exists(t, length, FULL: tl.constexpr):
    """Whether there is a step t; one answer for the whole walk where all do."""
    if FULL:
        return length > 0
    return t < length


@triton.jit
def take(place, mask, FULL: tl.constexpr):
    """What is there in float32, and zero outside of the mask; FULL says that nothing is outside."""
    if FULL:
        return tl.load(place).to(tl.float32)
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def take_each(spots, offset, live, on, J: tl.constexpr, FULL: tl.constexpr):
    """The J tensors of one step at `spots`, moved on by `offset`."""
    out = ()
    for j in tl.static_range(J):
        out += (take(spots[j] + offset, live[j] & on, FULL),)
    return out


@triton.jit
def rates_of(a_ptr, a_h, a_n, heads, live, n, N: tl.constexpr, J: tl.constexpr, KIND: tl.constexpr):
    """Decay rates in base 2: per head (L, D, 1) or per state; those of a log-decay are one constant."""
    out = ()
    for j in tl.static_range(J):
        if KIND == RATE_STATE:
            at = a_ptr + heads[j] * a_h + n * a_n
            rate = tl.load(at, mask=live[j] & (n < N), other=0.0).to(tl.float32)
            out += (tl.where(rate < LOWEST, LOWEST, rate) * LOG2_E,)
        elif KIND == RATE_HEAD:
            rate = tl.load(a_ptr + heads[j] * a_h, mask=live[j], other=0.0).to(tl.float32)
            out += (tl.where(rate < LOWEST, LOWEST, rate) * LOG2_E,)
        else:
            out += (LOG2_E,)
    return out


@triton.jit
def decay_of(step, rate, keep, RESET: tl.constexpr):
    """exp of a log-decay. -inf gives 0, and a reset is no number of the exponent."""
    a = tl.exp2(step * rate)
    if RESET:
        a *= keep
    return a


@triton.jit
def kept(reset_ptr, on):
    return tl.where(tl.load(reset_ptr, mask=on, other=0) != 0, 0.0, 1.0)


@triton.jit
def injected(
    q, ds_ptr, ds_k, ds_h, ds_n, slot_ptr, t, heads, live, n, on, J: tl.constexpr, PICKS: tl.constexpr
):  # fmt: skip
    """Adds the gradient of the state that was handed out after step t, if one was."""
    slot = t
    if PICKS == SOME:
        slot = tl.load(slot_ptr + t, mask=on, other=-1)
    spots = places(ds_ptr + slot.to(tl.int64) * ds_k, ds_h, ds_n, heads, n, J)
    out = ()
    for j in tl.static_range(J):
        out += (q[j] + take(spots[j], live[j] & on & (slot >= 0), False),)
    return out


@triton.jit
def over_states(x):
    """(L, D, M) summed over its states: in the thread, then between threads, each of which holds the sum."""
    x = tl.sum(x, axis=2, keep_dims=True)
    return tl.broadcast_to(tl.sum(x, axis=0, keep_dims=True), x.shape)


@triton.jit
def over_heads(x):
    """(L, D, M) summed over its heads; every thread holds the sum."""
    return tl.broadcast_to(tl.sum(x, axis=1, keep_dims=True), x.shape)
