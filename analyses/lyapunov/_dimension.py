"""Numbers that follow from a spectrum: Kaplan and Yorke's dimension, and a bound of the entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._result import Result
from ssmlens.errors import SsmlensError

__all__ = ["kaplan_yorke"]


def kaplan_yorke(exponents: Result | Tensor | Sequence[float], dimensions: int | None = None) -> Result:
    """Kaplan and Yorke's (1979) dimension of an attractor: where the sum of the largest exponents reaches 0.

    With the exponents in decreasing order and j the last with a sum that is not negative, it is j + sum / |next|: 0
    where all are negative, and the dimension of the state where the sum of all is not negative.

    Args:
        exponents: of one orbit: numbers in any order, a tensor (k,), or a result of `spectrum`, `stack` or
            `closed_loop` for one temperature. -inf is allowed.
        dimensions: of the state, where the exponents are only the largest ones; a result of `spectrum` knows it.

    Returns:
        Value (), with the column ``entropy_bound``: the sum of the positive exponents, which bounds the
        Kolmogorov-Sinai entropy from above (Ruelle 1978), in nats per unit of time. Where too few exponents are known
        the value is a lower bound, and ``assumes`` says so.

    Raises:
        SsmlensError: for NaN, +inf, no exponents, or a result with more than one axis.
    """
    settings: dict[str, Any] = {}
    if isinstance(exponents, Result):
        settings = dict(exponents.settings)
        dimensions = settings.get("dimensions") if dimensions is None else dimensions
        exponents = exponents.columns["mean"] if "window" in exponents.dims else exponents.value
    x = torch.as_tensor(exponents, dtype=torch.float64)
    if x.ndim != 1 or not len(x):
        raise SsmlensError(f"exponents are (k,) of one orbit, at least one, got {tuple(x.shape)}")
    if bool(x.isnan().any()) or bool((x == math.inf).any()):
        raise SsmlensError("the exponents hold NaN or +inf")
    x = x.sort(descending=True).values
    complete = dimensions is None or dimensions <= len(x)
    assumes: tuple[str, ...] = ("the conjecture that this is the information dimension of a typical attractor",)
    value = _dimension(x.tolist())
    if not complete and value == len(x):
        assumes += (f"only {len(x)} of {dimensions} exponents are known and their sum is not negative: a lower bound",)
    return Result(
        name="kaplan_yorke",
        value=torch.tensor(value, dtype=torch.float64),
        dims=(),
        units="dimensions",
        columns={"entropy_bound": x.clamp(min=0).sum()},
        settings={**settings, "exponents": len(x), "complete": complete},
        assumes=assumes,
        checked_by="Henon 1.25816, Lorenz 2.06218, all negative 0: tests/analyses/lyapunov/test_dimension.py",
    )


def _dimension(exponents: list[float]) -> float:
    total = 0.0
    for j, x in enumerate(exponents):
        if total + x < 0:
            return j + (total / -x if x > -math.inf else 0.0)
        total += x
    return float(len(exponents))
