"""``ssmlens lyapunov`` and its figures: numbers as the study gives them, files, refusals, and going on."""

from __future__ import annotations

import json
import math

import checkpoints
import pytest
import torch

import ssmlens
from ssmlens import cli
from ssmlens.analyses import lyapunov
from ssmlens.plotting.studies import lyapunov as drawn

IDS = "3,17,0,36,5,5,21,9,30,2,11,8,1,1,29,7"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = checkpoints.mamba1(hidden_size=4, state_size=2, time_step_rank=2, expand=1)
    return str(checkpoints.transformers_folder(model, tmp_path_factory.mktemp("cli") / "small"))


@pytest.fixture(scope="module")
def lens(folder):
    return ssmlens.load(folder)


@pytest.fixture
def run(folder, capsys):
    """Run a command on the small model: exit code, stdout, stderr."""

    def call(*arguments, ids=IDS):
        code = cli.main(["lyapunov", *map(str, arguments), "--model", folder, "--ids", ids])
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


def ids() -> torch.Tensor:
    return torch.tensor([int(x) for x in IDS.split(",")])


def test_stack_prints_what_the_study_finds(run, lens, tmp_path) -> None:
    code, out, err = run("stack", "-k", 3, "--every", 3, "--json", "--out", tmp_path / "s.json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    found = lyapunov.stack(lens, ids(), 3, every=3)
    assert [row["nats/token"] for row in data["rows"]] == pytest.approx(found.value.tolist(), abs=1e-12)
    assert [row["frozen gates"] for row in data["rows"]] == pytest.approx(
        found.control["frozen_gates"].tolist(), abs=1e-12
    )
    saved = lyapunov.Result.load(tmp_path / "s.json")
    assert torch.equal(saved.value, found.value)
    code, out, _ = run("stack", "-k", 40, "--no-control")
    assert code == 0
    assert "-inf" in out
    assert "nan" not in out
    assert "does not say: anything new in the limit" in out


def test_the_other_levels_print_what_the_study_finds(run, lens) -> None:
    rows = json.loads(run("latent", "--json")[1])["rows"]
    exact = lyapunov.latent(lens.trace(ids()))
    assert [row["largest"] for row in rows] == pytest.approx(exact.value.flatten(1).amax(1).tolist(), rel=1e-6)
    rows = json.loads(run("gain", "--horizons", "1,3", "--starts", 1, "--json")[1])["rows"]
    exact = lyapunov.transient_gain(lens, ids(), [1, 3], starts=1)
    assert [row["gain"] for row in rows] == pytest.approx(exact.value.tolist(), rel=1e-9)
    arguments = ("closed", "--steps", 6, "--discard", 2, "--temperatures", "0.5,1", "-k", 2, "--json")
    rows = json.loads(run(*arguments)[1])["rows"]
    exact = lyapunov.closed_loop(lens, ids(), 6, 2, temperatures=[0.5, 1.0], discard=2)
    assert [row["nats/token"] for row in rows] == pytest.approx(exact.value.flatten().tolist(), abs=1e-9)
    rows = json.loads(run("divergence", "--steps", 5, "--pairs", 2, "--size", 0.5, "--json")[1])["rows"]
    exact = lyapunov.divergence(lens, ids(), 5, pairs=2, size=0.5)
    assert [row["KL"] for row in rows] == pytest.approx(exact.columns["kl"].tolist(), rel=1e-6)


def test_the_summary_says_what_each_level_does_not(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lyapunov, "Budget", lambda k, steps: lyapunov._summary.Budget(k, steps, 1, 2, 2))
    picture = tmp_path / "levels.png"
    code, out, _ = run("--steps", 6, "-k", 1, "--out", picture, "--resume", tmp_path / "parts")
    assert code == 0
    for name, reading in lyapunov.READING.items():
        assert f"{name}: {reading.question}" in out
        assert reading.silent in out
    assert "No key-value cache" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    done = {x.name.removeprefix("parts.") for x in tmp_path.iterdir() if x.name.startswith("parts.")}
    assert {"stack", "gain", "divergence"} <= done
    again = json.loads(run("--steps", 6, "-k", 1, "--json", "--resume", tmp_path / "parts")[1])
    assert [row["level"] for row in again["rows"]] == list(lyapunov.READING)
    assert again["reading"]["gain"]["says"] == lyapunov.READING["gain"].says


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("stack", "--steps", 500), "the text has 16"),
        (("stack", "--dtype", "bfloat16"), "--dtype is float64 or float32 here"),
        (("stack", "-k", 0), "k is at least 1, got 0"),
        (("gain", "--horizons", "0"), "--horizons takes whole numbers above 0"),
        (("gain", "--horizons", "a"), "--horizons takes numbers separated by commas"),
        (("gain", "--horizons", "64"), "need more than 16 tokens"),
        (("closed", "--temperatures", "0"), "temperatures are different numbers above 0"),
        (("divergence", "--size", "0"), "size is above 0"),
        (("latent", "--window", "99"), "window is between 1 and the 16 tokens"),
        (("latent", "--out", "x.txt"), "cannot write x.txt"),
    ],
)
def test_bad_input_is_one_sentence(run, arguments, sentence) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_figures_show_the_numbers(lens) -> None:
    text = ids()
    stack = lyapunov.stack(lens, text, 3, every=4, window=4, discard=4)
    axes = drawn.stack(stack).axes[0]
    heights = [y for line in axes.lines for y in line.get_ydata()]
    for value in stack.columns["mean"].tolist():
        assert any(y == pytest.approx(value) for y in heights)
    gain = lyapunov.transient_gain(torch.tensor([[0.9, 5.0], [0.0, 0.8]], dtype=torch.float64), horizons=[1, 2, 6])
    line = drawn.gain(gain).axes[0].lines[1]
    assert line.get_ydata().tolist() == pytest.approx(gain.value.tolist())
    closed = lyapunov.closed_loop(lens, text, 4, 2, temperatures=[0.5, 2.0], discard=0)
    lines = drawn.closed(closed).axes[0].lines
    assert any(list(x.get_ydata()) == pytest.approx(closed.value[:, 0].tolist()) for x in lines)
    apart = drawn.divergence(lyapunov.divergence(lens, text, 5, pairs=2, size=0.5))
    assert len(apart.axes) == 2
    layers = drawn.latent(lyapunov.latent(lens.trace(text))).axes[0].lines
    assert len(layers) == 2
    assert all(math.isfinite(y) for x in layers for y in x.get_ydata())
