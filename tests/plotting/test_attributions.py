"""Figures of attributions, the report's section about a prediction, and `ssmlens attribute`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_mamba1

import ssmlens
from ssmlens import plotting, report
from ssmlens.attribution import Attribution, decompose, gradient_x_input
from ssmlens.cli import main
from ssmlens.plotting import pages
from ssmlens.plotting.attributions import steps_to_logit

TEXT = "The code is <K7> & more."


def made(scores: list[float], logit: float, bias: float = 0.0, error: float = 0.0) -> Attribution:
    one = torch.zeros(1)
    return Attribution(
        scores=torch.tensor([scores]),
        bias=one + bias,
        target=torch.tensor([3]),
        logit=one + logit,
        completeness_error=one + error,
        tokens=[[f"t{i}$" for i in range(len(scores))]],
        method="decompose",
        position=torch.tensor([len(scores) - 1]),
        settings={"model": "tiny"},
    )


def test_steps_add_up_to_the_logit() -> None:
    names, steps = steps_to_logit(made([1.0, -4.0, 0.5, 2.0, 0.25], 0.75, bias=1.0), most=3)
    assert names == ["0 t0$", "1 t1$", "3 t3$", "2 other tokens", "bias"]
    assert steps == [1.0, -4.0, 2.0, 0.75, 1.0]
    names, steps = steps_to_logit(made([1.0, 2.0], 5.0, error=float("nan")))
    assert names == ["0 t0$", "1 t1$", "not attributed"]
    assert sum(steps) == 5.0


def test_waterfall_bars_end_at_the_logit() -> None:
    figure = plotting.attribution(made([1.0, -4.0, 0.5], -1.5, bias=1.0), "a$b")
    axes = figure.axes[0]
    bars = axes.patches
    assert len(bars) == 4
    assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(-1.5)
    assert "decompose" in axes.get_title()
    assert "completeness error 0.0e+00" in figure.get_label()
    nan = plotting.attribution(made([1.0], 1.0, error=float("nan")))
    assert "promises no sum" in nan.get_label()


def test_methods_side_by_side() -> None:
    one, other = made([1.0, -4.0, 0.5], 1.0), made([0.0, 0.0, 0.0], 1.0)
    figure = plotting.methods_side_by_side({"a": one, "b": other}, source=[1])
    grid = figure.axes[0].images[0].get_array()
    assert grid[0].tolist() == [0.25, -1.0, 0.125]
    assert grid[1].tolist() == [0.0, 0.0, 0.0]
    assert "where the answer was told" in figure.get_label()
    with pytest.raises(ValueError, match="at least one"):
        plotting.methods_side_by_side([])
    with pytest.raises(ValueError, match="of one prompt"):
        plotting.methods_side_by_side({"a": one, "b": made([1.0], 1.0)})


def test_scored_text_is_titled_by_the_method(tmp_path: Path) -> None:
    figure = plotting.scored_text(made([1.0, -4.0], 1.0), "x")
    assert figure.axes[0].get_title().startswith("decompose: the logit of 'x'")
    for suffix in plotting.figures.FORMATS:
        assert plotting.save(figure, tmp_path / f"text{suffix}").stat().st_size > 1000


def test_interactive_waterfall() -> None:
    figure = pages.attribution(made([1.0, -4.0], -3.0), "<b>")
    assert list(figure.data[0].x) == [1.0, -4.0, 0]
    assert list(figure.data[0].measure) == ["relative", "relative", "total"]
    assert "<b>" not in figure.data[0].y


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), tiny_mamba1())


def test_report_takes_the_prediction_apart(folder: Path) -> None:
    lens = ssmlens.load(folder)
    numbers = report.measure(lens.trace(TEXT), lens=lens, decode=lens.tokenizer.decode)
    found = decompose(lens, TEXT)
    assert numbers.explained is not None
    assert numbers.explained.scores.tolist() == found.scores[0].double().tolist()
    assert numbers.explained.scores.sum() + numbers.explained.bias == pytest.approx(numbers.explained.logit, rel=1e-4)
    html = report.build(lens, TEXT)
    assert 'id="explained"' in html
    assert "&lt;" in html
    assert "<K7>" not in html
    assert 'id="explained"' not in report.build(lens.trace(TEXT))


def test_report_of_a_long_text_leaves_the_section_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmlens.report import explained

    monkeypatch.setattr(explained, "MOST_TOKENS", 5)
    assert 'id="explained"' not in report.build(ssmlens.load(folder), TEXT)


def test_attribute_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lens = ssmlens.load(folder)
    base = ["attribute", "--model", str(folder), "--text", TEXT]
    assert main([*base, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    found = decompose(lens, TEXT)
    assert seen["target"] == int(found.target[0])
    assert seen["scores"] == pytest.approx(found.scores[0].tolist(), abs=1e-6)
    assert seen["completeness_error"] < 1e-4
    assert main([*base, "--method", "gradient_x_input", "--target", "K", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["target_token"] == "K"
    assert seen["completeness_error"] is None
    assert seen["scores"] == pytest.approx(gradient_x_input(lens, TEXT, "K").scores[0].tolist(), abs=1e-6)
    assert main(base) == 0
    assert "completeness error" in capsys.readouterr().out
    for suffix in ("png", "svg", "html", "csv", "parquet", "json", "safetensors"):
        out = tmp_path / f"found.{suffix}"
        assert main([*base, "--out", str(out)]) == 0
        assert out.stat().st_size > 100
    assert torch.equal(Attribution.load(tmp_path / "found.safetensors").scores, found.scores)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "lime"], "unknown method 'lime': choose one of decompose"),
        (["--method", "all"], "unknown method 'all': choose one of decompose"),
        (["--target", "two tokens"], "give one token"),
        (["--position", "900"], "position 900 does not exist"),
        (["--out", "x.docx"], ".safetensors"),
    ],
)
def test_bad_arguments(folder: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attribute", "--model", str(folder), "--text", TEXT, *arguments]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert not captured.out
