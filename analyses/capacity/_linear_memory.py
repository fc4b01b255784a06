"""Linear memory capacity: how much of each past input a linear readout can recover, with and without noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ssmlens.analyses._result import Result

__all__ = ["CHECKED", "LINEAR", "Features", "basis", "memory_capacity", "series", "unbiased"]

Features = Tensor | np.ndarray | Callable[[Tensor], Tensor]
"""States (t, n) that an input has left, or a reservoir: a function from inputs (t,) to them."""

BLOCKS = 20
DRAWS = 999
RIDGES = (1e-12, 1e-9, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

WHITE = "the input is white: with correlated inputs a readout guesses the past from the present, and MC can exceed n"
LINEAR = "linear readout of the features; information_processing_capacity counts what is kept in other forms"
CORRECTED = (
    "the value is in-sample, less chance; where held_out lies far below it, the features wander more slowly than the "
    "samples can tell, and the value is too high"
)
CHECKED = (
    "orthogonal reservoir n, leaky unit (1 - a^2) a^(2k), diagonal recurrences in closed form: checks.py of this study"
)


def memory_capacity(
    features: Features,
    inputs: Tensor | np.ndarray,
    lags: int | Sequence[int] | None = None,
    *,
    noise: float = 0.0,
    orthogonal: bool = True,
    ridge: float | None = None,
    washout: int | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Result:
    """How well u[t-k] can be read linearly off the features at t, lag by lag; the sum is the memory capacity.

    MC_k is the squared multiple correlation p_k' R^-1 p_k / var(u), with R the covariance of the features and p_k
    their covariance with u[t-k] (Jaeger 2001). For white input the sum over all lags is at most the rank of R.

    Args:
        features: (t, n), or a function from inputs (t,) to (t, n).
        inputs: (t,) scalar input.
        lags: the largest lag, or the lags themselves; by default 0 to min(20 n, t / 50).
        noise: eps; adds eps tr(R) / n to the diagonal of R: white noise on the features of eps times their mean
            variance. Features that differ little cannot be told apart then.
        orthogonal: make the lagged inputs orthogonal in the sample (symmetrically). For white input they are so but
            for sampling error, which then no longer enters: the total cannot exceed the rank. With correlated input
            this asks for what is new in u[t-k]; False asks for u[t-k] itself.
        ridge: penalty of the held-out readout, as a share of the features' mean variance; by default the one of
            several from 1e-12 to 1 that predicts best.
        washout: first samples that are left out; by default the largest lag.
        folds: shares of the time, each predicted by a readout trained on the others; each is spread over 20
            stretches, so that a slow drift of the features does not leave a fold outside of what was trained on.
        seed: of the shuffled control and the bootstrap.

    Returns:
        Result with axis (lag): MC_k less what chance contributes, so that ``value.sum()`` estimates the total.
        Columns: ``raw``, the squared correlation itself; ``held_out``, the R^2 of predictions for stretches not
        trained on, with its 95 % block-bootstrap interval ``low`` to ``high`` (negative: worse than the mean);
        ``total`` and ``total_held_out`` with ``total_low`` to ``total_high``; ``information``, -ln(1 - MC_k) / 2 nats,
        the mutual information where all is Gaussian. Controls: ``chance``, what ``raw`` is without any memory;
        ``shuffled``, the value for features in random order; ``rank``, the upper bound of the total.

    Raises:
        ValueError: when shapes do not fit, or the samples are too few for the features and lags.

    Source:
        Jaeger, "Short term memory in echo state networks" (2001).
    """
    states, u = series(features, inputs)
    count, size = states.shape
    chosen = _lags(lags, size, count)
    skip = max(max(chosen), washout or 0)
    _enough(count - skip, size, len(chosen))
    if noise < 0 or (ridge is not None and ridge < 0):
        raise ValueError(f"noise and ridge are at least 0, got {noise} and {ridge}")
    targets = torch.stack([u[skip - k : count - k] for k in chosen], dim=1)
    targets = targets - targets.mean(0)
    targets = targets / targets.square().sum(0).sqrt()
    left, spread = basis(states[skip:])
    samples, power = len(left), spread.square()
    keep = power / (power + noise * power.sum() / size)
    root = _inverse_root(targets.mT @ targets) if orthogonal else None
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(samples, generator=generator)
    value = unbiased(left.mT @ targets, root, keep, samples)
    shuffled = unbiased(left[order].mT @ targets, root, keep, samples)
    penalties = RIDGES if ridge is None else (ridge,)
    held, ridge = _held_out(left * spread, targets, penalties, folds, generator)
    return Result(
        name="memory_capacity",
        value=value,
        dims=("lag",),
        units="1",
        coords={"lag": chosen},
        columns={
            "raw": (keep[:, None] * (left.mT @ targets).square()).sum(0),
            **held,
            "total": value.sum(),
            "information": -0.5 * torch.log1p(-value.clamp(0, 1)),
        },
        control={
            "chance": (keep.sum() / (samples - 1)).expand(len(chosen)).clone(),
            "shuffled": shuffled,
            "rank": torch.tensor(float(len(spread))),
        },
        settings={
            "samples": samples,
            "features": size,
            "noise": noise,
            "orthogonal": orthogonal,
            "ridge": ridge,
            "washout": skip,
            "folds": folds,
            "seed": seed,
            "interval": f"95 %, bootstrap over {BLOCKS} blocks of held-out samples, {DRAWS} draws",
        },
        assumes=(WHITE, LINEAR, CORRECTED),
        checked_by=CHECKED,
    )


def series(features: Features, inputs: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """Features (t, n) and inputs (t,) in float64.

    Raises:
        ValueError: when they do not fit together or hold NaN.
    """
    u = torch.as_tensor(inputs).detach().double().cpu()
    if u.ndim == 2 and u.shape[1] == 1:
        u = u[:, 0]
    if u.ndim != 1:
        raise ValueError(f"inputs are one number a step, (t,), got {tuple(u.shape)}")
    states = torch.as_tensor(features(u) if callable(features) else features).detach().double().cpu()
    states = states.flatten(1) if states.ndim > 1 else states[:, None]
    if len(states) != len(u):
        raise ValueError(f"features are (t, n) with as many steps as the inputs, got {len(states)} and {len(u)}")
    if not bool(torch.isfinite(states).all()) or not bool(torch.isfinite(u).all()):
        raise ValueError("features or inputs hold NaN or infinite numbers")
    if len(u) and bool((u == u[0]).all()) and len(u) > 1:
        raise ValueError("the input is constant: there is nothing to remember")
    return states, u


def basis(states: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns (t, r) that span the centred states (t, n), and their singular values (r,)."""
    centred = states - states.mean(0)
    # A triangle first: the SVD is then of n x n instead of t x n.
    orthogonal, triangle = torch.linalg.qr(centred)
    left, spread, _ = torch.linalg.svd(triangle, full_matrices=False)
    known = spread > spread.max() * max(states.shape) * torch.finfo(torch.float64).eps
    return orthogonal @ left[:, known], spread[known]


