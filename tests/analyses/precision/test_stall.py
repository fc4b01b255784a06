"""The stall law against a loop over one number, known half-lives, and every check of the study."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ssmlens.analyses import precision
from ssmlens.analyses.precision.checks import CHECKS
from ssmlens.errors import SsmlensError


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_closed_forms(check) -> None:
    outcome = check()
    assert outcome.passed, outcome


def half_life_in_numpy(a: float, start: float, most: int = 5000) -> float:
    """float16 by numpy's own arithmetic: the product in float64, rounded by the cast."""
    h = np.float16(start)
    for t in range(1, most):
        after = np.float16(float(h) * a)
        if float(after) <= start / 2:
            return t
        if after == h:
            return math.inf
        h = after
    raise AssertionError("neither halved nor stopped")


@pytest.mark.parametrize("a", [0.5, 0.9, 0.99, 0.999, 0.9994, 0.9996, 0.9997, 0.9998, 0.9999])
def test_float16_equals_numpy(a: float) -> None:
    found = precision.stall(a, torch.float16, limit=3000)
    assert found.value.item() == half_life_in_numpy(a, 1.0)


def test_known_numbers_of_bfloat16() -> None:
    found = precision.stall([0.99, 0.995, 0.997], "bfloat16")
    assert found.value.tolist() == [73, 128, math.inf]
    assert found.control["exact"].tolist() == pytest.approx([68.97, 138.28, 230.70], abs=5e-3)
    # Stochastic rounding forgets as exact arithmetic does.
    assert torch.allclose(found.control["stochastic"], found.control["exact"], rtol=0.03)
    assert found.dims == ("decay",)
    assert bool((found.columns["half_life_shortest"] <= found.value).all())
    assert bool((found.columns["half_life_longest"] >= found.value).all())


def test_the_floor_is_where_half_a_unit_is_lost() -> None:
    """Between the laws a state falls until h (1 - a) is half a unit of its binade."""
    a = 1 - 2.0**-8.5
    floor = precision.stall(a, "bfloat16").columns["floor"].item()
    assert 0.5 < floor <= 2.0**-9 / (1 - a) + 2.0**-8
    assert precision.stall(1 - 2.0**-10, "bfloat16").columns["floor"].item() == 1
    assert precision.stall(0.9, "float32", limit=50).columns["floor"].item() == 0


def test_given_up_is_nan() -> None:
    assert math.isnan(precision.stall(0.9999, "float32", limit=10).value.item())


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_share_of_a_binade(name: str) -> None:
    """h stays where h (1 - a) is below half a unit; for h = 1 the unit below is half as large."""
    to = precision.format_of(name)
    unit = 2.0 ** (1 - to.digits)
    for factor in (0.7, 1.01, 1.3, 1.7, 1.99, 2.3):
        gone = to.stalls_at_once * factor
        count = 2 ** (to.digits - 1)
        stays = [(1 + k * unit) * gone < unit / (4 if k == 0 else 2) for k in range(count)]
        assert precision.stalled_share(1 - gone, name) == sum(stays) / count


def test_the_page_prints_what_is_measured() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "studies" / "precision.md").read_text(encoding="utf-8")
    found = precision.stall([0.99, 0.995, 0.997, 0.999], "bfloat16")
    for a, life, exact, floor in zip(
        found.coords["decay"], found.value, found.control["exact"], found.columns["floor"]
    ):
        said = f"{life:.0f}" if math.isfinite(life) else f"never (stops at {floor:.3g})"
        assert f"| {a:g} | {exact:.1f} | {said} |" in page


def test_refusals() -> None:
    for wrong in (0.0, 1.0, -0.5, math.nan, [], [0.5, 1.5]):
        with pytest.raises(SsmlensError, match="decays are numbers between 0 and 1"):
            precision.stall(wrong)
    with pytest.raises(SsmlensError, match="limit is at least 1"):
        precision.stall(0.5, limit=0)
    with pytest.raises(SsmlensError, match="float32 has too many numbers"):
        precision.stalled_share(0.5, "float32")
