"""Mean distance: how far back the implicit attention reaches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmlens.analyses._layers import Layers, Source, collect, positions, shares
from ssmlens.analyses._result import Result
from ssmlens.analyses.memory import _rows as distances
from ssmlens.analyses.memory._assumes import GEOMETRIC_KERNEL, READING

__all__ = ["mean_distance"]


def mean_distance(
    source: Source,
    rows: str | Sequence[int] = "last",
    *,
    quantile: float | None = 0.9,
    reduce: str = "none",
) -> Result:
    """How far back the implicit attention reaches: sum_s (t - s) |M[t, s]| / sum_s |M[t, s]|, in tokens.

    The "Mamba mean distance" of DeciMamba (Ben-Kish et al., ICLR 2025), from the real rows of M, dt of the source
    included. A mean hides a profile with two peaks, so spread and a quantile come with it.

    Args:
        source: a trace, one mixer's trace or a recurrence.
        rows: "last" (the published choice: the last real token of each batch row), "all", or token indices;
            negative counts from the end of each row. All rows cost O(t^2) per head.
        quantile: ``distance_q90`` for 0.9 is the smallest distance within which that share of |M| lies, and
            ``spread`` the standard deviation. None leaves out both, which is cheaper for rows="all".
        reduce: how the heads of a layer are joined.
            "none": every head on its own axis.
            "mean": mean over heads, as published; heads whose row is all zero are left out.
            "median": middle head, the same left out.
            "pooled": |M| summed over heads first, so that heads count by how much they read.

    Returns:
        Result with axes (batch, head), or (batch, row, head) for chosen rows, without ``head`` when reduced; NaN for
        a row that is all zero or padding. ``fraction_of_uniform`` is the value over t / 2; NaN for t = 0. The
        controls are the same statistics of a row that weighs its t + 1 sources equally.

    Raises:
        ValueError: for an unknown choice, a quantile outside 0 to 1, or a row that does not exist.
    """
    layers = collect(source)
    last = isinstance(rows, str) and rows == "last"
    if reduce not in distances.REDUCTIONS:
        raise ValueError(f"unknown reduction {reduce!r}: choose one of {', '.join(distances.REDUCTIONS)}")
    if quantile is not None:
        (quantile,) = shares([quantile])
    where, labels = _rows(layers, rows)
    names = {"value": "uniform_distance"}
    if quantile is not None:
        names |= {"spread": "uniform_spread", "quantile": f"uniform_q{100 * quantile:g}"}
    uniform = {names[k]: x[..., None] for k, x in distances.uniform_distances(where, quantile).items()}
    parts = []
    for rec in layers:
        found = distances.row_distances(rec, where, quantile, pooled=reduce == "pooled")
        part = {k: distances.reduce_heads(x, reduce).reshape(*x.shape[:2], -1) for k, x in found.items()}
        if quantile is not None:
            part[f"distance_q{100 * quantile:g}"] = part.pop("quantile")
        fraction = part["value"] / uniform["uniform_distance"]
        part["fraction_of_uniform"] = fraction.where(uniform["uniform_distance"] > 0, torch.nan)
        part |= {k: x.expand_as(part["value"]) for k, x in uniform.items()}
        parts.append({k: _squeeze(x, last, reduce != "none") for k, x in part.items()})
    axes = ["batch", *(["row"] if not last else []), *(["head"] if reduce == "none" else [])]
    return layers.result(
        parts,
        axes,
        {} if last else {"row": labels},
        name="mean_distance",
        units="tokens",
        control=tuple(uniform),
        settings={"rows": rows if isinstance(rows, str) else labels, "quantile": quantile, "reduce": reduce},
        assumes=READING,
        checked_by=GEOMETRIC_KERNEL,
    )


def _squeeze(x: Tensor, rows: bool, heads: bool) -> Tensor:
    """(b, k, h) without the row axis, the head axis, or both."""
    x = x[..., 0] if heads else x
    return x[:, 0] if rows else x


def _rows(layers: Layers, rows: str | Sequence[int]) -> tuple[Tensor, list[int]]:
    """The rows to read, (b, k) with -1 for padding, and their labels."""
    rec = next(iter(layers))
    if isinstance(rows, str):
        if rows not in ("last", "all"):
            raise ValueError(f"unknown rows {rows!r}: choose last, all or a list of token indices")
        if rows == "last":
            return distances.last_rows(rec), []
        rows = range(int(layers.lengths.max()))
    return positions(layers, rows), [int(t) for t in rows]
