"""Tiles of the operand behind a mixer's projection: (e, rows, columns) for rows and columns of pairs of tokens.

For each channel the operand is ``gate[t] * sum_k (M + skip I)[t, s + k] * sources[s, k]``. Several channels of a head
share a piece of M, which is shifted by every tap. With one channel per head M itself would be as large as the
operand, so it is only made next to the diagonal: further left it is a product of rank n through the boundary
before the rows (`attention_rows`), and sums over taps act on its columns, once for all rows of the tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention_rows import Boundary
from .attention_rows import rows as rows_of
from .inputs import ScanInputs

__all__ = ["Terms", "Tile", "tiles"]

# Rows of a tile, and bytes of its operand, its product and what the operand is made of.
_CPU_ROWS, _GPU_ROWS = 32, 64
_CPU_BYTES, _GPU_BYTES = 64e6, 800e6


@dataclass(frozen=True)
class Terms:
    """A mixer with everything frozen that does not carry its input, as plain tensors.

    ``h`` heads of ``p`` channels are ``e = h p`` channels, channel i of head j at ``j p + i``.

    Args:
        inputs: the recurrence; its value and initial state play no part.
        sources: (b, k, t, e) what token s gives to the scan's value at s, s + 1, ... s + k - 1.
        gate: (b, t, e) factor of the scan's output.
        weight: (d, e) projection behind the gate.
        skip: (h,) or (h, p) weight of the value in the scan's output; None for none.

    Raises:
        ValueError: when shapes do not fit together.
    """

    inputs: ScanInputs
    sources: Tensor
    gate: Tensor
    weight: Tensor
    skip: Tensor | None = None

    def __post_init__(self) -> None:
        b, t, h, p = self.inputs.value.shape
        e = h * p
        if self.sources.ndim != 4 or not self.sources.shape[1] or self.sources.shape[::2] != (b, t):
            raise ValueError(f"sources is (b={b}, k, t={t}, e={e}), got {tuple(self.sources.shape)}")
        if self.sources.shape[3] != e:
            raise ValueError(f"sources is (b={b}, k, t={t}, e={e}), got {tuple(self.sources.shape)}")
        if self.gate.shape != (b, t, e):
            raise ValueError(f"gate is (b={b}, t={t}, e={e}), got {tuple(self.gate.shape)}")
        if self.weight.ndim != 2 or self.weight.shape[1] != e:
            raise ValueError(f"weight is (d, e={e}), got {tuple(self.weight.shape)}")
        if self.skip is not None and self.skip.shape not in ((h,), (h, p)):
            raise ValueError(f"skip is (h={h},) or (h={h}, p={p}), got {tuple(self.skip.shape)}")

    @property
    def width(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True)
class Tile:
    """Rows ``start`` to ``stop`` and columns ``left`` to ``right`` of one batch row.

    Attributes:
        place: where the rows stand among those asked for.
        operand: (e, rows, columns) everything but the projection.
    """

    batch: int
    place: slice
    start: int
    stop: int
    left: int
    right: int
    operand: Tensor


def tiles(terms: Terms, rows: list[int], width: int, fused: Any) -> Iterator[Tile]:
    """Every pair of a row asked for and a source not after it, in tiles of bounded size."""
    if not terms.inputs.length:
        return
    on_gpu = terms.inputs.value.is_cuda
    most = _GPU_ROWS if on_gpu else _CPU_ROWS
    budget = _GPU_BYTES if on_gpu else _CPU_BYTES
    for i in range(terms.inputs.batch):
        one = _Row.of(terms, i, fused)
        for place, start, stop in _runs(rows, most):
            columns = max(1, int(budget / one.column_bytes(stop - start, width)))
            for left, right, operand in one.operands(start, stop, columns):
                yield Tile(i, place, start, stop, left, right, operand)


def _runs(rows: list[int], most: int) -> Iterator[tuple[slice, int, int]]:
    """Consecutive positions among the rows, at most ``most`` at a time: their place, first, and last plus one."""
    first = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1 or i - first == most:
            yield slice(first, i), rows[first], rows[i - 1] + 1
            first = i


@dataclass(frozen=True)
class _Row:
    """One batch row, time last.

    Attributes:
        inputs: b = 1, in the compute dtype, without a graph.
        sources: (k, e, t).
        gate: (e, t).
        skip: (h, p) or None.
        fused: the kernels that make operands here, None for PyTorch.
        parts: the row as they take it.
    """

    inputs: ScanInputs
    sources: Tensor
    gate: Tensor
    skip: Tensor | None
    fused: Any
    parts: Any

    @classmethod
    def of(cls, terms: Terms, i: int, fused: Any) -> _Row:
        x = terms.inputs.map(torch.detach).replace(initial=None)
        one = x.replace(**{k: z[i : i + 1] for k, z in x.tensors().items() if k != "A"}).cast()
        sources, gate = terms.sources[i].detach(), terms.gate[i].detach()
        skip = None if terms.skip is None else terms.skip.detach().to(x.dtype).view(x.n_heads, -1)
        skip = None if skip is None else skip.expand(-1, x.head_dim)
        if fused is not None:
            parts = fused.Parts.of(one, sources, gate, skip)
            return cls(one, parts.sources, parts.gate, parts.skip, fused, parts)
        return cls(
            one, sources.to(x.dtype).mT.contiguous(), gate.to(x.dtype).mT.contiguous(), skip, None, None
        )  # fmt: skip

    def column_bytes(self, rows: int, width: int) -> int:
        """Of one column of the operand, of its product with a weight of so many rows, and of what goes into it."""
        e = self.gate.shape[0]
        if self.fused is not None:
            return rows * (6 * e + 4 * width)
        states = 2 * self.inputs.d_state if self.inputs.head_dim == 1 else 0
        return (rows * (e + width) + states * e) * self.gate.element_size()

    def operands(self, start: int, stop: int, columns: int) -> Iterator[tuple[int, int, Tensor]]:
        """Columns ``left`` to ``right`` and the operand (e, rows, right - left), from left to right."""
        reach = self.sources.shape[0] - 1
        with torch.no_grad(), torch.autocast(self.gate.device.type, enabled=False):
            if self.fused is not None:
                yield from self._fused_operands(start, stop, columns)
                return
            far = 0
            if self.inputs.head_dim == 1 and not self.inputs.has_erase:
                far = max(0, start - reach)
                yield from self._far(start, stop, far, columns)
            # Nothing of the block reads a token before `far`, so the matrix may start there.
            matrix = rows_of(self.inputs.slice(far, stop), start - far, stop - far)[0]
            for left in range(far, stop, columns):
                right = min(left + columns, stop)
                near = matrix[..., left - far : right + reach - far]
                yield left, right, self._tapped(near, start, stop, left, right)

    def _fused_operands(self, start: int, stop: int, columns: int) -> Iterator[tuple[int, int, Tensor]]:
        """The same as planes (3 e, rows, columns or more), in whole blocks of columns."""
        block = self.fused.BLOCK
        columns, far = max(block, columns // block * block), 0
        if self.parts.time is not None:
            far = max(0, start - len(self.sources) + 1) // block * block
            for left in range(0, far, columns):
                right = min(left + columns, far)
                yield left, right, self.fused.far(self.parts, start, stop, left, right)
        part = self.inputs.slice(far, stop)
        make = rows_of if part.has_erase else self.fused.rows
        matrix = make(part, start - far, stop - far)[0].contiguous()
        for left in range(far, stop, columns):
            right = min(left + columns, stop)
            yield left, right, self.fused.tapped(self.parts, matrix, far, start, stop, left, right)

    def _far(self, start: int, stop: int, far: int, columns: int) -> Iterator[tuple[int, int, Tensor]]:
        """One channel per head, columns whose taps all end before ``start``: M there is a product of rank n, so the
        taps are summed on its columns, once for all rows."""
        if not far:
            return
        taps = self.sources.shape[0]
        boundary = Boundary.before(self.inputs, start, stop)
        rising = (boundary.rising()[0] * self.gate[:, None, start:stop]).mT  # (h, rows, n)
        for left in range(0, far, columns):
            right = min(left + columns, far)
            falling = boundary.falling(left, right + taps - 1)[0]  # (h, n, columns + k - 1)
            folded = falling[..., : right - left] * self.sources[0, :, None, left:right]
            for k in range(1, taps):
                folded.addcmul_(falling[..., k : k + right - left], self.sources[k, :, None, left:right])
            yield left, right, rising @ folded

    def _tapped(self, matrix: Tensor, start: int, stop: int, left: int, right: int) -> Tensor:
        """Taps, skip and gate on a piece of M, (h, rows, columns and up to k - 1 more)."""
        h, p = self.inputs.n_heads, self.inputs.head_dim
        sources = self.sources[..., left:right].unflatten(1, (h, p))  # (k, h, p, columns)
        out = matrix[:, None, :, : right - left] * sources[0, :, :, None]
        for k in range(1, len(sources)):
            width = min(right - left, matrix.shape[-1] - k)
            if width > 0:
                out[..., :width].addcmul_(matrix[:, None, :, k : k + width], sources[k, :, :, None, :width])
        if self.skip is not None:
            for k in range(len(sources)):
                # The skip of row t is a source at t - k.
                offset = start - k - left
                line = out.diagonal(offset, -2, -1)
                first = max(0, offset)
                line.addcmul_(sources[k, ..., first : first + line.shape[-1]], self.skip[..., None])
        out.mul_(self.gate[:, start:stop].unflatten(0, (h, p))[..., None])
        return out.flatten(0, 1)
