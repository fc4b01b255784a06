"""Closed forms of sensitivity: rotations that equalise, tail statistics, and spectra that are known."""

from __future__ import annotations

import math

import numpy as np
import torch

from ssmlens.analyses._check import Check
from ssmlens.analyses.sensitivity._greedy import rank_correlation
from ssmlens.analyses.sensitivity._hessian import Curvature, spectrum_ends, spectrum_moments
from ssmlens.analyses.sensitivity._outliers import gini, outlier_statistics, rotated
from ssmlens.analyses.sensitivity._rotations import hadamard

__all__ = ["CHECKS"]


def _diagonal(d: int) -> tuple[float, float]:
    """The largest distance of an entry of diag(H L H^T) from tr(L) / d, over it."""
    mix = hadamard(d) / math.sqrt(d)
    spread = torch.logspace(-3, 3, d, dtype=torch.float64)
    level = float(spread.mean())
    return float(((mix * spread) @ mix.T).diagonal().sub(level).abs().max()) / level, 0.0


def correlated(m: int = 4000, d: int = 32, seed: int = 0) -> torch.Tensor:
    """Samples (m, d) with a common mode and a few loud channels: what a rotation has to even out."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, d, generator=g, dtype=torch.float64) * torch.logspace(-1, 1, d, dtype=torch.float64)
    return x + 3 * torch.randn(m, 1, generator=g, dtype=torch.float64)


def _equal_variances() -> tuple[float, float]:
    variance = rotated(correlated(), "klt_hadamard").var(0, correction=0)
    return float((variance - variance.mean()).abs().max() / variance.mean()), 0.0


def _hadamard_alone() -> tuple[float, float]:
    """With a common mode alone, one channel has all of it: the first row of H adds up the channels."""
    common = torch.randn(100, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(-1, 16)
    return gini(rotated(common, "hadamard").var(0, correction=0)), 1 - 1 / 16


def _tails() -> tuple[float, float]:
    """Kurtosis of the two values +1 and -1 is 1; of one entry of size one among n it is (n - 1 + 1 / (n - 1)) - 1."""
    even = outlier_statistics(torch.tensor([[1.0, -1.0]]).expand(40, 2))["kurtosis"]
    n = 400
    spike = torch.zeros(n // 4, 4)
    spike[7, 2] = 1
    return outlier_statistics(spike)["kurtosis"] / even, n - 2 + 1 / (n - 1)


def _quadratic(eigenvalues: np.ndarray, seed: int = 0) -> Curvature:
    """x^T A x / 2 in two tensors, with A of these eigenvalues."""
    n = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    matrix = torch.from_numpy(basis * eigenvalues @ basis.T)
    parts = [torch.ones(n // 3, dtype=torch.float64), torch.ones(n - n // 3, dtype=torch.float64)]
    leaves = [x.requires_grad_() for x in parts]
    x = torch.cat(leaves)
    return Curvature(x @ matrix @ x / 2, leaves)


KNOWN = np.concatenate([[40.0, 12.5, 12.0], np.linspace(-3, 2, 60)])


def _largest() -> tuple[float, float]:
    h = _quadratic(KNOWN)
    values, _, residuals = spectrum_ends(h, h.size, 3, tolerance=1e-10)
    wrong = np.abs(values - KNOWN[:3]).max()
    return float(max(wrong, residuals.max())), 0.0


def _smallest() -> tuple[float, float]:
    h = _quadratic(KNOWN)
    return float(spectrum_ends(h, h.size, 1, "smallest", tolerance=1e-10)[0][0]), -3.0


def _rosenbrock() -> tuple[float, float]:
    """Largest eigenvalue of the Hessian of (1 - x)^2 + 100 (y - x^2)^2 and 3 z^2 at (1, 1, 0)."""
    leaves = [torch.ones(2, dtype=torch.float64, requires_grad=True), torch.zeros(1, dtype=torch.float64)]
    leaves[1].requires_grad_()
    x, y = leaves[0]
    h = Curvature((1 - x) ** 2 + 100 * (y - x**2) ** 2 + 3 * (leaves[1] ** 2).sum(), leaves)
    exact = np.linalg.eigvalsh(np.array([[802.0, -400.0], [-400.0, 200.0]]))[-1]
    return float(spectrum_ends(h, 3, 1, tolerance=1e-12)[0][0]), float(exact)


def _moments() -> tuple[float, float]:
    """A = c I of size 30 with c = -2.5: any probe finds the trace, and nothing is positive."""
    h = _quadratic(np.full(30, -2.5))
    found = spectrum_moments(h, h.size, depth=8)
    return found["trace"] if found["negative"] == found["absolute"] else math.nan, -75.0


def _ranks() -> tuple[float, float]:
    """1 - 6 sum d^2 / (n (n^2 - 1)) without ties."""
    a, b = [3.0, 1.0, 4.0, 1.5, 9.0], [2.0, 7.0, 1.0, 8.0, 3.0]
    d = [sorted(a).index(x) - sorted(b).index(y) for x, y in zip(a, b)]
    return rank_correlation(a, b), 1 - 6 * sum(k * k for k in d) / (5 * 24)


CHECKS: tuple[Check, ...] = (
    Check("sensitivity: Hadamard on a diagonal, d = 64", "diag(H L H^T) = tr(L) / d", lambda: _diagonal(64), 1e-12),
    Check("sensitivity: Hadamard on a diagonal, d = 768", "diag(H L H^T) = tr(L) / d", lambda: _diagonal(768), 1e-12),
    Check("sensitivity: KLT and Hadamard equalise variances", "all variances are tr(L) / d", _equal_variances, 1e-12),
    Check("sensitivity: Hadamard alone on a common mode", "one channel has all: Gini 1 - 1/d", _hadamard_alone, 1e-12),
    Check("sensitivity: kurtosis of a spike", "n - 2 + 1 / (n - 1)", _tails, 1e-10, relative=True),
    Check("sensitivity: Gini of a straight line", "1, 2, ... d: (d - 1) / (3 d)",
          lambda: (gini(torch.arange(1.0, 51.0)), 49 / 150), 1e-12),
    Check("sensitivity: largest eigenvalues of a quadratic", "Lanczos finds the known spectrum", _largest, 1e-8),
    Check("sensitivity: smallest eigenvalue of a quadratic", "Lanczos finds the known spectrum", _smallest, 1e-8),
    Check("sensitivity: Hessian of Rosenbrock's function", "501 + sqrt(301^2 + 400^2)", _rosenbrock, 1e-9,
          relative=True),
    Check("sensitivity: trace by quadrature", "c I of size n: trace c n", _moments, 1e-9),
    Check("sensitivity: Spearman's rho", "1 - 6 sum d^2 / (n (n^2 - 1))", _ranks, 1e-12),
)  # fmt: skip
"""Every closed form of this study."""
