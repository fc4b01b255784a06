"""Operands of contribution tiles on a GPU, written once, in the two bfloat16 halves that the product wants.

A float32 product is three bfloat16 ones: with ``x = hi + lo`` to 16 bits, ``W V = W_hi V_hi + W_hi V_lo + W_lo V_hi``
up to 2^-17 of every term, with float32's range. The operand's planes (hi, lo, hi) lie one below the other, so
that the three are one matrix product with the planes (hi, hi, lo) of the weight side by side.
"""

# Arguments of Triton kernels are pointers and scalars that have no Python types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import ScanInputs
from ..segments import FORGET, base2
from .device import on_its_device
from .rounding import cdiv, next_power_of_2
from .tiles import rows

__all__ = ["BLOCK", "Parts", "far", "product", "rows", "tapped", "weight_planes"]

BLOCK = 64
"""Most rows of an operand; its columns are a multiple of it, so that planes are written 16 bytes at a time."""

# Rows of M that one program keeps shifted by every tap, and channels of the head that share them.
_ROWS, _CHANNELS = 32, 16


@triton.jit
def _put(out_ptr, x, place, inside, plane):
    """The planes hi, lo, hi of a tile, ``plane`` elements apart."""
    hi = _rounded(x)
    lo = _rounded(x - hi).to(tl.bfloat16)
    hi = hi.to(tl.bfloat16)
    tl.store(out_ptr + place, hi, mask=inside)
    tl.store(out_ptr + plane + place, lo, mask=inside)
    tl.store(out_ptr + 2 * plane + place, hi, mask=inside)


@triton.jit
def _rounded(x):
    """To the nearest bfloat16, as float32; written out because Triton's interpreter cuts where a GPU rounds."""
    rounded = ((x.to(tl.int32, bitcast=True) + 0x8000) & -65536).to(tl.float32, bitcast=True)
    # A GPU's NaN is all ones: adding to it would carry into the sign, and give zero.
    return tl.where(x == x, rounded, x)


