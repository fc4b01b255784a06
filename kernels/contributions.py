"""What every source token adds to every output of a mixer, as vectors, norms or ALTI weights, never all pairs at once.

Around the matrix M of a recurrence a mixer has a short convolution before, and a skip, a gate and a projection
behind. With those held fixed it is linear, and token s adds to output t the vector::

    T[t, s] = weight @ (gate[t] * sum_k (M + skip I)[t, s + k] * sources[s, k])         (d,)

where ``sources[s, k]`` is what token s gives to the scan's value k steps later (LaTIM: Pitorro and Treviso, 2025).
All pairs are t^2 d numbers, so they come in tiles of rows and columns: an operand (e, rows, columns), one matrix
product with ``weight``, and what is asked of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import scan
from .attention_rows import Boundary
from .attention_rows import rows as rows_of
from .inputs import ScanInputs

__all__ = ["Terms", "alti", "norms", "total", "vectors"]

# Rows of a tile, and bytes of its operand and product.
_CPU_ROWS, _GPU_ROWS = 32, 64
_CPU_BYTES, _GPU_BYTES = 96e6, 800e6


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


def norms(terms: Terms, p: float = 2, rows: Sequence[int] | None = None) -> Tensor:
    """Norm of every contribution, (b, len(rows) or t, s), in the compute dtype; exactly 0 for s > t.

    Args:
        terms: the mixer.
        p: order of the norm, at least 1; infinity gives the largest entry.
        rows: output positions (negative ones count from the end); all when None.

    Raises:
        ValueError: a row that does not exist, or p < 1.
    """
    if not p >= 1:
        raise ValueError(f"p is at least 1, got {p}")
    weight = terms.weight.detach().to(terms.inputs.dtype)
    if p == 2 and weight.shape[0] > weight.shape[1]:
        # An orthogonal factor does not change lengths: e rows are enough.
        weight = torch.linalg.qr(weight, mode="r").R

    def measure(product: Tensor, row: Tensor) -> Tensor:
        return torch.linalg.vector_norm(product, ord=p, dim=0)

    return _by_tiles(terms, weight, rows, measure)


def alti(terms: Terms, output: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """How much nearer to each output a contribution brings the sum, as a share of the row, (b, len(rows) or t, s).

    ``max(0, |o[t]|_1 - |o[t] - T[t, s]|_1)`` over its sum along s (Ferrando, Gallego and Costa-jussa 2022, on the
    mixer's output as in LaTIM). A row in which nothing brings it nearer is all zero.

    Args:
        terms: the mixer.
        output: (b, t, d) what the contributions are parts of.
        rows: as for `norms`.

    Raises:
        ValueError: a row that does not exist, or an output of another shape.
    """
    wanted = (terms.inputs.batch, terms.inputs.length, terms.width)
    if tuple(output.shape) != wanted:
        raise ValueError(f"output is (b={wanted[0]}, t={wanted[1]}, d={wanted[2]}), got {tuple(output.shape)}")
    weight = terms.weight.detach().to(terms.inputs.dtype)

    def measure(product: Tensor, row: Tensor) -> Tensor:
        # Entry by entry, so that a zero contribution brings exactly nothing.
        goal = row.mT[..., None]  # (d, rows, 1)
        return goal.abs().sub(product.sub_(goal).abs_()).sum(0).clamp_(min=0)

    nearer = _by_tiles(terms, weight, rows, measure, output.detach().to(terms.inputs.dtype))
    return nearer / nearer.sum(-1, keepdim=True).clamp(min=torch.finfo(nearer.dtype).tiny)


def vectors(terms: Terms, rows: Sequence[int] | None = None) -> Tensor:
    """The contributions themselves, (b, len(rows) or t, s, d): 4 t^2 d bytes and more when all rows are asked for."""
    weight = terms.weight.detach().to(terms.inputs.dtype)
    picked = _rows(terms, rows)
    out = weight.new_zeros(terms.inputs.batch, len(picked), terms.inputs.length, terms.width)
    for tile in _tiles(terms, picked, terms.width):
        out[tile.batch, tile.place, tile.left : tile.right] = _product(weight, tile.operand).permute(1, 2, 0)
    return out


def total(terms: Terms) -> Tensor:
    """All contributions to every output together, (b, t, d), at the cost of one scan."""
    x = terms.inputs.map(torch.detach).cast()
    sources = terms.sources.detach().to(x.dtype)
    value = sources[:, 0].clone()
    for k in range(1, min(sources.shape[1], x.length)):
        value[:, k:] += sources[:, k, :-k]
    return behind(terms, value.view_as(x.value))


def behind(terms: Terms, value: Tensor, initial: Tensor | None = None) -> Tensor:
    """What a scan value (b, t, h, p) and a first state (b, h, p, n) become in the output, (b, t, d); linear."""
    x = terms.inputs.map(torch.detach).cast().replace(value=value, initial=initial)
    y, _ = scan.run(x)
    if terms.skip is not None:
        skip = terms.skip.detach().to(x.dtype)
        y = y + value * (skip[:, None] if skip.ndim == 1 else skip)
    with torch.autocast(y.device.type, enabled=False):
        return (y.flatten(2) * terms.gate.detach().to(x.dtype)) @ terms.weight.detach().to(x.dtype).mT


def _by_tiles(
    terms: Terms,
    weight: Tensor,
    rows: Sequence[int] | None,
    measure: Callable[[Tensor, Tensor], Tensor],
    beside: Tensor | None = None,
) -> Tensor:
    """``measure`` of every tile's product (d, rows, columns) and the rows of ``beside`` (rows, d), put together."""
    picked = _rows(terms, rows)
    out = weight.new_zeros(terms.inputs.batch, len(picked), terms.inputs.length)
    for tile in _tiles(terms, picked, weight.shape[0]):
        goal = weight if beside is None else beside[tile.batch, tile.start : tile.stop]
        out[tile.batch, tile.place, tile.left : tile.right] = measure(_product(weight, tile.operand), goal)
    return out


def _product(weight: Tensor, operand: Tensor) -> Tensor:
    with torch.autocast(weight.device.type, enabled=False):
        return (weight @ operand.flatten(1)).view(-1, *operand.shape[1:])


def _rows(terms: Terms, rows: Sequence[int] | None) -> list[int]:
    length = terms.inputs.length
    if rows is None:
        return list(range(length))
    for t in rows:
        if not -length <= t < length:
            raise ValueError(f"position {t} is outside the sequence of {length} tokens")
    return [t % length for t in rows]


@dataclass(frozen=True)
class _Tile:
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


def _tiles(terms: Terms, rows: list[int], width: int) -> Iterator[_Tile]:
    """Every pair of a row asked for and a source not after it, in tiles of bounded size."""
    if not terms.inputs.length:
        return
    most = _GPU_ROWS if terms.inputs.value.is_cuda else _CPU_ROWS
    budget = _GPU_BYTES if terms.inputs.value.is_cuda else _CPU_BYTES
    for i in range(terms.inputs.batch):
        one = _Row.of(terms, i)
        for place, start, stop in _runs(rows, most):
            pair = (one.channels + width) * one.gate.element_size()
            columns = max(1, int(budget / (pair * (stop - start))))
            for left, right, operand in one.operands(start, stop, columns):
                yield _Tile(i, place, start, stop, left, right, operand)


def _runs(rows: list[int], most: int) -> Iterator[tuple[slice, int, int]]:
    """Consecutive positions among the rows, at most ``most`` at a time: their place, the first, and one past the last."""
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
    """

    inputs: ScanInputs
    sources: Tensor
    gate: Tensor
    skip: Tensor | None

    @classmethod
    def of(cls, terms: Terms, i: int) -> _Row:
        x = terms.inputs.map(torch.detach).replace(initial=None)
        one = x.replace(**{k: z[i : i + 1] for k, z in x.tensors().items() if k != "A"}).cast()
        sources = terms.sources[i].detach().to(x.dtype).mT.contiguous()
        gate = terms.gate[i].detach().to(x.dtype).mT.contiguous()
        skip = None if terms.skip is None else terms.skip.detach().to(x.dtype).view(x.n_heads, -1)
        return cls(one, sources, gate, None if skip is None else skip.expand(-1, x.head_dim))

    @property
    def channels(self) -> int:
        return self.gate.shape[0]

    def operands(self, start: int, stop: int, columns: int) -> Iterator[tuple[int, int, Tensor]]:
        """Columns ``left`` to ``right`` and the operand (e, rows, right - left), from left to right."""
        reach = self.sources.shape[0] - 1
        with torch.no_grad(), torch.autocast(self.gate.device.type, enabled=False):
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
