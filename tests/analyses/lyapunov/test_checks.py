"""Every closed form of the study, at its tolerance."""

from __future__ import annotations

import pytest

from ssmlens.analyses._check import Check
from ssmlens.analyses.lyapunov.checks import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_closed_form(check: Check) -> None:
    outcome = check()
    assert outcome.passed, outcome


def test_names_are_unique() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
