"""MambaLRP: against autograd through plain loops, conserving also where factors are exactly zero."""

from __future__ import annotations

from typing import Any

import checkpoints
import naive_lm
import pytest
import torch
from checkpoints import gap

import ssmlens
from ssmlens.attribution import _forward, decompose, gradient_x_input, relevance
from ssmlens.kernels import scan

IDS = [3, 17, 0, 36, 5, 5, 21, 9, 30, 2, 11]
EXACT = 1e-12
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mamba1", {}),
    ("mamba1", {"use_bias": True, "use_conv_bias": False}),
    ("falcon", {"use_bias": True}),
    ("mamba2", {}),
    ("mamba2", {"use_bias": True, "n_groups": 4, "time_step_limit": (0.4, 1.1)}),
]


@pytest.mark.parametrize(("family", "config"), CASES)
def test_relevances_are_those_of_autograd_through_loops(family: str, config: dict[str, Any]) -> None:
    model = getattr(checkpoints, family)(**config)
    for position, target in ((-1, None), (4, 7)):
        found = relevance(ssmlens.load(model), IDS, target, position)
        truth, bias, logit, chosen = naive_lm.terms(model, IDS, naive_lm.LRP, target, position)
        assert gap(found.scores[0], truth) <= EXACT
        assert found.bias.item() == pytest.approx(bias, abs=EXACT)
        assert found.logit.item() == pytest.approx(logit, abs=EXACT)
        assert found.target.item() == chosen


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_relevance_is_conserved_and_gradient_x_input_is_not(family: str) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)(use_bias=True))
    conserved, plain = relevance(lens, IDS), gradient_x_input(lens, IDS)
    assert conserved.completeness_error.item() <= EXACT
    assert conserved.scores.sum() + conserved.bias[0] == pytest.approx(conserved.logit.item(), abs=EXACT)
    assert abs(plain.scores.sum() - plain.logit[0]) > 0.1 * abs(plain.logit[0])
    assert plain.completeness_error.isnan().all()


def test_without_additive_weights_tokens_own_all() -> None:
    found = relevance(ssmlens.load(checkpoints.mamba1(use_conv_bias=False)), IDS)
    assert found.bias.item() == 0
    assert found.completeness_error.item() <= EXACT


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_zeros_before_an_activation_pass_relevance_on(family: str) -> None:
    model = getattr(checkpoints, family)()
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.conv1d.weight[:7] = 0  # c = 0 exactly, where SiLU(c) / c is 0 / 0
            layer.mixer.conv1d.bias[:7] = 0
            layer.mixer.in_proj.weight[:9] = 0
    found = relevance(ssmlens.load(model), IDS)
    assert gap(found.scores[0], naive_lm.terms(model, IDS, naive_lm.LRP)[0]) <= EXACT
    assert found.completeness_error.item() <= EXACT


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_every_path_gives_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)(use_bias=True))
    ids = torch.randint(37, (2, 40), generator=torch.Generator().manual_seed(1))
    truth = relevance(lens, ids)
    lens.model.train()
    trained = relevance(lens, ids)
    original = scan.run
    monkeypatch.setattr(scan, "run", lambda inputs: original(inputs, impl="naive"))
    monkeypatch.setattr(_forward, "PIECE_BYTES", 1)
    for other in (trained, relevance(lens, ids)):
        assert gap(other.scores, truth.scores) <= EXACT
        assert gap(other.bias, truth.bias) <= EXACT


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_padding_changes_nothing(family: str) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)(use_bias=True))
    rows = [IDS, [11], [8, 2, 0, 0]]
    ids, mask = torch.full((3, 12), 9), torch.zeros(3, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    batch = relevance(lens, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = relevance(lens, row)
        assert gap(batch.scores[i, : len(row)], alone.scores[0]) <= EXACT
        assert not batch.scores[i, len(row) :].any()
        assert gap(batch.bias[i], alone.bias[0]) <= EXACT


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_the_gate_alone_sets_it_apart_from_the_frozen_decomposition(family: str) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)(num_hidden_layers=1))
    lrp, frozen = relevance(lens, [5], 9), decompose(lens, [5], 9)
    # One token, one layer: z owns half of what passes the gate, so LRP moves half of the bias to the token.
    assert lrp.bias.item() == pytest.approx(0.5 * frozen.bias.item(), abs=EXACT)
    assert lrp.scores.item() == pytest.approx(frozen.scores.item() + 0.5 * frozen.bias.item(), abs=EXACT)
