"""Feature ablation and occlusion against the model itself run without the tokens."""

from __future__ import annotations

from typing import Any

import checkpoints
import naive_lm
import pytest
import torch
from checkpoints import gap
from footprint import plain_logits

import ssmlens
from ssmlens.attribution import feature_ablation, occlusion
from ssmlens.errors import PromptError, SsmlensError

IDS = [3, 17, 0, 36, 5, 5, 21]
EXACT = 1e-12


def without(model: Any, gone: list[int], baseline: Any) -> float:
    """The last token's logit of token 7 with the tokens at ``gone`` replaced or dropped."""
    if baseline == "drop":
        return float(naive_lm.last_logits(model, embedded(model, [k for i, k in enumerate(IDS) if i not in gone]))[7])
    table = model.backbone.embeddings.weight.detach()
    start = {"zero": torch.zeros(12).double(), "mean": table.mean(0)}.get(baseline)
    x = table[IDS].clone()
    x[gone] = table[baseline] if start is None else start
    return float(naive_lm.last_logits(model, x)[7])


def embedded(model: Any, ids: list[int]) -> torch.Tensor:
    return model.backbone.embeddings.weight.detach()[ids]


@pytest.mark.parametrize("baseline", ["zero", "mean", 4, "drop"])
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_scores_are_losses_of_the_logit(family: str, baseline: Any) -> None:
    model = getattr(checkpoints, family)(use_bias=True)
    lens, full = ssmlens.load(model), without(model, [], "zero")
    found = feature_ablation(lens, IDS, 7, baseline=baseline)
    truth = torch.tensor([full - without(model, [i], baseline) for i in range(len(IDS))], dtype=torch.float64)
    assert gap(found.scores[0], truth) <= EXACT
    assert found.logit.item() == pytest.approx(full, abs=EXACT)
    assert found.completeness_error.isnan().all()
    assert found.settings["baseline"] == baseline
    grouped = feature_ablation(lens, IDS, 7, baseline=baseline, groups=[0, 0, 5, 5, 0, 1, 1])
    for group in ([0, 1, 4], [2, 3], [5, 6]):
        loss = full - without(model, group, baseline)
        assert gap(grouped.scores[0, group], torch.full((len(group),), loss, dtype=torch.float64)) <= EXACT


def test_a_replaced_token_is_the_model_run_on_it() -> None:
    model = checkpoints.mamba1()
    found = feature_ablation(ssmlens.load(model), IDS, 7, baseline=4)
    swapped = [IDS[0], IDS[1], 4, *IDS[3:]]
    assert found.scores[0, 2] == pytest.approx(
        float(plain_logits(model, IDS)[0, -1, 7] - plain_logits(model, swapped)[0, -1, 7]), abs=1e-6
    )


@pytest.mark.parametrize("baseline", ["zero", "drop"])
def test_windows_average(baseline: str) -> None:
    model = checkpoints.mamba2()
    lens, full = ssmlens.load(model), without(model, [], "zero")
    single = feature_ablation(lens, IDS, 7, baseline=baseline)
    assert gap(occlusion(lens, IDS, 7, baseline=baseline).scores, single.scores) <= EXACT
    losses = [full - without(model, [i, i + 1, i + 2], baseline) for i in range(5)]
    holding = [[i for i in range(5) if i <= k <= i + 2] for k in range(7)]
    truth = [sum(losses[i] for i in windows) / len(windows) for windows in holding]
    found = occlusion(lens, IDS, 7, baseline=baseline, window=3)
    assert gap(found.scores[0], torch.tensor(truth, dtype=torch.float64)) <= 1e-11
    assert found.settings["window"] == 3


@pytest.mark.parametrize("baseline", ["zero", "drop"])
def test_a_padded_row_is_its_single_run(baseline: str) -> None:
    lens = ssmlens.load(checkpoints.mamba1())
    rows = [IDS, [11, 4], [8, 2, 0, 0]]
    ids, mask = torch.full((3, 8), 9), torch.zeros(3, 8, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    batch = feature_ablation(lens, ids, baseline=baseline, attention_mask=mask)
    for i, row in enumerate(rows):
        assert gap(batch.scores[i, : len(row)], feature_ablation(lens, row, baseline=baseline).scores[0]) <= EXACT
        assert not batch.scores[i, len(row) :].any()


def test_one_token_and_positions() -> None:
    lens = ssmlens.load(checkpoints.mamba1())
    assert feature_ablation(lens, [5]).scores.shape == (1, 1)
    assert occlusion(lens, [5], window=9).scores.shape == (1, 1)
    early = feature_ablation(lens, IDS, position=2)
    assert gap(early.scores[:, :3], feature_ablation(lens, IDS[:3]).scores) <= EXACT
    assert not early.scores[:, 3:].any()


def test_bad_options_are_refused() -> None:
    lens = ssmlens.load(checkpoints.mamba1())
    with pytest.raises(PromptError, match=r"choose one of zero, mean, drop, or a token id"):
        feature_ablation(lens, IDS, baseline="pad")
    with pytest.raises(PromptError, match=r"dropping the only token of prompt 0"):
        feature_ablation(lens, [5], baseline="drop")
    for whole in (
        lambda: occlusion(lens, IDS, baseline="drop", window=7),
        lambda: feature_ablation(lens, IDS, baseline="drop", groups=[0] * 7),
    ):
        with pytest.raises(PromptError, match=r"dropping the whole prompt leaves no token"):
            whole()
    with pytest.raises(PromptError, match=r"groups has 2 entries for a prompt of 7 tokens"):
        feature_ablation(lens, IDS, groups=[0, 1])
    with pytest.raises(PromptError, match=r"groups goes with a single prompt"):
        feature_ablation(lens, torch.tensor([IDS, IDS]), groups=[0] * 7)
    with pytest.raises(SsmlensError, match=r"window is at least 1"):
        occlusion(lens, IDS, window=0)
