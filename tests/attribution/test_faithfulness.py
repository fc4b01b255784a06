"""Faithfulness metrics: closed forms of additive answers, the model run by hand, and the comparison of methods."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from tolerances import EXACT

import ssmlens
from ssmlens import zoo
from ssmlens.attribution import (
    METHODS,
    Attribution,
    Case,
    attribute,
    compare,
    decompose,
    faithfulness,
    infidelity,
    randomisation,
    sensitivity,
)
from ssmlens.attribution._benchmark import Benchmark, bootstrap, finding
from ssmlens.attribution._faithfulness import BETTER, SHARES, curve, measure
from ssmlens.attribution._perturb import order_of, sizes_of, subsets
from ssmlens.cli import main
from ssmlens.errors import PromptError, SsmlensError
from ssmlens.zoo.questions import questions

IDS = [5, 1, 17, 9, 9, 30, 2, 11, 5, 4, 36, 3]


def additive(weights: torch.Tensor) -> Any:
    return lambda keep: (keep * weights).sum(-1)


def lens_of(family: str) -> ssmlens.Lens:
    return ssmlens.load(getattr(checkpoints, family)())


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_additive_answers_have_closed_forms(length: int) -> None:
    weights = torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    order, total = order_of(weights), float(weights.sum())
    falling = weights.sort(descending=True).values
    along = torch.cat([torch.zeros(1, dtype=torch.float64), falling.cumsum(0)])
    found = measure(additive(weights), order, list(BETTER))
    share, answers = curve(additive(weights), order)
    assert (answers - (total - along)).abs().max() < EXACT
    assert share.tolist() == [k / length for k in range(length + 1)]
    area = float(torch.trapezoid(along, dx=1 / length))
    assert abs(found["insertion"] - area) < EXACT
    assert abs(found["deletion"] - (total - area)) < EXACT
    rising = torch.cat([torch.zeros(1, dtype=torch.float64), falling.flip(0).cumsum(0)])
    assert abs(found["deletion_least"] - (total - float(torch.trapezoid(rising, dx=1 / length)))) < EXACT
    assert abs(found["flip"] - (found["deletion_least"] - found["deletion"])) < EXACT
    tops = [along[max(1, round(s * length))] for s in SHARES]
    assert abs(found["comprehensiveness"] - float(sum(tops)) / len(SHARES)) < EXACT
    assert abs(found["sufficiency"] - float(sum(total - t for t in tops)) / len(SHARES)) < EXACT


def test_constant_answers_leave_nothing_to_find() -> None:
    found = measure(lambda keep: torch.ones(len(keep)), torch.randperm(9), list(BETTER))
    assert found["comprehensiveness"] == found["sufficiency"] == found["flip"] == 0
    assert found["deletion"] == found["insertion"] == 1


def test_orders_and_sizes() -> None:
    assert order_of(torch.tensor([1.0, 3.0, 3.0, -2.0])).tolist() == [1, 2, 0, 3]
    assert sizes_of(7, None) == list(range(8))
    assert sizes_of(100, 4) == [0, 25, 50, 75, 100]
    assert sizes_of(3, 10) == [0, 1, 2, 3]
    assert subsets(torch.tensor([2, 0, 1]), [0, 1, 3]).tolist() == [[False] * 3, [False, False, True], [True] * 3]


@pytest.mark.parametrize("baseline", ["zero", "mean", "drop", 7])
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_answers_are_the_models_own(family: str, baseline: str | int) -> None:
    """Every point of the curves by hand: the model itself, on embeddings put together or on shorter prompts."""
    lens = lens_of(family)
    found = decompose(lens, IDS)
    result = faithfulness(lens, found, ["deletion", "insertion"], baseline, output="logit", random_orders=1)
    table = lens.model.get_input_embeddings().weight.detach()
    stand_in = {"zero": torch.zeros_like(table[0]), "mean": table.mean(0)}.get(str(baseline), table[7])
    order = found.scores[0].argsort(descending=True, stable=True).tolist()

    def answer(kept: set[int]) -> float:
        if baseline == "drop":
            rows = table[[IDS[k] for k in sorted(kept)]] if kept else torch.zeros_like(table[:1])
        else:
            rows = torch.stack([table[IDS[k]] if k in kept else stand_in for k in range(len(IDS))])
        with torch.no_grad():
            return float(lens.model(inputs_embeds=rows[None]).logits[0, -1, int(found.target[0])])

    everything = set(range(len(IDS)))
    deleted = [answer(everything - set(order[:k])) for k in range(len(IDS) + 1)]
    inserted = [answer(set(order[:k])) for k in range(len(IDS) + 1)]
    # transformers keeps some steps of its scans in float32.
    for name, values in (("deletion", deleted), ("insertion", inserted)):
        area = float(torch.trapezoid(torch.tensor(values, dtype=torch.float64), dx=1 / len(IDS)))
        assert abs(float(result.value[name][0]) - area) < 1e-5
    assert abs(float(result.whole[0]) - deleted[0]) < 1e-5


def test_controls_and_table() -> None:
    lens = lens_of("mamba2")
    found = decompose(lens, torch.tensor([IDS, IDS[::-1]]))
    result = faithfulness(lens, found, list(BETTER), random_orders=5, seed=3)
    again = faithfulness(lens, found, list(BETTER), random_orders=5, seed=3)
    table = result.table()
    assert len(table) == 2 * len(BETTER)
    assert table.equals(again.table())
    assert result.random["flip"].shape == (2, 5)
    nearest = Attribution(**{**vars(found), "scores": torch.arange(12.0).expand(2, -1)})
    assert torch.equal(faithfulness(lens, nearest, ["flip"], random_orders=1).value["flip"], result.recency["flip"])
    gain = result.value["deletion"] - result.random["deletion"].mean(1)
    assert torch.equal(result.gain("deletion"), -gain)


def test_refusals() -> None:
    lens = lens_of("mamba1")
    found = decompose(lens, IDS)
    with pytest.raises(SsmlensError, match="unknown metric 'auc': choose from deletion"):
        faithfulness(lens, found, ["auc"])
    with pytest.raises(SsmlensError, match="unknown output 'loss'"):
        faithfulness(lens, found, output="loss")
    with pytest.raises(PromptError, match="unknown baseline 'pad'"):
        faithfulness(lens, found, baseline="pad")
    with pytest.raises(SsmlensError, match="random_orders is at least 1"):
        faithfulness(lens, found, random_orders=0)
    with pytest.raises(PromptError, match="not those of the attribution"):
        faithfulness(lens, found, prompt=IDS[1:])
    for name in ("lime", "all"):  # "all" stands for several, and here one is asked for
        with pytest.raises(SsmlensError, match=f"unknown method '{name}': choose one of decompose"):
            attribute(lens, IDS, name)
        with pytest.raises(SsmlensError, match=f"unknown method '{name}': choose one of decompose"):
            randomisation(lens, IDS, name)
    with pytest.raises(SsmlensError, match="no method is named: choose from all, decompose"):
        compare(lens, [Case(IDS)], [])


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_by_name(name: str) -> None:
    for family in ("mamba1", "mamba2"):
        lens = lens_of(family)
        found = attribute(lens, torch.tensor([IDS, IDS[::-1]]), name, target=4)
        assert found.scores.shape == (2, len(IDS))
        assert found.scores.isfinite().all()
        assert found.target.tolist() == [4, 4]
        alone = attribute(lens, IDS[::-1], name, target=4)
        if name not in ("smoothgrad", "gradient_shap"):  # their noise is drawn for the batch
            assert (found.scores[1] - alone.scores[0]).abs().max() < 1e-8 * max(1.0, float(alone.scores.abs().max()))


def test_infidelity_of_an_additive_answer_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose logit is a sum over its tokens: its own terms predict every removal."""
    from ssmlens.attribution import _perturb

    lens = lens_of("mamba1")
    found = decompose(lens, IDS)
    weights = torch.randn(len(IDS), dtype=torch.float64)
    monkeypatch.setattr(_perturb.Masked, "__call__", lambda self, keep: (keep * weights).sum(-1))
    exact = Attribution(**{**vars(found), "scores": weights[None]})
    assert float(infidelity(lens, exact)) < EXACT
    wrong = Attribution(**{**vars(found), "scores": weights[None] + 1})
    # Each token is in the set with probability 1/2: E[count^2] = k/4 + k^2/4.
    k = len(IDS)
    assert abs(float(infidelity(lens, wrong, samples=4000)) / (k / 4 + k * k / 4) - 1) < 0.1


