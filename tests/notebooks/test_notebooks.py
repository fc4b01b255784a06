"""Every notebook runs from its first cell to its last, and shows what its text says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"


def run(name: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "notebook"}
    exec(compile((FOLDER / name).read_text(), name, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("name", sorted(p.name for p in FOLDER.glob("*.py")))
def test_runs(name: str) -> None:
    run(name)


def test_the_recalled_value_is_the_one_told() -> None:
    cells = run("where_did_the_value_come_from.py")
    assert cells["answer"].strip() == "11"
    assert cells["strongest"] == {"t": ["t", "23"], "o": ["o", "2"], "b": ["b", "25"], "n": ["n", "11"]}
    assert int(cells["blurred"].argmax()) == len(cells["tokens"]) - 1
    assert max(cells["trace"].reconstruction_error.values()) < 1e-5
