"""Square roots of the Gramians of a recurrence, and from them the singular values of every block of its matrix.

The block of M that leads from the tokens before a cut i to those from it on is a product of two thin factors::

    M[t, s] = write[s] . T[s+1] ... T[i-1]  .  T[i] ... T[t] . read[t]          s < i <= t
              row s of the controllability factor, row t of the observability factor

with T[r] the step of the state (a diagonal decay, with a delta rule times I - erase_read erase_write'). Only the
triangular part of each factor's QR decomposition matters. It is carried from cut to cut, forward for the first
factor and backward for the second, so that no block of M ever exists. The singular values of a block are those of
the small product of the two triangles; taking the eigenvalues of the product of Gramians instead would square them
and lose all below 1e-8 of the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ssmlens.recurrence import Recurrence

__all__ = ["block_spectra", "dense_spectra"]


@dataclass(frozen=True)
class _Terms:
    """The pieces of some heads' recurrence in float64, one row for each (batch row, head): (r, t, ...)."""

    decay: Tensor
    write: Tensor
    read: Tensor
    erase_read: Tensor | None
    erase_write: Tensor | None

    @classmethod
    def of(cls, rec: Recurrence, heads: slice) -> _Terms:
        part = Recurrence(rec.inputs.select_heads(heads).cast(torch.float64), lengths=rec.lengths)
        real = part.real[:, :, None, None]

        def rows(x: Tensor | None) -> Tensor | None:
            # Padding neither decays nor writes nor reads, whatever stands there.
            return None if x is None else x.where(real, 0.0).transpose(1, 2).flatten(0, 1)

        decay, write, read = rows(part.log_decay), rows(part.write), rows(part.read)
        assert decay is not None
        assert write is not None
        assert read is not None
        return cls(decay, write, read, rows(part.erase_read), rows(part.erase_write))

    def arrive(self, carried: Tensor, start: int, stop: int) -> Tensor:
        """Rows (r, k, n) after token start-1 and the writes of start to stop-1, all as they are after stop-1."""
        if self.erase_read is None or self.erase_write is None:
            decay = self.decay[:, start:stop]
            # What is left at the end: the sum over the tokens after each, in log space, so that a reset is 0.
            after = decay.flip(1).cumsum(1).flip(1)
            later = torch.cat([after[:, 1:], torch.zeros_like(decay[:, :1])], dim=1)
            return torch.cat([carried * after[:, :1].exp(), self.write[:, start:stop] * later.exp()], dim=1)
        for s in range(start, stop):
            carried = carried * self.decay[:, s : s + 1].exp()
            carried = carried - (carried @ self.erase_read[:, s, :, None]) * self.erase_write[:, s : s + 1]
            carried = torch.cat([carried, self.write[:, s : s + 1]], dim=1)
        return carried

    def leave(self, carried: Tensor, start: int, stop: int) -> Tensor:
        """Reads (r, k, n) of the state after stop-1 and those of start to stop-1, all of the state after start-1."""
        if self.erase_read is None or self.erase_write is None:
            upto = self.decay[:, start:stop].cumsum(1)
            return torch.cat([self.read[:, start:stop] * upto.exp(), carried * upto[:, -1:].exp()], dim=1)
        for t in range(stop - 1, start - 1, -1):
            carried = torch.cat([self.read[:, t : t + 1], carried], dim=1)
            carried = carried - (carried @ self.erase_write[:, t, :, None]) * self.erase_read[:, t : t + 1]
            carried = carried * self.decay[:, t : t + 1].exp()
        return carried


def _triangle(rows: Tensor) -> Tensor:
    """(r, min(k, n), n) upper triangle with the Gramian of rows (r, k, n)."""
    return torch.linalg.qr(rows, mode="r").R if rows.shape[1] > 1 else rows


def block_spectra(rec: Recurrence, cuts: Sequence[int], heads: slice) -> Tensor:
    """Singular values of M[cut:, :cut], (b, heads, cuts, n) in float64, largest first, zeros beyond the rank.

    Args:
        rec: the recurrence; its initial state is no part of M.
        cuts: increasing positions from 1 to t - 1.
        heads: which heads.
    """
    terms = _Terms.of(rec, heads)
    count, n = terms.write.shape[0], rec.d_state
    empty = terms.write.new_zeros(count, 0, n)
    bounds = [0, *cuts, rec.length]
    past, carried = [], empty
    for start, stop in pairwise(bounds[:-1]):
        carried = _triangle(terms.arrive(carried, start, stop))
        past.append(carried)
    values = terms.write.new_zeros(count, len(cuts), n)
    carried = empty
    for i in reversed(range(len(cuts))):
        carried = _triangle(terms.leave(carried, bounds[i + 1], bounds[i + 2]))
        found = torch.linalg.svdvals(carried @ past[i].mT)
        values[:, i, : found.shape[-1]] = found
    return values.unflatten(0, (rec.batch, -1))


def dense_spectra(matrix: Tensor, cuts: Sequence[int]) -> Tensor:
    """Singular values of matrix[..., cut:, :cut], (..., cuts, k) in float64, zeros beyond the smaller side."""
    length = matrix.shape[-1]
    width = max(min(i, length - i) for i in cuts)
    values = matrix.new_zeros(*matrix.shape[:-2], len(cuts), width, dtype=torch.float64)
    for k, i in enumerate(cuts):
        values[..., k, : min(i, length - i)] = torch.linalg.svdvals(matrix[..., i:, :i].double())
    return values
