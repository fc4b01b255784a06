"""The program that traces a million tokens, at six hundred."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssmlens.kernels import bench


def test_every_step_of_a_short_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "million.json"
    assert bench.main(["million", "--tokens", "600", "--small", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    for name in ("million-mamba1", "million-mamba2"):
        steps = {row["step"]: row for row in rows if row["op"] == name}
        assert len(steps) == 9
        assert steps["trace"]["tokens"] == 600
        assert steps["trace"]["found"].startswith("reconstruction error")
        assert all(row["seconds"] > 0 for row in steps.values())
        assert all(row["peak_bytes"] is None or row["peak_bytes"] >= 0 for row in steps.values())
        assert "nan" not in "".join(row["found"] for row in steps.values())
    out = capsys.readouterr().out
    for word in ("half-life", "mean distance", "last row of attention", "state norm", "600 tokens"):
        assert word in out


def test_a_text_of_one_token_is_refused(capsys: pytest.CaptureFixture[str]):
    assert bench.main(["million", "--tokens", "1", "--small"]) == 2
    assert "at least 2 tokens" in capsys.readouterr().err
