"""Maps whose exponents are known: the answers that `spectrum` is held to, and examples to start from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["CAT", "HENON", "LOGISTIC", "LORENZ", "cat", "henon", "logistic", "lorenz"]

HENON = (0.41922, math.log(0.3) - 0.41922)
"""Exponents of `henon`; their sum is ln 0.3 exactly, the log of its constant area contraction."""

LOGISTIC = math.log(2)
"""Exponent of `logistic`, exactly."""

CAT = math.log((3 + math.sqrt(5)) / 2)
"""The exponents of `cat` are plus and minus this, exactly."""

LORENZ = (0.9056, 0.0, -14.5723)
"""Exponents of `lorenz` per unit of time; their sum is -41/3 exactly for the flow (Sprott 2003)."""


def henon(x: Tensor) -> Tensor:
    """x (2,): (1 - 1.4 x^2 + y, 0.3 x); starts well at (0.1, 0.1) (Henon 1976)."""
    return torch.stack([1 - 1.4 * x[0] ** 2 + x[1], 0.3 * x[0]])


def logistic(x: Tensor) -> Tensor:
    """x (1,): 4 x (1 - x), for x in (0, 1)."""
    return 4 * x * (1 - x)


def cat(x: Tensor) -> Tensor:
    """x (2,): (2 x + y, x + y) mod 1, Arnold's."""
    return torch.stack([2 * x[0] + x[1], x[0] + x[1]]).remainder(1.0)


def lorenz(x: Tensor, dt: float = 0.01) -> Tensor:
    """x (3,): one step of Runge-Kutta 4 of Lorenz' flow with sigma 10, rho 28, beta 8/3 (Lorenz 1963)."""

    def flow(v: Tensor) -> Tensor:
        return torch.stack([10 * (v[1] - v[0]), v[0] * (28 - v[2]) - v[1], v[0] * v[1] - 8 / 3 * v[2]])

    a = flow(x)
    b = flow(x + dt / 2 * a)
    c = flow(x + dt / 2 * b)
    return x + dt / 6 * (a + 2 * b + 2 * c + flow(x + dt * c))
