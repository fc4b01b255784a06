"""`Attribution` as a value: checks, table, files."""

from __future__ import annotations

import math
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import perturb
from tiny import tiny_mamba1, tiny_tokenizer

import ssmlens
from ssmlens.attribution import Attribution, decompose, gradient_x_input
from ssmlens.attribution.result import completeness


def made(method=decompose) -> Attribution:
    return method(
        ssmlens.load(perturb(tiny_mamba1()).float(), tokenizer=tiny_tokenizer()), ["abcd", "xy"], target=["a", "b"]
    )


@pytest.mark.parametrize("ending", ["safetensors", "json"])
@pytest.mark.parametrize("method", [decompose, gradient_x_input])
def test_files_bring_everything_back(tmp_path: Path, ending: str, method) -> None:
    before = made(method)
    before.save(tmp_path / f"a.{ending}")
    after = Attribution.load(tmp_path / f"a.{ending}")
    for name in ("scores", "bias", "target", "logit", "completeness_error", "position"):
        ours, theirs = getattr(after, name), getattr(before, name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))
    assert after.tokens == before.tokens
    assert after.method == before.method
    assert after.settings == dict(before.settings)
    assert repr(after) == repr(before)


def test_table_adds_up() -> None:
    found = made()
    table = found.table()
    assert list(table.columns) == ["prompt", "position", "token", "score", "share"]
    assert table[table.prompt == 1].token.tolist()[:2] == ["x", "y"]
    for i in range(2):
        mine = table[table.prompt == i]
        assert mine.score.sum() == pytest.approx(float(found.logit[i]), rel=1e-5)
        assert mine.share.sum() == pytest.approx(1, rel=1e-5)
        assert mine.position.tolist()[-1] == -1  # the bias
    assert len(table) == 4 + 1 + 2 + 1


def test_targets_and_positions_as_asked() -> None:
    found = made()
    tokenizer = tiny_tokenizer()
    assert found.target.tolist() == [tokenizer.encode("a")[0], tokenizer.encode("b")[0]]
    assert found.position.tolist() == [3, 1]
    assert found.settings["target"] == ["a", "b"]
    assert found.settings["position"] == -1
    with pytest.raises(ValueError, match=r"the target 'ab' is 2 tokens"):
        decompose(ssmlens.load(tiny_mamba1(), tokenizer=tokenizer), "abcd", target="ab")


def test_completeness_by_hand() -> None:
    error = completeness(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0]), torch.tensor([5.0, 0.0]))
    assert error.tolist() == [pytest.approx(0.2), 0.0]


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"scores are \(b=1, s\), s at least"):
        Attribution(torch.zeros(1, 1), *[torch.zeros(1)] * 4, [["a", "b"]], "m", torch.zeros(1))
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=r"target is \(b=1,\), got \(2,\)"):
        Attribution(torch.zeros(1, 2), one, torch.zeros(2), one, one, [["a", "b"]], "m", one)


def test_what_is_no_attribution_is_refused(tmp_path: Path) -> None:
    found = decompose(ssmlens.load(checkpoints.mamba1()), [1, 2])
    with pytest.raises(ValueError, match=r"saved as .safetensors or .json"):
        found.save(tmp_path / "a.pkl")
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "b.safetensors").write_bytes(b"nonsense")
    for name in ("b.json", "b.safetensors", "c.json", "c.safetensors"):
        with pytest.raises(ValueError, match=r"does not hold an attribution"):
            Attribution.load(tmp_path / name)
    found.save(tmp_path / "d.json")
    text = (tmp_path / "d.json").read_text()
    (tmp_path / "d.json").write_text(text.replace("ssmlens.attribution/1", "other/1"))
    with pytest.raises(ValueError, match=r"its format is 'other/1'"):
        Attribution.load(tmp_path / "d.json")


def test_no_promise_is_nan() -> None:
    assert math.isnan(made(gradient_x_input).completeness_error[0])
    assert "no promise about the sum" in repr(made(gradient_x_input))
