"""Scan with one decay per head and several channels (Mamba-2, retention), on matrix units.

Three launches: the clocks (`ssd_clock`); the state entering every chunk, one program for a tile of a head's
state that walks the chunks in order; the outputs, one program for a chunk and several heads of a group, which share
``read @ write^T``. The states between chunks are a result, not a by-product: analyses read them, and `ssd_backward` does.
"""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import ScanInputs
from .products import INTERPRET, dot, parts_of
from .ssd_clock import Clocks, clocks

__all__ = ["Scanned", "carry", "forward", "heads_together", "prepared"]


class Scanned(NamedTuple):
    """What `forward` returns.

    Attributes:
        y: (b, t, h, p) outputs.
        final: (b, h, p, n) float32 state after the last token.
        states: (b, k, h, p, n) float32 states after the picked tokens; None without picks.
        boundaries: (b, c, h, p, n) state entering each chunk.
        chunk: tokens per chunk.
    """

    y: Tensor
    final: Tensor
    states: Tensor | None
    boundaries: Tensor
    chunk: int


@triton.jit
def _carry(
    value_ptr, write_ptr, weight_ptr, through_ptr, initial_ptr, picks_ptr, dstates_ptr, every_ptr, final_ptr,
    length, heads, per_group, chunks, picks, p_size, n_size,
    value_b, value_t, value_h, write_b, write_t, write_g,
    L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_PICKS: tl.constexpr, REVERSE: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    # One program: a (BP, BN) tile of one head's state, all chunks in order (from the last one in reverse).
    #     every[c] = state;  state = through[c] * state + (value * weight)^T @ write
    # and, for gradients, weight * gradient of every state that was handed out (see `Picks`).
    head = tl.program_id(0) % heads
    row = (tl.program_id(0) // heads).to(tl.int64)
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    place = tl.arange(0, L)
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
        begin = chunk.to(tl.int64) * L
        real = (place < length - begin)[:, None]
        value = tl.load(value_ptr + begin * value_t + value_at, mask=real & (p < p_size)[None, :], other=0.0)
        write = tl.load(write_ptr + begin * write_t + write_at, mask=real & (n < n_size)[None, :], other=0.0)
        weight = tl.load(weight_ptr + (clock + chunk) * L + place)
        through = tl.load(through_ptr + clock + chunk)
        weighted = tl.trans(value.to(tl.float32) * weight[:, None])
        state = dot(weighted, write, state * through, A, B, INTERPRET)
        if HAS_PICKS:
            for s in range(tl.load(picks_ptr + chunk), tl.load(picks_ptr + chunk + 1)):
                at = tl.load(picks_ptr + chunks + 1 + s)
                upstream = dstates_ptr + ((row * picks + tl.load(picks_ptr + chunks + 1 + picks + s)) * heads + head) * p_size * n_size
                kept = tl.load(weight_ptr + clock * L + at)
                state += kept * tl.load(upstream + tile, mask=in_tile, other=0.0).to(tl.float32)
    tl.store(final_ptr + one + tile, state, mask=in_tile)


@triton.jit
def _outputs(
    value_ptr, write_ptr, read_ptr, high_ptr, low_ptr, forgets_ptr, dt_ptr, every_ptr, y_ptr,
    length, heads, per_write, per_read, chunks, p_size, n_size,
    value_b, value_t, value_h, write_b, write_t, write_g, read_b, read_t, read_g,
    L: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    TOGETHER: tl.constexpr, HAS_DT: tl.constexpr, COUNT: tl.constexpr, LOW: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, V: tl.constexpr, F: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    # One program: ROWS tokens of a chunk, TOGETHER heads that share read @ write^T (ROWS, L), BP channels of each.
    #     y = (read @ write^T * decay between) @ (dt * value) + decay from start * read @ state^T
    first = tl.program_id(0) * TOGETHER
    part = tl.program_id(1) % (L // ROWS)
    chunk = tl.program_id(1) // (L // ROWS) % chunks
    row = (tl.program_id(1) // (L // ROWS) // chunks).to(tl.int64)
    p = tl.program_id(2) * BP + tl.arange(0, BP)
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
        matrix = tl.exp2(tl.minimum(steps, 64.0)) * alike
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
def _outputs_tiled(
    value_ptr, write_ptr, read_ptr, high_ptr, low_ptr, forgets_ptr, dt_ptr, every_ptr, y_ptr,
    length, heads, per_write, per_read, chunks, p_size, n_size,
    value_b, value_t, value_h, write_b, write_t, write_g, read_b, read_t, read_g,
    L: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    HAS_DT: tl.constexpr, COUNT: tl.constexpr, LOW: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, V: tl.constexpr, F: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    # One program: ROWS tokens of one head's chunk, BP channels.
    head = tl.program_id(0)
    part = tl.program_id(1) % (L // ROWS)
    chunk = tl.program_id(1) // (L // ROWS) % chunks
    row = (tl.program_id(1) // (L // ROWS) // chunks).to(tl.int64)
    p = tl.program_id(2) * BP + tl.arange(0, BP)
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
            more = (i * BN + n < n_size)[None, :]
            late, soon = tl.load(read_at + i * BN, real & more, 0.0), tl.load(write_at + i * BN, wrote & more, 0.0)
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
    head = tl.program_id(1) % heads
    row = (tl.program_id(1) // heads).to(tl.int64)
    pick = tl.program_id(0)
    tiles = tl.cdiv(n_size, BN)
    p = tl.program_id(2) // tiles * BP + tl.arange(0, BP)
    n = tl.program_id(2) % tiles * BN + tl.arange(0, BN)
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


def prepared(x: ScanInputs) -> ScanInputs:
    """The inputs with a contiguous last axis, and `initial` contiguous; checked for what the kernels can do."""
    if x.has_erase or x.value.dtype == torch.float64 or x.length == 0:
        raise ValueError("ssd runs recurrences without a delta rule, of at least one token, in float32 or narrower")
    decay = x.A if x.A is not None else x.log_decay
    if decay is None or decay.shape[-1] != 1:
        raise ValueError("ssd runs recurrences with one decay per head")
    loose = {k: z.contiguous() for k, z in x.tensors().items() if z.stride(-1) != 1 and k in ("value", "write", "read")}
    if x.initial is not None:
        loose["initial"] = x.initial.contiguous()
    return x.replace(**loose) if loose else x


def heads_together(x: ScanInputs, most: int) -> int:
    """How many neighbouring heads one program takes: they share a read group and a write group."""
    shared = math.gcd(x.n_heads // x.write.shape[2], x.n_heads // x.read.shape[2])
    return max(k for k in range(1, min(most, shared) + 1) if shared % k == 0)


def carry(
    value: Tensor, write: Tensor, weight: Tensor, through: Tensor, initial: Tensor | None, parts: int,
    *, dtype: torch.dtype = torch.float32, reverse: bool = False, picks: Tensor | None = None, dstates: Tensor | None = None,
    tiles: tuple[int, int] = (64, 64), **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """States between chunks (b, c, h, p, n), and the one behind the last (or before the first, in reverse).

    ``state = through[c] * state + (value * weight)^T @ write`` over the chunks c; see `Clocks` for the shapes.
    """
    b, t, h, p = value.shape
    n = write.shape[3]
    chunks, length = weight.shape[2:]
    every = value.new_empty((b, chunks, h, p, n), dtype=dtype)
    final = value.new_empty((b, h, p, n), dtype=torch.float32)
    bp, bn = (max(16, min(most, triton.next_power_of_2(size))) for most, size in zip(tiles, (p, n), strict=True))
    _carry[(b * h, triton.cdiv(p, bp), triton.cdiv(n, bn))](
        value, write, weight, through, initial, picks, dstates, every, final,
        t, h, h // write.shape[2], chunks, 0 if dstates is None else dstates.shape[1], p, n, *value.stride()[:3], *write.stride()[:3],
        L=length, BP=bp, BN=bn, HAS_INITIAL=initial is not None, HAS_PICKS=picks is not None, REVERSE=reverse,
        A=parts, B=parts_of(write.dtype, parts), INTERPRET=INTERPRET, **options,
    )  # fmt: skip
    return every, final


def forward(
    x: ScanInputs, picks: Sequence[int] | Literal["all"] | None = None, *,
    precision: str = "fp32", chunk: int | None = None, out_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None, tuning: dict[str, Any] | None = None,
) -> Scanned:  # fmt: skip
    """Outputs, final state, states after picked tokens and the states between chunks.

    Args:
        x: one decay per head, no delta rule, any floating dtype but float64, t >= 1.
        picks: token positions in any order, repeats allowed; "all" for every token.
        precision: "fp32" (relative error about 1e-6) or "bf16" (operands rounded to bfloat16: about 3e-3).
        chunk: tokens per chunk, 16 to 128, a power of two; None chooses.
        out_dtype: dtype of y.
        state_dtype: dtype of the boundaries; by default float32, with precision "bf16" bfloat16.

    Raises:
        ValueError: inputs that other kernels run, unknown precision.

    Source: Dao and Gu 2024, "Transformers are SSMs", section 6.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision is fp32 or bf16, got {precision!r}")
    x = prepared(x)
    tune = {"chunk": 128, "parts": 3, "outputs": {}, "carry": {}} | (tuning or {})
    chunk = chunk or min(tune["chunk"], max(16, triton.next_power_of_2(x.length)))
    parts = 1 if precision == "bf16" else tune["parts"]
    if state_dtype is None:
        state_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    clock = clocks(x, chunk)
    every, final = carry(
        x.value, x.write, clock.to_end, clock.through, x.initial, parts, dtype=state_dtype, **tune["carry"]
    )
    y = _read_out(x, clock, every, parts, out_dtype, **tune["outputs"])
    states = None if picks is None else _states(x, clock, every, range(x.length) if picks == "all" else picks, parts)
    return Scanned(y, final, states, every, chunk)


def _read_out(
    x: ScanInputs, clock: Clocks, every: Tensor, parts: int, dtype: torch.dtype,
    *, rows: int = 64, together: int = 0, low: bool = True, **options: Any,
) -> Tensor:  # fmt: skip
    b, t, h, p = x.value.shape
    n = x.d_state
    chunks, length = clock.high.shape[2:]
    y = x.value.new_empty((b, t, h, p), dtype=dtype)
    bp = max(16, min(64, triton.next_power_of_2(p)))
    bn = max(16, min(128, triton.next_power_of_2(n)))
    rows = min(rows, length)
    together = heads_together(x, together) if together else 0
    kernel = _outputs if together else _outputs_tiled
    kernel[(h // max(1, together), b * chunks * (length // rows), triton.cdiv(p, bp))](
        x.value, x.write, x.read, clock.high, clock.low, clock.forgets, clock.dt, every, y,
        t, h, h // x.write.shape[2], h // x.read.shape[2], chunks, p, n,
        *x.value.stride()[:3], *x.write.stride()[:3], *x.read.stride()[:3],
        L=length, ROWS=rows, BP=bp, BN=bn, TILES=triton.cdiv(n, bn), **({"TOGETHER": together} if together else {}),
        HAS_DT=x.dt is not None, COUNT=clock.forgets is not None, LOW=low,
        R=parts_of(x.read.dtype, parts), W=parts_of(x.write.dtype, parts), V=parts_of(x.value.dtype, parts), F=parts,
        INTERPRET=INTERPRET, **options,
    )  # fmt: skip
    return y


def _states(x: ScanInputs, clock: Clocks, every: Tensor, picks: Sequence[int], parts: int) -> Tensor:
    b, _, h, p = x.value.shape
    n = x.d_state
    states = x.value.new_empty((b, len(picks), h, p, n), dtype=torch.float32)
    if not len(picks):
        return states
    at = torch.tensor(list(picks), dtype=torch.int32, device=x.value.device)
    bp, bn = (max(16, min(64, triton.next_power_of_2(size))) for size in (p, n))
    chunks, length = clock.high.shape[2:]
    _picked[(len(picks), b * h, triton.cdiv(p, bp) * triton.cdiv(n, bn))](
        x.value, x.write, clock.high, clock.low, clock.forgets, clock.dt, every, at, states,
        h, h // x.write.shape[2], chunks, len(picks), p, n, *x.value.stride()[:3], *x.write.stride()[:3],
        L=length, BP=bp, BN=bn, HAS_DT=x.dt is not None, COUNT=clock.forgets is not None,
        V=parts, W=parts_of(x.write.dtype, parts), INTERPRET=INTERPRET,
    )  # fmt: skip
    return states
