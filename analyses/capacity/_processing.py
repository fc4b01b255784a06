"""Information processing capacity: which functions of past inputs a linear readout can recover, and how many."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ssmlens.analyses._layers import listed
from ssmlens.analyses._result import Result
from ssmlens.analyses.capacity._linear_memory import Features, basis, series, unbiased

__all__ = ["POLYNOMIALS", "information_processing_capacity", "selectivity_tax"]

POLYNOMIALS = ("legendre", "hermite")
"""Orthonormal for uniform input, and for Gaussian input."""

BLOCK = 4096
"""Samples of all targets at a time."""

INDEPENDENT = "inputs are independent from step to step, so that the targets are uncorrelated"
BUDGET = (
    "the sum over all targets is at most the number of features; what the listed lags and degrees miss is not in it"
)
UNBIASED = "what chance contributes is taken off, so that a degree that is absent comes out near 0 and may be below"
CHECKED = "a linear reservoir has n, all of degree 1; frozen gates keep it linear: checks.py of this study"


def information_processing_capacity(
    features: Features,
    inputs: Tensor | np.ndarray,
    *,
    polynomials: str = "legendre",
    lags: int | Sequence[int] = (100, 25, 12),
    washout: int | None = None,
    seed: int = 0,
) -> Result:
    """How much of the features is linear in past inputs, how much quadratic, cubic...

    Targets are products of orthonormal polynomials of lagged inputs, P_a(u[t-i]) P_b(u[t-j]) ..., of total degree
    d. The capacity of one is the share of its variance that a linear readout of the features recovers. The targets
    are made orthonormal in the sample, lower degrees and shorter lags first, so that the capacities of all can never
    exceed the number of features; what chance contributes is taken off.

    Args:
        features: (t, n), or a function from inputs (t,) to (t, n).
        inputs: (t,) independent draws; they are scaled to [-1, 1] or to unit variance.
        polynomials: "legendre" for uniform inputs, "hermite" for Gaussian ones.
        lags: for degree 1, 2, 3... the largest lag; one number for degree 1 alone.
        washout: first samples left out; by default the largest lag.
        seed: of the shuffled control.

    Returns:
        Result with axis (degree): the capacity of each degree, so that ``value.sum()`` is the total. Columns:
        ``raw``, without the correction; ``targets``, how many there are; ``counted``, how many alone exceed
        ``threshold``, and ``above``, their capacity (the usual cut, which misses many weak targets); ``total``.
        Controls: ``threshold``, 2 n / t + 4 sqrt(2 n) / t; ``shuffled``, the value for features in random order;
        ``chance_spread``, the standard deviation that chance alone gives to a degree, sqrt(2 n targets) / t;
        ``rank``, the upper bound of the total.

    Raises:
        ValueError: for unknown polynomials, inputs outside their range, or too few samples.

    Source:
        Dambre, Verstraeten, Schrauwen and Massar, "Information processing capacity of dynamical systems" (2012).
    """
    if polynomials not in POLYNOMIALS:
        raise ValueError(f"unknown polynomials {polynomials!r}: choose one of {', '.join(POLYNOMIALS)}")
    largest = listed(lags)
    if not largest or min(largest) < 0:
        raise ValueError(f"lags holds the largest lag of each degree, at least 0, got {lags!r}")
    states, u = series(features, inputs)
    skip = max(*largest, washout or 0)
    left, _ = basis(states[skip:]) if len(states) > skip else (states[:0], states[:0])
    samples, rank = left.shape
    if samples < max(10 * rank, 100):
        raise ValueError(f"{samples} samples after the washout are too few for {rank} features: give more")
    targets = [list(_targets(degree, most)) for degree, most in enumerate(largest, start=1)]
    flat = [target for part in targets for target in part]
    if samples < 2 * len(flat):
        raise ValueError(f"{samples} samples after the washout are too few for {len(flat)} targets: give more")
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    powers = _polynomials(u, len(largest), polynomials)
    gram, cross, mixed = _products(powers, flat, left, left[order], skip)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        raise ValueError(
            f"the targets depend on each other up to degree {len(largest)}: inputs that take few values have "
            "polynomials of low degree only, so give fewer lags"
        )
    root = torch.linalg.solve_triangular(factor, torch.eye(len(flat), dtype=factor.dtype), upper=False).mT
    every = torch.ones(rank, dtype=torch.float64)
    own, control = unbiased(cross, root, every, samples), unbiased(mixed, root, every, samples)
    threshold = (2 * rank + 4 * (2 * rank) ** 0.5) / samples
    plain = (cross @ root).square().sum(0)
    sizes = [len(part) for part in targets]

    def by_degree(x: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in x.split(sizes)])

    found = {
        "value": by_degree(own),
        "raw": by_degree(plain),
        "targets": torch.tensor(sizes, dtype=torch.float64),
        "counted": by_degree((plain > threshold).double()),
        "above": by_degree(own * (plain > threshold)),
        "shuffled": by_degree(control),
    }
    value = found.pop("value")
    return Result(
        name="processing_capacity",
        value=value,
        dims=("degree",),
        units="1",
        coords={"degree": list(range(1, len(largest) + 1))},
        columns={k: found[k] for k in ("raw", "targets", "counted", "above")} | {"total": value.sum()},
        control={
            "threshold": torch.full_like(value, threshold),
            "shuffled": found["shuffled"],
            "chance_spread": (2 * rank * found["targets"]).sqrt() / samples,
            "rank": torch.tensor(float(rank)),
        },
        settings={
            "samples": samples,
            "features": states.shape[1],
            "polynomials": polynomials,
            "lags": largest,
            "washout": skip,
            "seed": seed,
        },
        assumes=(INDEPENDENT, BUDGET, UNBIASED),
        checked_by=CHECKED,
    )


def selectivity_tax(selective: Features, frozen: Features, inputs: Tensor | np.ndarray, **options: object) -> Result:
    """What selection costs in linear memory: degree 1 of the same states with frozen gates, less that of the real ones.

    Args:
        selective: (t, n) features, or a function of the inputs, with gates that depend on the input.
        frozen: the same with gates held constant.
        inputs: (t,), driving both.
        options: of `information_processing_capacity`.

    Returns:
        Result with axis (degree): capacity with frozen gates less that with selective ones, so that the tax on linear
        memory is the first entry and what it bought are the negative ones. Columns: ``selective``, ``frozen``, their
        totals ``selective_total`` and ``frozen_total``. Control: ``rank``, what the total cannot exceed.

    Raises:
        ValueError: as `information_processing_capacity`.
    """
    with_gates = information_processing_capacity(selective, inputs, **options)  # type: ignore[arg-type]
    without = information_processing_capacity(frozen, inputs, **options)  # type: ignore[arg-type]
    return Result(
        name="selectivity_tax",
        value=without.value - with_gates.value,
        dims=("degree",),
        units="1",
        coords=with_gates.coords,
        columns={
            "selective": with_gates.value,
            "frozen": without.value,
            "selective_total": with_gates.value.sum(),
            "frozen_total": without.value.sum(),
        },
        control={"rank": with_gates.control["rank"]},
        settings=with_gates.settings,
        assumes=with_gates.assumes,
        checked_by=CHECKED,
    )


def _polynomials(u: Tensor, degrees: int, kind: str) -> Tensor:
    """(degree, t) orthonormal polynomials of the inputs, from degree 1."""
    if kind == "legendre":
        low, high = float(u.min()), float(u.max())
        x = (2 * u - low - high) / (high - low)
        before, now, found = torch.ones_like(x), x, []
        for n in range(1, degrees + 1):
            found.append(now * (2 * n + 1) ** 0.5)
            before, now = now, ((2 * n + 1) * x * now - n * before) / (n + 1)
        return torch.stack(found)
    x = (u - u.mean()) / u.std()
    before, now, found, factorial = torch.ones_like(x), x, [], 1.0
    for n in range(1, degrees + 1):
        factorial *= n
        found.append(now / factorial**0.5)
        before, now = now, x * now - n * before
    return torch.stack(found)


def _targets(degree: int, most: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Every product of total degree ``degree`` over lags 0 to ``most``: ((lag, degree), ...)."""
    for lags in itertools.combinations_with_replacement(range(most + 1), degree):
        yield tuple(Counter(lags).items())


def _products(
    powers: Tensor, targets: list[tuple[tuple[int, int], ...]], left: Tensor, mixed: Tensor, skip: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the centred targets, scaled to unit length: their Gramian, and their products with two sets of features."""
    count, samples, m = powers.shape[1], len(left), len(targets)
    gram, total = left.new_zeros(m, m), left.new_zeros(m)
    cross, control = left.new_zeros(left.shape[1], m), left.new_zeros(left.shape[1], m)
    for start in range(0, samples, BLOCK):
        stop = min(start + BLOCK, samples)
        rows = left.new_ones(m, stop - start)
        for row, target in zip(rows, targets):
            for lag, degree in target:
                row *= powers[degree - 1, skip + start - lag : skip + stop - lag]
        gram += rows @ rows.mT
        total += rows.sum(1)
        # The features have mean 0 over all samples, so the targets' means drop out.
        cross += left[start:stop].mT @ rows.mT
        control += mixed[start:stop].mT @ rows.mT
    assert skip + samples == count
    gram -= total[:, None] * total / samples
    scale = gram.diagonal().rsqrt()
    return gram * scale[:, None] * scale, cross * scale, control * scale
