"""Rank-one edits of out_proj: the algebra, what they do to the model, and that they come out again."""

from __future__ import annotations

from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import gap
from footprint import assert_same, fingerprint
from stepper import Record, step_through

import ssmlens
from ssmlens.errors import LayerError, PromptError, SsmlensError
from ssmlens.interventions import RomeEdit, rome, second_moment

FAMILIES = ["mamba1", "falcon", "mamba2"]
IDS = [3, 17, 0, 36, 5, 5, 21, 9, 30, 2, 11]
TEXT = torch.randint(37, (24, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def lens(request: pytest.FixtureRequest) -> ssmlens.Lens:
    return ssmlens.load(getattr(checkpoints, request.param)(use_bias=True), dtype=torch.float64)


@pytest.fixture(scope="module")
def edit(lens: ssmlens.Lens) -> RomeEdit:
    return rome(lens, 0, IDS, 7, 4, text=TEXT, steps=15)


def keys(lens: ssmlens.Lens, ids: list[int], layer: int) -> torch.Tensor:
    record = Record()
    step_through(lens.model, ids, record)
    return torch.stack([record["key", layer, t] for t in range(len(ids))])


def test_the_second_moment_is_that_of_the_keys(lens: ssmlens.Lens) -> None:
    every = torch.cat([keys(lens, row.tolist(), 1) for row in TEXT[:3]])
    truth = every.T @ every / len(every)
    assert gap(second_moment(lens, 1, TEXT[:3]), truth) <= 1e-12


def test_the_edit_is_the_rank_one_update_of_the_paper(lens: ssmlens.Lens, edit: RomeEdit) -> None:
    weight = lens.model.backbone.layers[0].mixer.out_proj.weight.detach()
    assert gap(edit.key, keys(lens, IDS, 0)[7]) <= 1e-12
    moment = second_moment(lens, 0, TEXT)
    moment = moment + 1e-3 * moment.diagonal().mean() * torch.eye(len(moment)).double()
    u = torch.linalg.solve(moment, edit.key)
    truth = torch.outer(edit.value - weight @ edit.key, u) / (u @ edit.key)
    assert gap(edit.update, truth) <= 1e-10
    assert gap((weight + edit.update) @ edit.key, edit.value) <= 1e-12
    assert torch.linalg.matrix_rank(edit.update) == 1


def test_other_keys_change_little(lens: ssmlens.Lens, edit: RomeEdit) -> None:
    others = torch.cat([keys(lens, row.tolist(), 0) for row in TEXT[:4]])
    change = (others @ edit.update.T).norm(dim=1)
    assert change.mean() < 0.3 * (edit.update @ edit.key).norm()
    # The direction is the one of all rank-one edits with W'k = v that moves the keys of the text least.
    plain = torch.outer(edit.update @ edit.key, edit.key) / (edit.key @ edit.key)
    everything = torch.cat([keys(lens, row.tolist(), 0) for row in TEXT])
    assert (everything @ edit.update.T).norm() < (everything @ plain.T).norm()


def test_the_model_says_the_target_and_comes_back(lens: ssmlens.Lens, edit: RomeEdit) -> None:
    before, clean, name = fingerprint(lens.model), lens.trace(IDS).logits, lens.fingerprint
    assert edit.losses[-1] < edit.losses[0]
    with edit as edited:
        assert edited is lens
        logits = lens.trace(IDS).logits
        assert lens.fingerprint != name
        assert logits[0, -1].softmax(-1)[4].item() == pytest.approx(edit.probability[1])
    assert clean[0, -1].softmax(-1)[4].item() == pytest.approx(edit.probability[0])
    assert lens.fingerprint == name
    assert torch.equal(lens.trace(IDS).logits, clean)
    with pytest.raises(RuntimeError, match="inside"), edit:
        raise RuntimeError("inside")
    assert_same(before, fingerprint(lens.model))
    copy = edit.copy()
    assert gap(copy.trace(IDS).logits, logits) <= 1e-12
    assert_same(before, fingerprint(lens.model))
    assert copy.name.endswith("(edited)")


def test_edits_may_be_nested(lens: ssmlens.Lens, edit: RomeEdit) -> None:
    before = fingerprint(lens.model)
    other = rome(lens, 0, IDS[:5], 2, [8, 9], moment=second_moment(lens, 0, TEXT), steps=4, prefixes=[[1, 2], [3]])
    with edit:
        once = lens.trace(IDS).logits
        with other, edit:
            assert gap(lens.trace(IDS).logits, once) > 1e-9
        assert torch.equal(lens.trace(IDS).logits, once)
    assert_same(before, fingerprint(lens.model))


def test_prefixes_and_longer_targets(lens: ssmlens.Lens) -> None:
    made = rome(lens, 0, IDS[:6], 3, [8, 9], text=TEXT, steps=12, prefixes=[[1, 2], [30]])
    mean = torch.stack([keys(lens, front + IDS[:6], 0)[len(front) + 3] for front in ([], [1, 2], [30])]).mean(0)
    assert gap(made.key, mean) <= 1e-12
    logits = lens.trace([*IDS[:6], 8]).logits[0].log_softmax(-1)
    assert made.probability[0] == pytest.approx((logits[5, 8] + logits[6, 9]).exp().item())
    assert made.losses[-1] < made.losses[0]


def test_the_change_stays_within_its_clamp(lens: ssmlens.Lens) -> None:
    weight = lens.model.backbone.layers[0].mixer.out_proj.weight.detach()
    made = rome(lens, 0, IDS, 7, 4, text=TEXT, steps=6, clamp=0.01)
    assert (made.value - weight @ made.key).norm() <= 0.01 * (weight @ made.key).norm() * (1 + 1e-9)


@pytest.mark.parametrize("name", ["mamba1-english", "mamba2-english"])
def test_a_shipped_model_learns_another_capital(name: str) -> None:
    lens = ssmlens.load(name)
    made = rome(lens, 3, "The capital of France is", " France", " Rome", steps=20)
    assert made.probability[0] < 0.01
    assert made.probability[1] > 20 * made.probability[0]
    assert made.settings["position"] == lens.trace("The capital of France", layers=[]).ids.shape[1] - 1
    weight = lens._mixers[3][1].out_proj.weight.detach()  # type: ignore[union-attr]
    assert gap((weight + made.update) @ made.key, made.value) <= 1e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": 5}, "layer 5 does not exist"),
        ({"layer": 1}, "touch nothing: choose an earlier layer"),
        ({"subject": 11}, "subject holds position 11"),
        ({"subject": "abc"}, "no tokenizer"),
        ({"target": []}, "empty"),
        ({"target": 99}, "outside the vocabulary"),
        ({"text": None}, "text is missing"),
        ({"steps": 0}, "above 0"),
        ({"moment": torch.eye(3)}, "the second moment is"),
        ({"prompt": torch.tensor([IDS, IDS])}, "prompt is one text"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(lens: ssmlens.Lens, options: dict[str, Any], words: str) -> None:
    given = {"layer": 0, "prompt": IDS, "subject": 7, "target": 4, "text": TEXT[:2], "steps": 2, **options}
    before = fingerprint(lens.model)
    with pytest.raises(SsmlensError, match=words) as caught:
        rome(lens, **given)
    assert "\n" not in str(caught.value)
    assert_same(before, fingerprint(lens.model))


def test_errors_have_their_types(lens: ssmlens.Lens) -> None:
    with pytest.raises(LayerError):
        rome(lens, 5, IDS, 7, 4, text=TEXT)
    with pytest.raises(PromptError):
        rome(lens, 0, [], 7, 4, text=TEXT)
    english = ssmlens.load("mamba1-english")
    with pytest.raises(SsmlensError, match="does not hold the subject 'Spain'"):
        rome(english, 3, "The capital of France is", "Spain", " Rome")
