"""The implicit attention of a recurrence, as an operator.

``M[t, s] = sum_n read[t, n] * exp(sum_{r=s+1..t} log_decay[r, n]) * write[s, n]`` for s <= t, and exactly 0 above the
diagonal. It has one meaning: ``y = M value + skip`` (Ali, Zimerman and Wolf, "The Hidden Attention of Mamba Models",
ACL 2025, with the dt factor of the source included). It is signed and unnormalised: not a probability.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from ssmlens.errors import MemoryLimitError
from ssmlens.kernels import attention as tiles
from ssmlens.kernels.inputs import ScanInputs

__all__ = ["DENSE_LIMIT", "REDUCTIONS", "ImplicitAttention"]

DENSE_LIMIT = 2e9
"""Bytes that the result of `ImplicitAttention.dense` or `reduce` may take unless told otherwise."""

Heads = int | slice | Sequence[int] | Tensor | None
"""Which heads take part: one, a slice, a list, or all."""

REDUCTIONS = ("mean", "mean_abs", "max_abs", "norm")
"""Names that `ImplicitAttention.reduce` takes."""


@dataclass(frozen=True, eq=False)
class ImplicitAttention:
    """The matrix M of every head, never stored unless asked for.

    One matrix serves all channels p of a head, for every family: transitions act on the state axis n only. The
    initial state of the recurrence is no source token and has no column.
    """

    inputs: ScanInputs
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(b, h, t, s) of the dense matrix."""
        i = self.inputs
        return (i.batch, i.n_heads, i.length, i.length)

    @property
    def T(self) -> ImplicitAttention:
        """The adjoint operator: ``(M.T.apply(y) * x).sum() == (y * M.apply(x)).sum()``."""
        return replace(self, transposed=not self.transposed)

    def dense(self, heads: Heads = None, limit: float | int = DENSE_LIMIT) -> Float[Tensor, "b h t s"]:
        """The matrices of some heads, (b, h, t, s).

        Args:
            heads: one head, a slice or a list; all by default.
            limit: bytes that the result may take.

        Raises:
            MemoryLimitError: before allocating, when the result would exceed ``limit`` bytes.
            IndexError: when a head does not exist.
        """
        chosen = self._heads(heads)
        count = self.inputs.n_heads if chosen is None else len(chosen)
        self._check_size("dense()", f"{count} heads x ", count, limit, "pass heads=..., use row(t), reduce(how)")
        full = tiles.dense(self.inputs, heads=chosen)
        return full.mT if self.transposed else full

    def row(self, t: int) -> Float[Tensor, "b h s"]:
        """What position ``t`` reads from every source, (b, h, s), at linear cost; negative t counts from the end."""
        t = self._position(t)
        return tiles.column(self.inputs, t) if self.transposed else tiles.row(self.inputs, t)

    def column(self, s: int) -> Float[Tensor, "b h t"]:
        """What source ``s`` gives to every position, (b, h, t), at linear cost; negative s counts from the end."""
        s = self._position(s)
        return tiles.row(self.inputs, s) if self.transposed else tiles.column(self.inputs, s)

    def apply(self, x: Float[Tensor, "b t h p"]) -> Float[Tensor, "b t h p"]:
        """M x along time, like ``x``, at linear cost. Any number of channels p.

        Differentiable; of the adjoint ``T`` only the values are given, without gradients.
        """
        b, h, t, _ = self.shape
        if x.ndim != 4 or tuple(x.shape[:3]) != (b, t, h):
            raise ValueError(f"x is (b={b}, t={t}, h={h}, p), got {tuple(x.shape)}")
        return tiles.adjoint(self.inputs, x) if self.transposed else tiles.apply(self.inputs, x)

    def reduce(self, how: str, heads: Heads = None, limit: float | int = DENSE_LIMIT) -> Float[Tensor, "b t s"]:
        """One map over heads, (b, t, s), never holding (b, h, t, s).

        Args:
            how: "mean" (signed), "mean_abs", "max_abs" or "norm" (root of the sum of squares over heads).
            heads: which heads take part; all by default.
            limit: bytes that the result may take.

        Raises:
            ValueError: for an unknown reduction.
            MemoryLimitError: before allocating, when the result would exceed ``limit`` bytes.
            IndexError: when a head does not exist.
        """
        if how not in REDUCTIONS:
            raise ValueError(f"unknown reduction {how!r}: choose one of {', '.join(REDUCTIONS)}")
        chosen = self._heads(heads)
        self._check_size("reduce()", "", 1, limit, "use row(t)")
        full = tiles.reduce(self.inputs, how, heads=chosen)
        return full.mT if self.transposed else full

    def distance(self, rows: Sequence[int] | None = None) -> Float[Tensor, "b h k"]:
        """Mean distance of the sources of each row in tokens, weighted by abs(M), (b, h, len(rows) or t).

        NaN where a row is all zero. This is the "Mamba mean distance" of DeciMamba (Ben-Kish et al., ICLR 2025)
        per head and row; row 0 gives 0.
        """
        return tiles.distance(self.inputs, rows=self._rows("distance", rows))

    def quantile(self, q: float | Sequence[float], rows: Sequence[int] | None = None) -> Float[Tensor, "b h k *q"]:
        """Distance in tokens, back from each row, within which a share q of its abs(M) lies, (b, h, len(rows) or t).

        The smallest d with at least q of the row's abs(M) at sources t - d to t; a sequence of shares adds an axis
        (b, h, rows, len(q)). NaN where a row is all zero. Whole rows are never held for all heads and rows at once.

        Raises:
            ValueError: when a share is not above 0 and at most 1, or for the transposed operator.
            IndexError: when a row does not exist.
        """
        return tiles.quantile(self.inputs, q, rows=self._rows("quantile", rows))

    def topk(
        self, k: int, rows: Sequence[int] | None = None
    ) -> tuple[Float[Tensor, "b h r k"], Int[Tensor, "b h r k"]]:
        """The k largest sources of each row by abs(M): signed values and positions, (b, h, len(rows) or t, k) each.

        Largest first, the nearest first among equals. An entry of exactly 0 is no source: where fewer than k are left,
        the value is 0 and the position -1.

        Raises:
            ValueError: when k is below 1, or for the transposed operator.
            IndexError: when a row does not exist.
        """
        return tiles.topk(self.inputs, operator.index(k), rows=self._rows("topk", rows))

    def _rows(self, call: str, rows: Sequence[int] | None) -> list[int] | None:
        if self.transposed:
            raise ValueError(f"{call}() reads rows of M, not of its transpose: use attention.{call}(...)")
        return None if rows is None else [self._position(t) for t in rows]

    def _check_size(self, call: str, heads: str, count: int, limit: float | int, advice: str) -> None:
        b, _, t, s = self.shape
        size = b * count * t * s * self.inputs.dtype.itemsize
        if size > limit:
            rows = f"{b} x " if b > 1 else ""
            raise MemoryLimitError(
                f"{call} of {rows}{heads}{t} x {s} {str(self.inputs.dtype).removeprefix('torch.')} needs "
                f"{size / 1e9:.1f} GB (limit {limit / 1e9:.1f} GB): {advice} or apply(x)"
            )

    def _position(self, t: int) -> int:
        length = self.inputs.length
        if not -length <= t < length:
            raise IndexError(f"position {t} is outside the {length} tokens of this attention")
        return operator.index(t) % length

    def _heads(self, heads: Heads) -> list[int] | None:
        n = self.inputs.n_heads
        if heads is None:
            return None
        if isinstance(heads, slice):
            picked = list(range(n)[heads])
        else:
            picked = [operator.index(h) for h in (heads if isinstance(heads, Iterable) else [heads])]
        wrong = [h for h in picked if not -n <= h < n]
        if wrong or not picked:
            what = f"head {wrong[0]} does not exist" if wrong else "no head was chosen"
            raise IndexError(f"{what}: this layer has heads 0 to {n - 1}")
        return [h % n for h in picked]

    def __repr__(self) -> str:
        b, h, t, s = self.shape
        return f"ImplicitAttention(batch={b}, heads={h}, {t} x {s}{', transposed' if self.transposed else ''})"