def test_sensitivity_and_randomisation() -> None:
    lens = lens_of("mamba2")
    small, large = (sensitivity(lens, IDS, "decompose", radius=r) for r in (1e-6, 0.1))
    assert 0 < small < large
    with pytest.raises(SsmlensError, match="sensitivity knows decompose"):
        sensitivity(lens, IDS, "occlusion")
    before = {k: v.clone() for k, v in lens.model.state_dict().items()}
    found = randomisation(lens, IDS, "gradient_x_input")
    assert set(found.signed) >= {"decay", "convolution", "projections", "embedding", "all"}
    assert all(-1 <= x <= 1 for x in found.signed.values())
    assert abs(found.signed["all"]) < 0.95
    assert all(torch.equal(v, before[k]) for k, v in lens.model.state_dict().items())
    with pytest.raises(SsmlensError, match="unknown group 'norm': choose from"):
        randomisation(lens, IDS, groups=["norm"])
    # What permutes nothing changes nothing.
    assert randomisation(lens_of("mamba1"), IDS, groups=[]).signed == {}


def test_finding_a_source() -> None:
    scores = torch.tensor([0.1, -5.0, 2.0, 0.0, 9.0])  # the last token asks and does not count
    assert finding(scores, [1]) == {"precision_at_1": 1.0, "auc": 1.0}
    assert finding(scores, [2]) == {"precision_at_1": 0.0, "auc": 2 / 3}
    assert finding(torch.zeros(5), [2])["auc"] == 0.5
    assert math.isnan(finding(scores, [4])["auc"])


