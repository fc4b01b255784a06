"""A ridge decoder for many lags from one Gram matrix, judged on held-out tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssmlens.analyses.memory._features import Whitened
from ssmlens.analyses.memory._split import FOLDS, Split

__all__ = ["RIDGES", "Decoder", "Judged", "judge"]

RIDGES = (0.0, *(10.0 ** (k / 2) for k in range(-24, 7)))
"""Ridges that the folds choose from, in units of the mean variance of a feature."""


ROUNDING = 1e-13
"""Share of the mean variance below which an axis of a Gram matrix is rounding noise."""


@dataclass(frozen=True, eq=False)
class Judged:
    """Sums over the held-out tokens of each unit; all (u,) float64.

    Args:
        error, total: squared error of the prediction and of the fitted mean.
        cosine: cosine of prediction and target, both around the fitted mean.
        count: tokens.
    """

    error: Tensor
    total: Tensor
    cosine: Tensor
    count: Tensor

    def numbers(self) -> list[list[float]]:
        return torch.stack([self.error, self.total, self.cosine, self.count]).tolist()


class Decoder:
    """Ridge regression on principal components, whose Gram matrix is the same for every target and lag.

    The penalty is on the components as large as they are, not on whitened ones: whitened, an axis along which a
    single sequence stands out would weigh as much as the largest.

    Args:
        features: (b, t, r) components of mean 0 and variance 1 over the fitted tokens, and their scales.
        parts: which tokens fit and which judge.
    """

    def __init__(self, features: Whitened, parts: Split) -> None:
        self.parts = parts
        scales = features.scales / features.scales.square().mean().sqrt()
        self.fit, self.test = (features.z[x[:, 0], x[:, 1]] * scales for x in (parts.fit, parts.test))
        if not bool(self.test.isfinite().all()):
            raise ValueError("the features hold NaN or infinite numbers")
        self.count = len(self.fit)
        self.variances = scales.square()
        self.folds = [parts.fit_fold == f for f in range(FOLDS)]
        self.folds = [mask for mask in self.folds if 0 < int(mask.sum()) < self.count]
        # Axes of what is left without a fold, and the fold's own Gram matrix on them.
        self.axes = []
        for mask in self.folds:
            own = self.fit[mask].mT @ self.fit[mask]
            values, vectors = torch.linalg.eigh(torch.diag(self.variances * self.count) - own)
            self.axes.append((values, vectors, vectors.mT @ own @ vectors))

    def judge(self, fit_target: Tensor, test_target: Tensor) -> Judged:
        """Fit to (m, d), predict (m', d)."""
        mean = fit_target.mean(0)
        y, truth = fit_target - mean, test_target - mean
        whole = self.fit.mT @ y
        weights = whole * _inverse(self.count * (self.variances + self._ridge(y, whole)), self.count)[:, None]
        return judge(self.test @ weights, truth, self.parts)

    def _ridge(self, y: Tensor, whole: Tensor) -> float:
        """The ridge, of `RIDGES`, with the smallest error on the folds left out."""
        errors = torch.zeros(len(RIDGES), dtype=y.dtype)
        for mask, (values, vectors, gram) in zip(self.folds, self.axes):
            own = self.fit[mask].mT @ y[mask]
            a, b = vectors.mT @ (whole - own), vectors.mT @ own
            square, cross = (a @ a.mT) * gram, (a * b).sum(1)
            for i, ridge in enumerate(RIDGES):
                d = _inverse(values + ridge * self.count, self.count)
                errors[i] += d @ square @ d - 2 * (d @ cross)
        return RIDGES[int(errors.argmin())]


def _inverse(x: Tensor, count: int) -> Tensor:
    """1 / x, and 0 where the tokens do not determine anything."""
    return torch.where(x > ROUNDING * count, 1 / x, 0.0)


def judge(predicted: Tensor, truth: Tensor, parts: Split) -> Judged:
    """Sums by unit of the agreement of two (m', d), both around the mean of the target."""

    def by_unit(x: Tensor) -> Tensor:
        return torch.zeros(parts.units, dtype=torch.float64).index_add_(0, parts.test_unit, x)

    size = predicted.norm(dim=1) * truth.norm(dim=1)
    # A prediction at rounding level of the target is no prediction: its direction is an accident.
    known = size > 1e-14 * truth.square().sum(1)
    cosine = torch.where(known, (predicted * truth).sum(1) / size, 0.0)
    return Judged(
        by_unit((predicted - truth).square().sum(1)),
        by_unit(truth.square().sum(1)),
        by_unit(cosine.nan_to_num(0.0)),
        by_unit(torch.ones(len(truth), dtype=torch.float64)),
    )
