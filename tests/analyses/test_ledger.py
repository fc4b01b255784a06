"""Ledgers of long runs, and closed-form checks: what is kept, what is refused, and what counts as passed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from ssmlens.analyses._check import Check
from ssmlens.analyses._ledger import Ledger
from ssmlens.errors import SsmlensError

SETTINGS = {"model": "toy", "steps": 3, "dtype": torch.float64, "grid": (1, 2)}


def never() -> float:
    raise AssertionError("computed again")


def test_what_is_done_is_not_done_again(tmp_path) -> None:
    file = tmp_path / "run.jsonl"
    first = Ledger(file, SETTINGS)
    assert first.get("a", lambda: {"x": [1, 2.5], "y": None}) == {"x": [1, 2.5], "y": None}
    assert first.get("a", never) == {"x": [1, 2.5], "y": None}
    again = Ledger(file, SETTINGS)
    assert "a" in again
    assert len(again) == 1
    assert again.get("a", never) == {"x": [1, 2.5], "y": None}
    assert again.get("b", lambda: 7) == 7
    assert len(Ledger(file, SETTINGS)) == 2


def test_numbers_come_back_as_they_were(tmp_path) -> None:
    file, numbers = tmp_path / "run.jsonl", [math.inf, -math.inf, 0.1, 1e-300, 2**53, torch.tensor(1 / 3).item()]
    kept = Ledger(file, {}).get("n", lambda: {"list": numbers, "tensor": torch.tensor(numbers), "nan": math.nan})
    back = Ledger(file, {}).get("n", never)
    assert back["list"] == kept["list"] == numbers
    assert back["tensor"] == torch.tensor(numbers).tolist()
    assert math.isnan(back["nan"])
    for line in file.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_computation_that_fails_leaves_nothing(tmp_path) -> None:
    file = tmp_path / "run.jsonl"
    ledger = Ledger(file, SETTINGS)
    with pytest.raises(ZeroDivisionError):
        ledger.get("a", lambda: 1 / 0)
    assert "a" not in ledger
    assert len(Ledger(file, SETTINGS)) == 0


def test_killed_half_way_it_goes_on(tmp_path) -> None:
    """A process that kills itself after two parts: a second run computes the third part alone."""
    file, count = tmp_path / "run.jsonl", tmp_path / "count"
    program = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from ssmlens.analyses._ledger import Ledger

        file, count, die = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "die"
        ledger = Ledger(file, {"steps": 3})

        def part(k):
            with count.open("a") as stream:
                stream.write(f"{k} ")
            return k * k

        for k in range(3):
            if die and k == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            ledger.get(f"part {k}", lambda k=k: part(k))
        print([ledger.get(f"part {k}", None) for k in range(3)])
    """)
    arguments = [sys.executable, "-c", program, str(file), str(count)]
    killed = subprocess.run([*arguments, "die"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL
    done = subprocess.run([*arguments, "live"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0, 1, 4]"
    assert count.read_text().split() == ["0", "1", "2"]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_dropped_and_done_again(tmp_path, cut: int) -> None:
    file = tmp_path / "run.jsonl"
    first = Ledger(file, SETTINGS)
    for key in ("a", "b"):
        first.put(key, f"value of {key}")
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    again = Ledger(file, SETTINGS)
    assert "a" in again
    assert "b" not in again
    again.get("b", lambda: "value of b")
    assert file.read_bytes() == whole


def test_other_settings_are_refused_and_named(tmp_path) -> None:
    file = tmp_path / "run.jsonl"
    Ledger(file, SETTINGS).put("a", 1)
    before = file.read_bytes()
    for other, named in (
        ({**SETTINGS, "steps": 4}, "steps"),
        ({k: v for k, v in SETTINGS.items() if k != "grid"}, "grid"),
        ({**SETTINGS, "seed": 1, "model": "other"}, "model, seed"),
    ):
        with pytest.raises(SsmlensError, match=rf"holds a run with other settings \({named}\): choose another file"):
            Ledger(file, other)
    assert file.read_bytes() == before
    assert "a" in Ledger(file, {**SETTINGS, "grid": [1, 2], "dtype": "float64"})  # the same, as JSON knows it


@pytest.mark.parametrize(
    "content", ["no json\n", '{"format": "other", "settings": {}}\n', "[1, 2]\n", '{"format": 1}\n{}\n']
)
def test_another_file_is_refused_and_left_alone(tmp_path, content: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(content)
    with pytest.raises(SsmlensError, match="does not hold a run that can go on: choose another file"):
        Ledger(file, SETTINGS)
    assert file.read_text() == content


def test_an_empty_file_is_begun_and_a_missing_folder_refused(tmp_path) -> None:
    file = tmp_path / "run.jsonl"
    file.touch()
    Ledger(file, SETTINGS).put("a", 1)
    assert "a" in Ledger(file, SETTINGS)
    with pytest.raises(SsmlensError, match="does not exist: create it first"):
        Ledger(tmp_path / "none" / "run.jsonl", SETTINGS)


def test_without_a_path_it_lives_in_memory() -> None:
    before = set(os.listdir())
    ledger = Ledger(None, SETTINGS)
    assert ledger.get("a", lambda: torch.tensor([1.0])) == [1.0]
    assert ledger.get("a", never) == [1.0]
    assert set(os.listdir()) == before


@pytest.mark.parametrize(
    ("measured", "exact", "tolerance", "relative", "passed"),
    [
        (1.0, 1.0, 0, False, True),
        (1.0 + 1e-9, 1.0, 1e-8, False, True),
        (1.1, 1.0, 1e-2, False, False),
        (1001.0, 1000.0, 2e-3, True, True),
        (1001.0, 1000.0, 2e-3, False, False),
        (0.001, 0.002, 2e-3, True, True),  # relative above 1 alone
        (math.inf, math.inf, 0, False, True),
        (math.inf, -math.inf, 1e300, False, False),
        (math.nan, 0.0, math.inf, False, False),
        (0.0, math.inf, 1e300, True, False),
    ],
)
def test_what_passes_a_check(measured, exact, tolerance, relative, passed) -> None:
    outcome = Check("toy: check", "law", lambda: (measured, exact), tolerance, relative)()
    assert outcome.passed is passed
    assert (outcome.name, outcome.tolerance) == ("toy: check", tolerance)
