"""``ssmlens memory`` and its subcommands: tables, JSON, files, figures, resuming, and one sentence on bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tiny import save_tiny, tiny_mamba1, tiny_mamba2

import ssmlens
from ssmlens import cli
from ssmlens.analyses import memory

TEXT = "The red box is K7. The blue box is M4, and nobody opened it. " * 4
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = tiny_mamba2(hidden_size=16, num_heads=4, state_size=4)
    return str(save_tiny(tmp_path_factory.mktemp("memory") / "tiny", model))


@pytest.fixture
def run(folder: str, capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*arguments: Any, text: str | None = TEXT, model: str = folder) -> tuple[int, str, str]:
        capsys.readouterr()
        extra = [] if text is None else ["--text", text]
        code = cli.main(["memory", *map(str, arguments), "--model", model, *extra])
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


def test_fidelity_prints_and_writes_what_the_study_finds(run: Call, folder: str, tmp_path: Path) -> None:
    outs = [tmp_path / f"f{suffix}" for suffix in (".json", ".parquet", ".csv", ".png")]
    options = [x for out in outs for x in ("--out", out)]
    code, out, _ = run("fidelity", "--lags", "0,1,4", "--rank", 16, "--json", *options)
    assert code == 0
    lens = ssmlens.load(folder)
    ids = torch.tensor(lens.tokenizer.encode(TEXT))
    expected = memory.fidelity(lens.trace(ids), lags=[0, 1, 4], rank=16)
    data = json.loads(out)
    assert (data["sequences"], data["tokens"], data["origin"]) == (1, len(ids), "of the text")
    assert [row["fidelity"] for row in data["rows"]] == pytest.approx(expected.value.flatten().tolist())
    assert data["about"]["assumes"]
    assert memory.Result.load(outs[0]).value.tolist() == expected.value.tolist()
    frame = pd.read_parquet(outs[1])
    assert list(frame["net_r2_low"]) == expected.columns["net_r2_low"].flatten().tolist()
    assert outs[2].read_text().startswith("layer,lag,fidelity")
    assert outs[3].read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("fidelity", "--lags", "0,1", "--rank", 16, "--layer", 1)
    assert code == 0
    assert "percentile bootstrap" in out
    assert "contested: " in out
    assert [line.split()[:2] for line in out.splitlines()[2:4]] == [["1", "0"], ["1", "1"]]


def test_an_interrupted_fidelity_goes_on(run: Call, tmp_path: Path) -> None:
    ledger = tmp_path / "run.jsonl"
    _, whole, _ = run("fidelity", "--lags", "0,1", "--rank", 16, "--json", "--resume", ledger)
    lines = ledger.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    # Cut off in the middle of the second layer.
    ledger.write_text("".join(lines[:3]) + lines[3][: len(lines[3]) // 2])
    code, again, err = run("fidelity", "--lags", "0,1", "--rank", 16, "--json", "--resume", ledger)
    assert (code, err) == (0, "")
    assert json.loads(again) == json.loads(whole)
    code, _, err = run("fidelity", "--lags", "0,1", "--rank", 8, "--resume", ledger)
    assert code == 2
    assert "other settings (rank)" in err


@pytest.mark.parametrize(
    ("command", "columns"),
    [
        (("spectrum",), {"layer", "slowest", "global"}),
        (("transport", "--lags", "0,1,8", "--reads", "8"), {"layer", "lag", "survival", "absent"}),
        (("cross", "--rank", "8"), {"layer", "reader", "residual", "cka"}),
        (("age", "--lags", "0,1,2,4", "--rank", "8"), {"lag", "predicted", "read"}),
        (("remembrance", "--length", "40", "--kept", "1,8,40"), {"kept", "mean", "low"}),
        (("influence", "--probes", "2"), {"back", "influence", "slowest_head"}),
        (("stream", "--train-length", "32", "--bucket", "16"), {"tokens", "loss", "growth"}),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_every_command(command: tuple[str, ...], columns: set[str], run: Call, tmp_path: Path) -> None:
    code, out, _ = run(*command, "--json", "--out", tmp_path / "a.json", "--out", tmp_path / "a.png")
    assert code == 0
    data = json.loads(out)
    assert columns <= set(data["rows"][0])
    assert memory.Result.load(tmp_path / "a.json").value.numel()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(*command, "--out", tmp_path / "b.svg")
    assert code == 0
    assert "assumes: " in out
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'b.svg'}"


def test_answers_of_a_recall_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str) -> None:
    arguments = ["memory", "answers", "--tokens", "64", "--pairs", "4", "--count", "16"]
    assert cli.main([*arguments, "--json", "--out", str(tmp_path / "a.png")]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert sum(row["count"] for row in rows) == 64
    assert all(row["accuracy"] > 0.9 for row in rows)
    assert cli.main([*arguments, "--model", folder]) == 2
    assert "choose a recall model" in capsys.readouterr().err


def test_without_a_text_a_model_reads_what_it_writes(run: Call) -> None:
    options = ("fidelity", "--lags", "0,1", "--rank", "8", "--length", "12", "--json")
    (_, one, _), (_, same, _), (_, other, _) = (run(*options, *more, text=None) for more in ((), (), ("--seed", "1")))
    assert json.loads(one)["origin"] == "written by the model itself"
    assert (json.loads(one)["sequences"], json.loads(one)["tokens"]) == (24, 12)
    assert one == same
    assert one != other


def test_a_recall_model_reads_its_task(run: Call) -> None:
    code, out, _ = run("spectrum", text=None, model="mamba2-recall")
    assert code == 0
    code, out, _ = run("remembrance", "--length", "32", "--json", text=None, model="mamba2-recall")
    assert json.loads(out)["origin"] == "of the recall task"


def test_newlines(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["memory", "stream", "--model", folder, "--train-length", "16", "--bucket", "16", "--json"]
    assert cli.main([*arguments, "--newlines", "64", "--forget", "2", "--clip", "5"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["tokens"] == 64
    assert data["about"]["settings"]["forget"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fidelity", "--lags", "a"), "--lags takes whole numbers"),
        (("fidelity", "--lags", "9999"), "lags are whole numbers from 0 to"),
        (("fidelity", "--features", "gate"), "unknown features"),
        (("fidelity", "--layer", "9"), "layer 9 was not traced"),
        (("fidelity", "--length", "1"), "--length is at least 2"),
        (("fidelity", "--length", "9999"), "fewer than a --length"),
        (("fidelity", "--out", "a.txt"), "choose a name that ends in"),
        (("remembrance", "--kept", "0"), "lie between 1 and"),
        (("transport", "--reads", "0"), "--reads is at least 1"),
        (("influence", "--probes", "0"), "--probes is at least 1"),
        (("stream", "--bucket", "0"), "above 0"),
        (("stream", "--newlines", "1"), "at least 2"),
    ],
)
def test_bad_input_is_one_sentence(arguments: tuple[str, ...], message: str, run: Call) -> None:
    code, out, err = run(*arguments, text=None if "--newlines" in arguments else TEXT)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err


def test_options_before_a_subcommand_are_not_lost(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "--model", folder, "fidelity"]) == 2
    assert "--model stands before fidelity" in capsys.readouterr().err


def test_figures_say_what_they_show() -> None:
    from ssmlens.plotting.studies import memory as drawn

    g = torch.Generator().manual_seed(0)
    u = torch.randn(600, 2, generator=g, dtype=torch.float64)
    figure = drawn.fidelity(memory.fidelity(u.roll(1, 0), u, [0, 1, 2]))
    line = figure.axes[1].lines[0]
    assert line.get_ydata()[1] > 0.99
    assert abs(line.get_ydata()[0]) < 0.05
    assert "held-out" in figure.get_label()
    lens = ssmlens.load(tiny_mamba1(hidden_size=16, state_size=4))
    ids = torch.randint(0, 256, (10, 40), generator=g)
    found = memory.timescale_spectrum(lens.trace(ids))
    figure = drawn.timescale_spectrum(found)
    assert figure.axes[0].lines[0].get_ydata()[0] == pytest.approx(found.value[0, 0, 0].item())
    assert len(figure.axes[0].lines) == 4
    recalled = memory.recall_by_age(lens.trace(ids), lags=[0, 1, 2, 4], rank=8)
    assert len(drawn.recall_by_age(recalled).axes) == 3