def unbiased(cross: Tensor, root: Tensor | None, keep: Tensor, samples: int) -> Tensor:
    """Capacities (m,) of m targets of unit length, without what chance contributes.

    Args:
        cross: (r, m) inner products of orthonormal features and the targets.
        root: (m, m) makes the targets orthonormal from the right; None where they are taken as they are.
        keep: (r,) weight of each feature, below 1 with noise.
        samples: how many samples the inner products run over.
    """
    if root is None:
        chance = keep.sum() / (samples - 1)
        return ((keep[:, None] * cross.square()).sum(0) - chance) / (1 - chance)
    own = (cross @ root).square()
    # What of a feature no target explains falls on each target by chance, with 1 / (degrees of freedom left).
    rest = (1 - own.sum(1)).clamp(min=0) / (samples - 1 - own.shape[1])
    chance = (keep * rest).sum()
    return ((keep[:, None] * own).sum(0) - chance) / (1 - chance)


def _inverse_root(gram: Tensor) -> Tensor:
    """The symmetric inverse square root; directions that the targets lack stay out."""
    powers, vectors = torch.linalg.eigh(gram)
    known = powers > powers[-1] * len(powers) * torch.finfo(torch.float64).eps
    return vectors[:, known] * powers[known].rsqrt() @ vectors[:, known].mT


