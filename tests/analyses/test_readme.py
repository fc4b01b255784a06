"""The code and the numbers that analyses/README.md prints."""

from __future__ import annotations

import re
from pathlib import Path

import memory_cases as cases
import pytest
import torch

from ssmlens import zoo
from ssmlens.analyses import memory

README = (Path(__file__).resolve().parents[2] / "analyses" / "README.md").read_text(encoding="utf-8")


def test_every_public_function_is_described() -> None:
    for name in ("retention", "half_life", "mean_distance", "saturation", "onset_time", "state_norm", "summary"):
        assert re.search(rf"^###.*\b{name}\(", README, flags=re.MULTILINE)


def test_the_arithmetic_mean_of_decays_overstates_memory_as_printed() -> None:
    ones = torch.ones(1, 100, 1, 1, dtype=torch.float64)
    log_decay = torch.where(torch.arange(100) % 2 == 0, 0.0, -5.0).double().reshape(ones.shape)
    rec = cases.Recurrence(cases.ScanInputs(value=ones, write=ones, read=ones, log_decay=log_decay))
    assert f"{memory.half_life(rec).value.item():.2f}" == "0.28"
    assert f"{memory.half_life(rec, 'arithmetic').value.item():.1f}" == "1.0"
    assert "arithmetic half-life is 1.0 tokens" in README
    assert "geometric one 0.28" in README


def test_a_short_text_cuts_the_mean_distance_as_printed() -> None:
    assert round(memory.mean_distance(cases.constant(0.99, 64)).value.item()) == 28
    assert "(it gives 28)" in README


@pytest.mark.skipif(not zoo.names(), reason="no model is shipped")
def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(code, "analyses/README.md", "exec"), {})
    assert (tmp_path / "mean_distance.parquet").is_file()
