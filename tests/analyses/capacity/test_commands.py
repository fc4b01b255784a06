"""The commands of the study and their figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_mamba2

import ssmlens
from ssmlens.analyses import capacity
from ssmlens.analyses._result import Result
from ssmlens.analyses.capacity.checks import drive, orthogonal
from ssmlens.cli import main
from ssmlens.plotting.studies import capacity as drawn

RECALL = ["--model", "mamba2-recall"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["capacity", *arguments]) == 0
    return capsys.readouterr().out


def test_summary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = run(capsys, *RECALL, "--out", str(tmp_path / "size.png"))
    assert "mamba2-recall" in out
    assert (tmp_path / "size.png").stat().st_size > 1000
    found = json.loads(run(capsys, *RECALL, "--json"))
    assert [row["layer"] for row in found["rows"]] == [0, 1]
    assert found["rows"][1]["null"] > found["rows"][1]["participation"]


def test_state_size(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = run(capsys, "state-size", *RECALL, "--cuts", "5,9", "--out", str(tmp_path / "size.parquet"))
    assert "at most" in out
    found = json.loads(run(capsys, "state-size", *RECALL, "--cuts", "5", "--layer", "1", "--json"))
    exact = capacity.effective_state_size(
        ssmlens.load("mamba2-recall").trace(ssmlens.zoo.passage("mamba2-recall"), layers=[1]), 5
    )
    assert [row["effective_state_size"] for row in found["rows"]] == pytest.approx(exact.value.flatten().tolist())


def test_rank_floor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "floor.json"
    options = ("--layer", "1", "--pairs", "4", "--length", "32", "--prompts", "30", "--ranks", "0,8,16")
    out = run(capsys, "rank-floor", *RECALL, *options, "--out", str(target))
    assert "floor" in out
    saved = Result.load(target)
    assert saved.value[0, 0, 0] < 0.4
    assert saved.value[0, 0, 2] > 0.99
    found = json.loads(run(capsys, "rank-floor", *RECALL, "--text", "a 1 b 2 a . b . c 3 c .", "--length", "6",
                           "--metric", "kl", "--ranks", "0,16", "--json"))  # fmt: skip
    assert found["prompts"] == 2


def test_driven_models(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "memory", *RECALL, "--samples", "600", "--features", "16", "--lags", "5", "--json"))
    assert len(found["rows"]) == 6
    found = json.loads(
        run(capsys, "processing", *RECALL, "--samples", "600", "--features", "16", "--lags", "5,4,3", "--json")
    )
    assert [row["degree"] for row in found["rows"]] == [1, 2, 3]
    found = json.loads(run(capsys, "bits", "--lengths", "4,24", "--trials", "20", "--json"))
    assert found["rows"][0]["copy_accuracy"] == 1
    assert "K* =" in run(capsys, "load", "--vocabulary", "32", "--simulate", "100")


def test_collapse(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("--train-length", "64", "--length", "300", "--bucket", "16", "--resume", str(tmp_path / "run"))
    out = run(capsys, "collapse", *RECALL, *options, "--out", str(tmp_path / "collapse.svg"))
    assert "onset" in out
    assert (tmp_path / "collapse.svg").stat().st_size > 1000
    found = json.loads(run(capsys, "collapse", *RECALL, *options, "--by", "head", "--json"))
    assert len(found["rows"]) == 2 * 4 * 19


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["rank-floor", "--metric", "bleu", *RECALL], "choose one of loss"),
        (["state-size", "--cuts", "x", *RECALL], "whole numbers"),
        (["state-size", "--cuts", "99999", *RECALL], "has cuts|have cuts"),
        (["collapse", *RECALL], "train-length"),
        (["load", "--decay", "2"], "decay lies above 0"),
        (["--cut", "3", "load"], "give options after it"),
        (["memory", "--out", "x.txt", *RECALL], "choose a name that ends in"),
    ],
)
def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    import re

    assert main(["capacity", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(sentence, error)
    assert len(error.splitlines()) == 1


def test_figures_say_what_they_show() -> None:
    lens = ssmlens.load(tiny_mamba2())
    trace = lens.trace(list(range(3, 43)))
    states, u = drive(orthogonal(4, 0.8), 4, 3000)
    found = {
        "size": drawn.state_size(capacity.effective_state_size(trace)),
        "single": drawn.state_size(capacity.effective_state_size(trace[0].recurrence, 9)),
        "hankel": drawn.hankel(capacity.hankel(trace, [9, 20])),
        "floor": drawn.rank_floor(capacity.rank_floor(lens, list(range(3, 23)), None, "kl", [0, 1, 8])),
        "ranks": drawn.ranks(capacity.rank_statistics(trace)),
        "memory": drawn.memory_capacity(capacity.memory_capacity(states, u, 12)),
        "exact": drawn.memory_capacity(capacity.memory_capacity_exact([0.9, 0.5], lags=12)),
        "processing": drawn.processing(capacity.information_processing_capacity(states, u, lags=(9, 4, 2))),
        "tax": drawn.processing(capacity.selectivity_tax(states, states, u, lags=(9, 4, 2))),
        "load": drawn.hebbian_load(capacity.hebbian_load(8, 8, 16, simulate=50)),
        "bits": drawn.copied_bits(
            capacity.effective_bits([2, 4, 8], [1, 0.95, 0.2], 16, trials=50, elements=2, bits=16)
        ),
        "collapse": drawn.collapse(capacity.collapse(lens, torch.arange(64)[None], 16, bucket=8)),
    }
    for name, figure in found.items():
        figure.draw_without_rendering()
        assert figure.get_label(), name
        assert len(figure.axes) >= 1
