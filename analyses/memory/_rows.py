"""How far back a row of the implicit attention reaches: mean, spread and quantile of the distance of abs(M)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ssmlens.analyses._layers import block_entries, head_blocks
from ssmlens.attention import ImplicitAttention
from ssmlens.recurrence import Recurrence

__all__ = ["REDUCTIONS", "distance_statistics", "last_rows", "reduce_heads", "row_distances", "uniform_distances"]

REDUCTIONS = ("none", "mean", "median", "pooled")
"""How the heads of a layer are summarised; see `ssmlens.analyses.memory.mean_distance`."""

DENSE_ENTRIES = 2**24
"""Entries of the largest matrix that is held to read many of its rows."""

ROUNDING = 1e-12
"""Relative slack when a cumulative sum is compared with a share of its total."""


def last_rows(rec: Recurrence) -> Tensor:
    """Index of the last real token of each batch row, (b, 1)."""
    return rec.real_lengths.to("cpu", torch.long)[:, None] - 1


def row_distances(rec: Recurrence, rows: Tensor, quantile: float | None, pooled: bool) -> dict[str, Tensor]:
    """Distances of the sources of chosen rows.

    Args:
        rec: the recurrence.
        rows: (b, k) rows of M, one list per batch row; -1 gives NaN.
        quantile: share of abs(M) that the quantile distance holds; None leaves out quantile and spread.
        pooled: add abs(M) over heads first.

    Returns:
        "value" and, with a quantile, "spread" and "quantile": (b, k, h), or (b, k, 1) when pooled. All in float64.
    """
    wanted = sorted({int(t) for t in rows.unique() if t >= 0})
    heads = 1 if pooled else rec.n_heads
    names = ("value",) if quantile is None else ("value", "spread", "quantile")
    out = {name: torch.full((*rows.shape, heads), torch.nan, dtype=torch.float64) for name in names}
    if quantile is None and not pooled:
        found = rec.attention.distance(wanted).to("cpu", torch.float64)  # (b, h, len(wanted))
        for i, t in enumerate(wanted):
            _place(out["value"], rows, t, found[:, :, i])
        return out
    for t, some, mass in _rows_of_mass(rec, wanted, pooled):
        for name, x in zip(names, distance_statistics(mass, quantile)):
            _place(out[name][..., some], rows, t, x.cpu())
    return out


def uniform_distances(rows: Tensor, quantile: float | None) -> dict[str, Tensor]:
    """The same statistics of a row that weighs all its t + 1 sources equally, in closed form, (b, k)."""
    t = rows.double().where(rows >= 0, torch.nan)
    uniform = {"value": t / 2}
    if quantile is not None:
        uniform["spread"] = ((t + 1).square() - 1).div(12).sqrt()
        uniform["quantile"] = (quantile * (t + 1) * (1 - ROUNDING)).ceil() - 1
    return uniform


def reduce_heads(x: Tensor, how: str) -> Tensor:
    """One number for the heads on the last axis, as `REDUCTIONS` names it; heads that are NaN are left out."""
    if how == "mean":
        return x.nanmean(-1)
    if how == "median":
        return x.nanquantile(0.5, dim=-1)
    return x.squeeze(-1) if how == "pooled" else x


def _place(out: Tensor, rows: Tensor, t: int, x: Tensor) -> None:
    """Write the (b, h) numbers of row t wherever row t was asked for."""
    batch, position = (rows == t).nonzero(as_tuple=True)
    out[batch, position] = x[batch]


def _rows_of_mass(rec: Recurrence, wanted: list[int], pooled: bool) -> Iterator[tuple[int, slice, Tensor]]:
    """Each wanted row t of some heads with abs(M) by distance, (b, heads, t + 1): entry k is k tokens back."""
    attention = rec.attention
    square = rec.batch * rec.length**2
    # One pass over whole matrices, a few heads at a time, is cheaper than many rows, while a matrix is small.
    if not pooled and len(wanted) * 2 > rec.length and square <= DENSE_ENTRIES:
        width = max(1, block_entries(rec) // square)
        for start in range(0, rec.n_heads, width):
            heads = slice(start, min(start + width, rec.n_heads))
            dense = attention.dense(heads=heads)
            for t in wanted:
                yield t, heads, _by_distance(dense[:, :, t], t)
        return
    for t in wanted:
        total = torch.zeros((), dtype=torch.float64, device=rec.device)
        for heads in head_blocks(rec, rec.batch * (t + 1)):
            some = rec.inputs if heads == slice(0, rec.n_heads) else rec.inputs.select_heads(heads)
            mass = _by_distance(ImplicitAttention(some).row(t), t)
            if pooled:
                total = total + mass.sum(1, keepdim=True)
            else:
                yield t, heads, mass
        if pooled:
            yield t, slice(None), total


def _by_distance(row: Tensor, t: int) -> Tensor:
    return row[..., : t + 1].abs().double().flip(-1)


def distance_statistics(mass: Tensor, quantile: float | None) -> tuple[Tensor, ...]:
    """Mean, and with a quantile spread and quantile, of the distance under ``mass`` (b, h, t + 1)."""
    distance = torch.arange(mass.shape[-1], dtype=mass.dtype, device=mass.device)
    cumulative = mass.cumsum(-1)
    total = cumulative[..., -1]
    known = (total > 0) & total.isfinite()
    share = mass / total[..., None]
    mean = (share * distance).sum(-1)
    if quantile is None:
        return (mean.where(known, torch.nan),)
    spread = (share * (distance - mean[..., None]).square()).sum(-1).sqrt()
    enough = cumulative >= (quantile * (1 - ROUNDING) * total)[..., None]
    reach = enough.double().argmax(-1).double()
    return tuple(x.where(known, torch.nan) for x in (mean, spread, reach))
