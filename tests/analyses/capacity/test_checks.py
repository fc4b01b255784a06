"""Every closed form of the study."""

from __future__ import annotations

import pytest

from ssmlens.analyses._check import Check
from ssmlens.analyses.capacity.checks import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.name)
def test_closed_form(check: Check) -> None:
    outcome = check()
    assert outcome.passed, f"{check.law}: {outcome.measured!r} instead of {outcome.exact!r}"


def test_names_are_unique() -> None:
    assert len({c.name for c in CHECKS}) == len(CHECKS)
