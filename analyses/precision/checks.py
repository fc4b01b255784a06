"""Closed forms of finite precision: the stall law, known half-lives, and the noise of rounding."""

from __future__ import annotations

import math

import torch

from ssmlens.analyses._check import Check
from ssmlens.analyses.precision._formats import FORMATS, format_of, rounded
from ssmlens.analyses.precision._horizon import ROUNDING_NOISE, horizon
from ssmlens.analyses.precision._stall import stall, stalled_share
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.recurrence import Recurrence

__all__ = ["CHECKS"]

_SHORT = [to for to in FORMATS.values() if to.digits <= 11]


def _all_stall() -> tuple[float, float]:
    """Just below the law every number of a binade stays, just above one does not, in every format."""
    below = [stalled_share(1 - to.stalls_at_once * (1 - 1e-9), to) for to in _SHORT]
    above = [stalled_share(1 - to.stalls_at_once * (1 + 1e-9), to) < 1 for to in _SHORT]
    return min(below) if all(above) else math.nan, 1.0


def _none_stalls() -> tuple[float, float]:
    """From 2^-p on no number stays, just below some do, in every format."""
    at = [stalled_share(1 - to.stalls_soon, to) for to in _SHORT]
    below = [stalled_share(1 - to.stalls_soon / (1 + 2.0 ** (2 - to.digits)), to) > 0 for to in _SHORT]
    return max(at) if all(below) else math.nan, 0.0


def _half_life(a: float, known: float) -> Check:
    return Check(
        name=f"precision: bf16 half-life at a = {a:g}",
        law=f"h <- bf16(a h) from 1 needs {known:g} tokens to 1/2" if known < math.inf else "h <- bf16(a h) stops",
        run=lambda: (stall(a, "bfloat16", limit=1000).value.item(), known),
        tolerance=0,
    )


def _noise() -> tuple[float, float]:
    to = format_of("bfloat16")
    x = torch.exp2(torch.linspace(0, 1, 200_001, dtype=torch.float64))
    error = (rounded(x, to) - x) / x
    return error.square().mean().sqrt().item() * 2**to.digits, ROUNDING_NOISE


def driven(a: float, heads: int = 48, length: int = 1500, seed: int = 0) -> Recurrence:
    """Heads of constant decay with two by two states, driven by Gaussian noise from their stationary law on."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    ones = torch.ones(1, length, heads, 1, dtype=torch.float64)
    value = normal(1, length, heads, 4)
    inputs = ScanInputs(
        value=value, write=ones, read=ones, log_decay=ones * math.log(a),
        initial=normal(1, heads, 4, 1) / math.sqrt(1 - a * a),
    )  # fmt: skip
    return Recurrence(inputs)


def _driven(a: float) -> Check:
    def run() -> tuple[float, float]:
        found = horizon(driven(a), "bfloat16").columns
        return found["error"].square().mean().sqrt().item(), ROUNDING_NOISE * 2**-8 / math.sqrt(1 - a * a)

    return Check(
        name=f"precision: driven bf16 state at a = {a:g}",
        law="relative error 2^-8 sqrt(1 / (8 ln 2)) / sqrt(1 - a^2)",
        run=run,
        tolerance=0.06 * ROUNDING_NOISE * 2**-8 / math.sqrt(1 - a * a),
    )


CHECKS: tuple[Check, ...] = (
    Check("precision: stall law, at once", "round(a h) = h for every h where 1 - a < 2^-(p+1)", _all_stall, 0),
    Check("precision: stall law, not from 2^-p on", "round(a h) < h for every h where 1 - a >= 2^-p", _none_stalls, 0),
    _half_life(0.99, 73),
    _half_life(0.995, 128),
    _half_life(0.997, math.inf),
    Check("precision: noise of rounding", "RMS error / 2^-p = sqrt(1 / (8 ln 2))", _noise, 1e-3),
    _driven(0.9),
    _driven(0.99),
)
"""Every closed form of this study."""
