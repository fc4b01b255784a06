"""From the log growth of tangents to exponents with an error, in all of time or in windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._result import Result
from ssmlens.analyses.lyapunov._benettin import Growth, Plan
from ssmlens.errors import SsmlensError

__all__ = ["BLOCKS", "block_means", "bootstrap", "describe"]

BLOCKS = 20
"""Stretches of time that the error of a mean is taken from."""

RESAMPLES = 2000
"""Draws of the block bootstrap."""

CONDITION = math.log(1e6)
"""Largest log ratio of the fastest and the slowest tangent between two re-orthonormalisations that is unproblematic."""


def block_means(x: Tensor, lengths: Tensor, blocks: int = BLOCKS) -> Tensor:
    """Means per step over contiguous stretches, (blocks, ...), of sums x (intervals, ...) over ``lengths`` steps."""
    parts = torch.arange(len(x)).tensor_split(max(1, min(blocks, len(x))))
    return torch.stack([x[i].sum(0) / lengths[i].sum() for i in parts])


def bootstrap(means: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Standard error, 2.5 % and 97.5 % of the mean of block means (blocks, ...), by resampling the blocks.

    All three are NaN for fewer than two blocks; a mean of -inf has the error 0.
    """
    if len(means) < 2:
        unknown = torch.full(means.shape[1:], torch.nan, dtype=torch.float64)
        return unknown, unknown, unknown
    finite = means.isfinite().all(0)
    safe = torch.where(finite, means, 0.0)
    draws = torch.randint(len(means), (RESAMPLES, len(means)), generator=torch.Generator().manual_seed(seed))
    resampled = torch.stack([safe[i].mean(0) for i in draws])
    ends = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    whole = means.mean(0)
    low, high = (torch.where(finite, x, whole) for x in ends)
    return torch.where(finite, safe.std(0) / len(means) ** 0.5, 0.0), low, high


def describe(
    growth: Growth,
    plan: Plan,
    *,
    dt: float,
    window: int | None,
    units: str,
    settings: Mapping[str, Any],
    assumes: tuple[str, ...],
    checked_by: str,
    control: Mapping[str, Tensor] | None = None,
    name: str = "lyapunov",
) -> Result:
    """The result of one orbit: exponents (exponent,), or (window, exponent) with those of stretches of time.

    Args:
        growth: of the tangents.
        plan: by which they were followed.
        dt: time of one step.
        window: steps of a stretch, or None.
        units: of the exponents.
        settings: how it was computed and from what, added to the plan.
        assumes: sentences.
        checked_by: what the tests hold it to.
        control: values to compare with, (k,) each.
        name: of the result.
    """
    total = growth.lengths.sum()
    mean = growth.logs.sum(0) / total / dt
    order = mean.argsort(descending=True, stable=True)
    error, low, high = (x[order] for x in bootstrap(block_means(growth.logs, growth.lengths) / dt))
    columns = {"standard_error": error, "low": low, "high": high, "vanished": growth.vanished[order]}
    extra = dict(control or {})
    if growth.other is not None:
        extra["other_start"] = (growth.other / dt).sort(descending=True).values
    mean = mean[order]
    spread = float(mean[0] - mean[mean.isfinite()][-1]) * dt * plan.every if bool(mean.isfinite().any()) else 0.0
    about = {**settings, **vars(plan), "dt": dt, "sum": float(mean.sum()), "dimensions": growth.state.numel()}
    about |= {"interval": f"95 %, bootstrap of {min(BLOCKS, len(growth.logs))} blocks of time", "spread": spread}
    if spread > CONDITION:
        assumes += (
            f"the tangents grow apart by e^{spread:.1f} between two re-orthonormalisations, more than a millionfold: "
            "the smallest exponents are sure only if a smaller `every` gives them again",
        )
    dims: tuple[str, ...] = ("exponent",)
    value = mean
    coords = {"exponent": list(range(1, len(mean) + 1))}
    if window is not None:
        starts, value = _windows(growth, window)
        value, dims = value[:, order] / dt, ("window", "exponent")
        coords["window"] = [plan.discard + s for s in starts]
        columns["mean"] = mean
        about["window"] = window
    return Result(
        name=name,
        value=value,
        dims=dims,
        units=units,
        coords=coords,
        columns=columns,
        control=extra,
        settings=about,
        assumes=assumes,
        checked_by=checked_by,
    )


def _windows(growth: Growth, window: int) -> tuple[list[int], Tensor]:
    """First measured step of each whole window, and the exponents inside it (windows, k)."""
    ends = growth.lengths.cumsum(0)
    total = int(ends[-1])
    if not 1 <= window <= total:
        raise SsmlensError(f"window is between 1 and the {total} measured steps, got {window}")
    zero = torch.zeros(1, dtype=torch.float64)
    edges = torch.arange(0, total - window + 1, window)
    marks = torch.cat([zero, ends])
    first = torch.searchsorted(marks, edges.double())
    last = torch.searchsorted(marks, (edges + window).double())
    if not (bool((marks[first] == edges).all()) and bool((marks[last] == edges + window).all())):
        raise SsmlensError(f"window is a multiple of the steps between two re-orthonormalisations, got {window}")
    value = torch.stack([growth.logs[a:z].sum(0) / window for a, z in zip(first, last)])
    return edges.tolist(), value