def test_bootstrap_covers_the_mean() -> None:
    values = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap(values)
    standard = float(values.std() / 20)
    assert abs((high - low) / (2 * 1.96 * standard) - 1) < 0.1
    assert bootstrap(torch.full((5,), 2.0, dtype=torch.float64)) == (2.0, 2.0)
    known = torch.cat([values, torch.full((3,), math.nan)])
    assert bootstrap(known) == (low, high)
    # One prompt says nothing about how prompts differ.
    assert all(map(math.isnan, bootstrap(values[:1])))


def test_prompts_without_a_metric_are_left_out_of_mean_and_interval() -> None:
    known = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    some = torch.cat([known, torch.tensor([math.nan])])
    rows = [Benchmark({("m", "", "auc"): x}, {("", "auc"): 0 * x}, {}).table().iloc[0] for x in (known, some)]
    for column in ("mean", "low", "high", "gain", "gain_low", "gain_high"):
        assert rows[0][column] == rows[1][column]


def test_comparison_on_a_recall_model() -> None:
    """The frozen decomposition finds the told value; recency does not."""
    lens = ssmlens.load("mamba2-recall")
    cases = [Case(q.ids, q.target, q.source) for q in questions("mamba2-recall", 8)]
    found = compare(lens, cases, ["decompose"], ["zero"], ["flip"], points=5, random_orders=3)
    table = found.table().set_index(["method", "metric"])
    assert set(table.index.get_level_values(0)) == {"decompose", "recency", "random"}
    assert table.loc[("decompose", "precision_at_1"), "mean"] > table.loc[("random", "precision_at_1"), "mean"]
    assert table.loc[("decompose", "flip"), "gain"] > 0
    assert table.loc[("random", "flip"), "gain"] == 0
    with pytest.raises(SsmlensError, match="at least one prompt"):
        compare(lens, [])


@pytest.mark.parametrize("name", zoo.names())
def test_held_out_prompts(name: str) -> None:
    found = questions(name)
    assert len(found) == 120
    known = [q for q in found if q.source]
    assert len(known) >= 60
    for q in known:
        assert q.target is not None
        assert all(0 <= k < len(q.ids) - 1 for k in q.source)
        assert q.target in [q.ids[k] for k in q.source]
    with pytest.raises(ValueError, match="count is 1 or more"):
        questions(name, 0)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.csv"
    arguments = ["--methods", "decompose,hidden", "--count", "2", "--points", "3", "--random-orders", "2"]
    assert main(["faithfulness", "--model", "mamba1-recall", *arguments, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "precision_at_1" in text
    assert "recency" in text
    assert out.read_text().startswith("method,baseline,metric")
    assert main(["faithfulness", "--model", "mamba1-recall", *arguments, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) > 10
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The code of the red box is K7.\n\nShe went to the\n")
    few = ["--methods", "decompose", "--prompts", str(prompts), "--points", "2", "--random-orders", "1"]
    page = tmp_path / "table.md"
    assert main(["faithfulness", *few, "--baselines", "zero", "--metrics", "flip", "--out", str(page)]) == 0
    assert "2 prompts" in capsys.readouterr().out
    head, rule, *rows = page.read_text().splitlines()
    assert (head, rule) == ("| method | flip, zero |", "| --- | --- |")
    assert [row.split(" | ")[0] for row in rows] == ["| random", "| decompose", "| recency"]
    assert main(["faithfulness", "--methods", "lime"]) == 2
    assert "unknown method 'lime'" in capsys.readouterr().err
