"""Attribution on every shipped model: identities, and the true source of a recalled value."""

from __future__ import annotations

import naive_lm
import pytest
import torch
from checkpoints import gap

import ssmlens
from ssmlens import zoo
from ssmlens.attribution import (
    decompose,
    feature_ablation,
    gradient_x_input,
    integrated_gradients,
    relevance,
    residual_parts,
)
from ssmlens.zoo import recall_task

MODELS = sorted(zoo.names())


@pytest.fixture(scope="module", params=MODELS)
def lens(request: pytest.FixtureRequest) -> ssmlens.Lens:
    return ssmlens.load(request.param, dtype=torch.float64)


def prompts(lens: ssmlens.Lens) -> list[str]:
    return (
        ["a 3 b 7 c 9 . . . b", "b 4 d 5 . . b"] if "recall" in lens.name else ["The captain walked slowly", "She said"]
    )


def test_sums_are_logits(lens: ssmlens.Lens) -> None:
    text = prompts(lens)
    own = lens.trace(text)
    for method, held in ((decompose, naive_lm.FROZEN), (relevance, naive_lm.LRP)):
        found = method(lens, text)
        assert found.completeness_error.max() <= 1e-10
        assert found.settings["logit_error"] <= 1e-12
        for i, k in enumerate(found.position.tolist()):
            assert found.logit[i] == pytest.approx(float(own.logits[i, k].max()), rel=1e-12)
        truth, bias, _, target = naive_lm.terms(lens.model, own.ids[1, : own.lengths[1]].tolist(), held)
        assert gap(found.scores[1, : len(truth)], truth) <= 1e-10
        assert found.bias[1] == pytest.approx(bias, abs=1e-10)
        assert found.target[1] == target
    plain = gradient_x_input(lens, text)
    assert ((plain.scores.sum(1) - plain.logit).abs() > 0.05 * plain.logit.abs()).all()


def test_every_layer_is_the_sum_of_its_parts(lens: ssmlens.Lens) -> None:
    text = prompts(lens)
    parts, back = residual_parts(lens, text), decompose(lens, text)
    assert max(parts.error) <= 1e-12
    read = parts.logits()
    assert read.error <= 1e-12
    for i, k in enumerate(back.position.tolist()):
        assert gap(read.scores[i, k], back.scores[i]) <= 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_float32_agrees_with_float64(name: str) -> None:
    narrow, wide = ssmlens.load(name), ssmlens.load(name, dtype=torch.float64)
    for method in (decompose, relevance):
        ours, truth = method(narrow, prompts(narrow)), method(wide, prompts(wide))
        assert ours.completeness_error.max() <= 1e-5
        assert gap(ours.scores, truth.scores) <= 1e-4


def test_integrated_gradients_complete(lens: ssmlens.Lens) -> None:
    assert integrated_gradients(lens, prompts(lens)[1]).completeness_error.max() <= 1e-2


@pytest.mark.parametrize("name", [n for n in MODELS if "recall" in n])
def test_a_recalled_value_is_owed_to_where_it_was_told(name: str) -> None:
    lens = ssmlens.load(name)
    made = recall_task.batch(24, 64, 8, seed=77)
    asked, source = made.asked[:, -1], made.source[:, -1]
    answer = made.targets.gather(1, asked[:, None])[:, 0]
    found = decompose(lens, made.ids, answer, position=asked)
    hits = (found.scores.argmax(1) == source).double().mean()
    assert hits >= 0.9
    # The logit of the answer rests on the value: without that token it is gone.
    lost = feature_ablation(lens, made.ids[:4], answer[:4], position=asked[:4])
    assert (lost.scores.gather(1, source[:4, None])[:, 0] > 0.5 * lost.logit).all()
