"""``ssmlens selfcheck``: what it collects, prints and returns, and that a check that is off or raises fails."""

from __future__ import annotations

import json
import math
import sys
from types import ModuleType

import pytest

from ssmlens import cli
from ssmlens.analyses._check import Check
from ssmlens.cli import selfcheck
from ssmlens.errors import SsmlensError


def broken() -> tuple[float, float]:
    raise ZeroDivisionError("nothing to divide by")


GOOD = Check("toy: three", "1 + 2 = 3", lambda: (3.0, 3.0), 0)
NEAR = Check("toy: nearly pi", "355 / 113", lambda: (355 / 113, math.pi), 1e-6, relative=True)
OFF = Check("toy: off", "0.2 = 0.1", lambda: (0.2, 0.1), 1e-3)
RAISES = Check("toy: raises", "1 / 0", broken, 1.0)


@pytest.fixture
def with_checks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command on checks of our own: exit code, stdout, stderr."""

    def run(checks, *arguments):
        module = ModuleType("toy_checks")
        module.CHECKS = tuple(checks)
        module.__spec__ = sys.__spec__
        monkeypatch.setitem(sys.modules, "toy_checks", module)
        monkeypatch.setattr(selfcheck, "_exists", lambda name: name == "toy_checks")
        monkeypatch.setattr(selfcheck, "SOURCES", {"toy": "toy_checks", "absent": "not_there"})
        code = cli.main(["selfcheck", *arguments])
        done = capsys.readouterr()
        return code, done.out, done.err

    return run


def test_passing_checks_are_printed_and_exit_0(with_checks) -> None:
    code, out, err = with_checks([GOOD, NEAR])
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[1].split()[:4] == ["toy:", "three", "3", "3"]
    assert lines[1].endswith("pass")
    assert "8.5e-08" in lines[2]
    assert "1e-06 rel" in lines[2]
    assert lines[-1].startswith("2 of 2 checks passed in ")


@pytest.mark.parametrize("bad", [OFF, RAISES])
def test_one_that_fails_exits_1(with_checks, bad) -> None:
    code, out, _ = with_checks([GOOD, bad])
    assert code == 1
    assert out.splitlines()[2].endswith("FAIL")
    assert "1 of 2 checks passed" in out
    assert ("toy: raises raised ZeroDivisionError: nothing to divide by" in out) == (bad is RAISES)


def test_json_says_the_same_and_nothing_else(with_checks) -> None:
    code, out, err = with_checks([GOOD, OFF, RAISES], "--json")
    assert (code, err) == (1, "")
    data = json.loads(out)
    assert data["passed"] is False
    assert [row["passed"] for row in data["checks"]] == [True, False, False]
    assert data["checks"][1]["error"] == pytest.approx(0.1)
    assert data["checks"][2]["measured"] == "nan"
    assert data["checks"][2]["problem"] == "ZeroDivisionError: nothing to divide by"
    assert {row["study"] for row in data["checks"]} == {"toy"}


def test_only_chooses_a_study_or_part_of_a_name(with_checks) -> None:
    assert "2 of 2" in with_checks([GOOD, NEAR], "--only", "toy")[1]
    assert "1 of 1" in with_checks([GOOD, OFF], "--only", "THREE")[1]
    assert "2 of 2" in with_checks([OFF, GOOD, NEAR], "--only", "three", "--only", "pi")[1]
    code, out, err = with_checks([GOOD], "--only", "four")
    assert (code, out) == (2, "")
    assert err == "error: no check is called 'four': give a study (toy) or part of a check's name\n"


def test_nan_never_passes() -> None:
    lost = Check("toy: nan", "nan = nan", lambda: (math.nan, math.nan), math.inf)
    assert not selfcheck.measure("toy", lost)["passed"]
    endless = Check("toy: endless", "inf = inf", lambda: (math.inf, math.inf), 0)
    assert selfcheck.measure("toy", endless)["passed"]


def test_names_of_all_checks_are_unique_and_begin_with_their_study() -> None:
    pairs = selfcheck.collect()
    names = [check.name for _, check in pairs]
    assert len(set(names)) == len(names)
    assert {"precision"} <= {study for study, _ in pairs}
    for study, check in pairs:
        assert check.name.startswith(f"{study}: "), check.name
        assert check.law
        assert check.tolerance >= 0


def test_a_source_that_exists_but_does_not_import_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "SOURCES", {"toy": "this"})
    with pytest.raises(AttributeError, match="CHECKS"):
        selfcheck.collect()


def test_choose_keeps_the_order_and_names_what_is_unknown() -> None:
    pairs = [("a", GOOD), ("b", NEAR), ("a", OFF)]
    assert selfcheck.choose(pairs, []) == pairs
    assert selfcheck.choose(pairs, ["a"]) == [pairs[0], pairs[2]]
    with pytest.raises(SsmlensError, match=r"no check is called 'c': give a study \(a, b\)"):
        selfcheck.choose(pairs, ["c"])
