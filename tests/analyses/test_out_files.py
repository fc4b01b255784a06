"""``--out`` may be given more than once: every study writes every file, and names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssmlens.analyses._result import Result
from ssmlens.cli import main

TEXT = "c 7 a 19 k 3 r 24 m 0 . . a . k"
COMMANDS = [
    ["capacity"],
    ["capacity", "state-size"],
    ["lyapunov", "latent"],
    ["memory", "spectrum"],
    ["precision"],
    ["sensitivity", "layers"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_file_is_written(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / f"found.{suffix}" for suffix in ("json", "csv", "png")]
    arguments = [part for file in files for part in ("--out", str(file))]
    assert main([*command, "--model", "mamba2-recall", "--text", TEXT, *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == [str(file) for file in files]
    assert Result.load(files[0]).value.numel()
    assert len(files[1].read_text().splitlines()) > 1
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_one_that_cannot_be_written_refuses_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "found.json", tmp_path / "found.docx"
    assert main(["precision", "stall", "--out", str(good), "--out", str(bad)]) == 2
    assert "found.docx" in capsys.readouterr().err
    assert not good.exists()
