"""The closed forms that ``ssmlens selfcheck`` prints, as tests."""

from __future__ import annotations

import pytest
import torch

from ssmlens.analyses._check import Check
from ssmlens.analyses.memory._hippo import legs, legs_reconstruct
from ssmlens.analyses.memory.checks import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.name)
def test_closed_form(check: Check) -> None:
    outcome = check()
    assert outcome.passed, f"{outcome.measured} is not {outcome.exact} within {outcome.tolerance}"


def test_names_are_unique_and_say_whose_they_are() -> None:
    names = [c.name for c in CHECKS]
    assert len(set(names)) == len(names)
    assert all(name.startswith("memory: ") for name in names)


def test_legs_by_its_matrices() -> None:
    # One bilinear step at a time with the matrices themselves.
    n, signal = 4, torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    B = (2 * torch.arange(n).double() + 1).sqrt()
    A = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1):
            A[i, j] = i + 1 if i == j else B[i] * B[j]
    c = torch.zeros(n, dtype=torch.float64)
    c[0] = signal[0]
    eye = torch.eye(n, dtype=torch.float64)
    for k in range(1, 30):
        push = (B * signal[k - 1] / k + B * signal[k] / (k + 1)) / 2
        c = torch.linalg.solve(eye + A / (2 * (k + 1)), (eye - A / (2 * k)) @ c + push)
    torch.testing.assert_close(legs(signal, n), c, rtol=1e-9, atol=1e-11)


def test_legs_reconstructs_what_it_should_and_not_more() -> None:
    grid = torch.linspace(0, 1, 4000, dtype=torch.float64)
    for power in (0, 1, 2):
        assert (legs_reconstruct(legs(grid**power, 4), grid) - grid**power).abs().max() < 5e-3
    # x^6 is no cubic, and the best cubic misses it.
    assert (legs_reconstruct(legs(grid**6, 4), grid) - grid**6).abs().max() > 0.02