@triton.jit
def _far(
    read_ptr, write_ptr, rate_ptr, clock_ptr, dt_ptr, gate_ptr, source_ptr, out_ptr,
    start, rows, left, columns, length, heads, per_read, per_write,
    TAPS: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # One channel: (rows, n) decayed from the boundary before `start`, times (n, columns) decayed to it with the taps
    # summed. Every factor of decay is at most 1; clocks are float64, and so are their differences. Columns past the
    # last one wanted may lie after the boundary: their decay is cut at 1 and nobody looks at them.
    h = tl.program_id(1)
    n = tl.arange(0, N)
    r = start + tl.arange(0, ROWS)
    s = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    line = h.to(tl.int64) * length
    rate = tl.load(rate_ptr + h * N + n)
    boundary = tl.load(clock_ptr + line + start - 1)
    since = (tl.load(clock_ptr + line + r) - boundary).to(tl.float32)
    read = tl.load(read_ptr + ((h // per_read) * N + n)[None, :].to(tl.int64) * length + r[:, None])
    gate = tl.load(gate_ptr + line + r)
    rise = tl.exp2(since[:, None] * rate[None, :]) * read * gate[:, None]
    fall = tl.zeros((N, COLUMNS), dtype=tl.float32)
    write_row = write_ptr + ((h // per_write) * N + n)[:, None].to(tl.int64) * length
    for k in tl.static_range(TAPS):
        at = left + s + k
        until = tl.maximum((boundary - tl.load(clock_ptr + line + at)).to(tl.float32), 0.0)
        given = tl.load(dt_ptr + line + at) * tl.load(
            source_ptr + k * tl.cast(heads, tl.int64) * length + line + left + s
        )
        fall += tl.exp2(rate[:, None] * until[None, :]) * tl.load(write_row + at[None, :]) * given[None, :]
    tile = tl.dot(rise, fall, input_precision=PRECISION)
    row = tl.arange(0, ROWS)
    place = (h.to(tl.int64) * rows + row[:, None]) * columns + s[None, :]
    _put(out_ptr, tile, place, (row < rows)[:, None], tl.cast(heads, tl.int64) * rows * columns)


@triton.jit
def _tapped(
    matrix_ptr, source_ptr, gate_ptr, skip_ptr, out_ptr,
    start, rows, first, left, columns, width, length, heads, channels, matrix_h, matrix_r,
    TAPS: tl.constexpr, SKIP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # Some channels of one head: the same piece of M, shifted by every tap, times what each channel's sources give.
    # `first` is the token of the matrix' first column, `width` how many it has.
    h = tl.program_id(2)
    parts = tl.cdiv(channels, CHANNELS)
    r = tl.program_id(1) // parts * ROWS + tl.arange(0, ROWS)
    s = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.program_id(1) % parts * CHANNELS
    has_r = (r < rows)[:, None]
    line = matrix_ptr + h.to(tl.int64) * matrix_h + r[:, None].to(tl.int64) * matrix_r
    plane = tl.cast(heads, tl.int64) * channels * rows * columns
    # Whether the skip, M's extra diagonal, crosses this tile with any tap.
    lag = (start + r)[:, None] - (left + s)[None, :]
    crossed = start + tl.program_id(1) // parts * ROWS - left - tl.program_id(0) * COLUMNS < COLUMNS + TAPS
    for c in range(begin, tl.minimum(begin + CHANNELS, channels)):
        e = h.to(tl.int64) * channels + c
        tile = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in tl.static_range(TAPS):
            column = left - first + s + k
            given = tl.load(source_ptr + (k * tl.cast(heads, tl.int64) * channels + e) * length + left + s)
            m = tl.load(line + column[None, :], mask=has_r & (column < width)[None, :], other=0.0)
            tile += m * given[None, :]
        if SKIP and crossed:
            skip = tl.load(skip_ptr + e)
            for k in tl.static_range(TAPS):
                given = tl.load(source_ptr + (k * tl.cast(heads, tl.int64) * channels + e) * length + left + s)
                tile += tl.where(lag == k, (skip * given)[None, :], 0.0)
        gate = tl.load(gate_ptr + e * length + start + r)
        _put(out_ptr, tile * gate[:, None], (e * rows + r[:, None]) * columns + s[None, :], has_r, plane)


@dataclass(frozen=True)
class Parts:
    """One batch row, time last and padded with zeros far enough that kernels need not look where it ends.

    Attributes:
        sources: (k, e, t) float32.
        gate: (e, t) float32.
        skip: (h, p) float32, or None.
        read, write: (g, n, t) float32, n a power of two.
        rate: (h, n) float32 halvings per unit of dt.
        dt: (h, t) float32.
        time: (h, t) float64, the sum of dt up to each token.
            The last five are None unless there is one channel per head with decays ``dt * A`` and no reset.
    """

    sources: Tensor
    gate: Tensor
    skip: Tensor | None
    read: Tensor | None = None
    write: Tensor | None = None
    rate: Tensor | None = None
    dt: Tensor | None = None
    time: Tensor | None = None

    @classmethod
    def of(cls, x: ScanInputs, sources: Tensor, gate: Tensor, skip: Tensor | None) -> Parts:
        """From inputs with b = 1, sources (k, t, e), gate (t, e) and skip (h, p) of any floating dtype."""
        length = sources.shape[1]
        padded = cdiv(length, BLOCK) * BLOCK + 2 * BLOCK

        def last(z: Tensor, *front: int) -> Tensor:
            """(t, ...) with time moved last, in float32, padded."""
            out = torch.zeros(*front, padded, dtype=torch.float32, device=z.device)
            out[..., :length] = z
            return out

        taps, _, e = sources.shape
        some = cls(
            last(sources.mT, taps, e), last(gate.mT, e), None if skip is None else skip.float().contiguous()
        )  # fmt: skip
        if x.A is None or x.dt is None or x.reset is not None or x.head_dim > 1 or x.has_erase:
            return some
        n = max(16, next_power_of_2(x.d_state))
        missing = n - x.d_state
        read, write = (
            last(torch.nn.functional.pad(z[0].permute(1, 2, 0), (0, 0, 0, missing)), z.shape[2], n)
            for z in (x.read, x.write)
        )
        rate = base2(x.A.float()).expand(-1, x.d_state)
        dt = last(x.dt[0].mT, x.n_heads)
        # A step that forgets everything in every state is as good as a longer one, and leaves the sum its digits.
        most = 2 * FORGET / rate.amax(-1, keepdim=True).double().clamp(max=-1e-30)
        time = torch.minimum(dt.double(), most).cumsum(-1)
        return cls(
            some.sources, some.gate, some.skip, read, write, torch.nn.functional.pad(rate, (0, missing)), dt, time
        )


@on_its_device
def far(parts: Parts, start: int, stop: int, left: int, right: int) -> Tensor:
    """Planes of the operand, (3 e, rows, columns) bfloat16, for columns whose taps all end before ``start``.

    One channel per head. ``columns`` is right - left rounded up; what is past ``right`` means nothing.

    Args:
        parts: with a clock.
        start, stop: rows, at most `BLOCK`.
        left, right: columns, right + k - 1 <= start.
    """
    assert parts.time is not None
    assert parts.read is not None
    assert parts.write is not None
    assert parts.rate is not None
    h, columns, rows = len(parts.gate), cdiv(right - left, BLOCK) * BLOCK, stop - start
    out = torch.empty(3 * h, rows, columns, dtype=torch.bfloat16, device=parts.gate.device)
    _far[(columns // BLOCK, h)](
        parts.read, parts.write, parts.rate, parts.time, parts.dt, parts.gate, parts.sources, out,
        start, rows, left, columns, parts.gate.shape[1], h, h // len(parts.read), h // len(parts.write),
        TAPS=len(parts.sources), N=parts.read.shape[1], ROWS=max(16, next_power_of_2(rows)), COLUMNS=BLOCK,
        PRECISION="tf32x3", num_warps=4 if parts.read.shape[1] <= 32 else 8,
    )  # fmt: skip
    return out


@on_its_device
def tapped(parts: Parts, matrix: Tensor, first: int, start: int, stop: int, left: int, right: int) -> Tensor:
    """Planes of the operand, (3 e, rows, columns) bfloat16, from rows of M.

    ``columns`` is right - left rounded up; what is past ``right`` means nothing.

    Args:
        parts: of the sequence.
        matrix: (h, rows, tokens from ``first`` on) float32, last stride 1.
        start, stop: rows, at most `BLOCK`.
        left, right: columns.
    """
    h, rows, width = matrix.shape
    e, columns = len(parts.gate), cdiv(right - left, BLOCK) * BLOCK
    out = torch.empty(3 * e, rows, columns, dtype=torch.bfloat16, device=parts.gate.device)
    block = min(_ROWS, max(16, next_power_of_2(rows)))
    some = min(_CHANNELS, e // h)
    grid = (columns // BLOCK, cdiv(rows, block) * cdiv(e // h, some), h)
    _tapped[grid](
        matrix, parts.sources, parts.gate, parts.gate if parts.skip is None else parts.skip, out,
        start, rows, first, left, columns, width, parts.gate.shape[1], h, e // h, *matrix.stride()[:2],
        TAPS=len(parts.sources), SKIP=parts.skip is not None, ROWS=block, COLUMNS=BLOCK, CHANNELS=some,
        num_warps=block // 4,
    )  # fmt: skip
    return out


def weight_planes(weight: Tensor) -> Tensor:
    """(d, e) float32 as (d, 3 e) bfloat16: hi, hi and lo."""
    hi = weight.bfloat16()
    return torch.cat([hi, hi, (weight - hi.float()).bfloat16()], 1)


def product(weight: Tensor, operand: Tensor) -> Tensor:
    """Planes of the weight (d, 3 e) times planes of the operand (3 e, rows, columns): (d, rows, columns) float32."""
    flat = operand.flatten(1)
    if weight.is_cuda:
        out = torch.mm(weight, flat, out_dtype=torch.float32)
    else:
        out = weight.float() @ flat.float()
    return out.view(-1, *operand.shape[1:])