def _lags(lags: int | Sequence[int] | None, size: int, count: int) -> list[int]:
    if lags is None:
        lags = max(1, min(20 * size, count // 50))
    chosen = list(range(lags + 1)) if isinstance(lags, int) else [int(k) for k in lags]
    if not chosen or min(chosen) < 0 or max(chosen) >= count:
        raise ValueError(f"lags lie from 0 to below the {count} samples, got {lags!r}")
    return chosen


def _enough(samples: int, size: int, lags: int) -> None:
    least = max(2 * (size + lags), 10 * BLOCKS)
    if samples < least:
        raise ValueError(
            f"{samples} samples after the washout are too few for {size} features and {lags} lags: give at least "
            f"{least}, better {100 * max(size, lags)}"
        )


def _held_out(
    z: Tensor, y: Tensor, ridges: Sequence[float], folds: int, generator: torch.Generator
) -> tuple[dict[str, Tensor], float]:
    """R^2 of predictions of y (t, k) from uncorrelated z (t, r), trained on the other folds, with intervals.

    Also the ridge it was found with: the one of ``ridges``, shares of the mean square of z, with the least error.
    """
    if folds < 2:
        raise ValueError(f"folds is at least 2, got {folds}")
    fold = (torch.arange(len(z)) * BLOCKS * folds // len(z)) % folds
    own = [(fold == k).nonzero()[:, 0] for k in range(folds)]
    ones = torch.cat([z, z.new_ones(len(z), 1)], dim=1)
    scale = ones.square().mean(0).sqrt()
    ones = ones / scale  # columns of one size: the normal equations stay well conditioned
    parts = [(ones[rows].mT @ ones[rows], ones[rows].mT @ y[rows]) for rows in own]
    gram, cross = sum(p[0] for p in parts), sum(p[1] for p in parts)
    shape = z.square().mean() / scale.square() * len(z) * (1 - 1 / folds)
    shape[-1] = 0.0  # the mean is free

    def weights(ridge: float) -> list[Tensor]:
        return [torch.linalg.solve(gram - g + torch.diag(ridge * shape), cross - c) for g, c in parts]

    def error(ridge: float) -> float:
        # Less the energy of y, from the products alone.
        return float(sum((w * (g @ w) - 2 * w * c).sum() for w, (g, c) in zip(weights(ridge), parts)))

    chosen = ridges[0] if len(ridges) == 1 else min(ridges, key=error)
    missing = torch.empty_like(y)
    for rows, w in zip(own, weights(chosen)):
        missing[rows] = y[rows] - ones[rows] @ w
    cut = [len(z) * i // BLOCKS for i in range(BLOCKS + 1)]
    missed = torch.stack([missing[a:b].square().sum(0) for a, b in pairwise(cut)])
    energy = torch.stack([y[a:b].square().sum(0) for a, b in pairwise(cut)])
    picks = torch.randint(BLOCKS, (DRAWS, BLOCKS), generator=generator)
    counts = torch.nn.functional.one_hot(picks, BLOCKS).sum(1).double()
    drawn = 1 - (counts @ missed) / (counts @ energy)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = drawn.quantile(ends, dim=0)
    found = 1 - missed.sum(0) / energy.sum(0)
    total_low, total_high = drawn.sum(1).quantile(ends)
    totals = {"total_held_out": found.sum(), "total_low": total_low, "total_high": total_high}
    return {"held_out": found, "low": low, "high": high, **totals}, chosen
