"""Gradient methods against autograd through plain loops, and what they promise."""

from __future__ import annotations

import checkpoints
import naive_lm
import numpy as np
import pytest
import torch
from checkpoints import gap

import ssmlens
from ssmlens.attribution import gradient_shap, gradient_x_input, integrated_gradients, smoothgrad
from ssmlens.errors import PromptError, SsmlensError

IDS = [3, 17, 0, 36, 5, 5, 21]
ROWS = [IDS, [11], [8, 2, 0, 0]]
EXACT = 1e-12


def gradient(model, x: torch.Tensor, target: int) -> torch.Tensor:
    """Gradient (t, d) of the last token's target logit at embeddings (t, d), through loops."""
    x = x.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(naive_lm.last_logits(model, x)[target], x)
    return found


@pytest.mark.parametrize("family", ["mamba1", "falcon", "mamba2"])
def test_gradient_x_input_is_that_of_loops(family: str) -> None:
    model = getattr(checkpoints, family)(use_bias=True)
    for held, detach in ((naive_lm.EXACT, False), (naive_lm.NORM, True)):
        found = gradient_x_input(ssmlens.load(model), IDS, 7, detach_norm=detach)
        truth = naive_lm.terms(model, IDS, held, 7)
        assert gap(found.scores[0], truth[0]) <= 1e-11
        assert found.logit.item() == pytest.approx(truth[2], abs=EXACT)
        assert found.settings["detach_norm"] is detach
        assert found.bias.item() == 0


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_integrated_gradients_are_the_quadrature_of_loops(family: str) -> None:
    model = getattr(checkpoints, family)()
    table = model.backbone.embeddings.weight.detach()
    nodes, weights = np.polynomial.legendre.leggauss(6)
    for baseline, base in (("mean", table.mean(0)), ("zero", torch.zeros(12).double()), (4, table[4])):
        x, start = table[IDS], base.expand(len(IDS), -1)
        points = [(0.5 * w, 0.5 * (1 + a)) for a, w in zip(nodes, weights, strict=True)]
        path = sum(w * gradient(model, start + a * (x - start), 7) for w, a in points)
        found = integrated_gradients(ssmlens.load(model), IDS, 7, baseline=baseline, steps=6)
        assert gap(found.scores[0], (path * (x - start)).sum(1)) <= 1e-6  # captum keeps its weights in float32
        assert found.bias.item() == pytest.approx(float(naive_lm.last_logits(model, start)[7]), abs=EXACT)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_integrated_gradients_complete_as_steps_grow(family: str) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)())
    errors = [integrated_gradients(lens, IDS, steps=n).completeness_error.item() for n in (4, 256)]
    assert errors[1] < 1e-6
    assert errors[0] > 0.1


def test_smoothgrad_without_noise_is_gradient_x_input() -> None:
    lens = ssmlens.load(checkpoints.mamba2())
    assert gap(smoothgrad(lens, ROWS[2], noise=0.0, samples=3).scores, gradient_x_input(lens, ROWS[2]).scores) <= EXACT


def test_smoothgrad_is_the_mean_gradient_at_noisy_embeddings() -> None:
    model = checkpoints.mamba1()
    x = model.backbone.embeddings.weight.detach()[ROWS[2]]
    torch.manual_seed(5)
    noise = torch.normal(0.0, 0.3 * float(x.std(correction=0)), (4, *x.shape))  # captum draws in float32
    mean = sum(gradient(model, x + one, 7) for one in noise) / 4
    found = smoothgrad(ssmlens.load(model), ROWS[2], 7, samples=4, noise=0.3, seed=5)
    assert gap(found.scores[0], (mean * x).sum(1)) <= 1e-10
    assert found.completeness_error.isnan().all()


def test_gradient_shap_completes_on_average() -> None:
    lens = ssmlens.load(checkpoints.mamba2())
    errors = [gradient_shap(lens, IDS, baselines=4, samples=n).completeness_error.item() for n in (4, 1024)]
    assert errors[1] < 0.05
    assert errors[1] < errors[0]


def test_gradient_shap_of_one_baseline_approaches_integrated_gradients() -> None:
    lens = ssmlens.load(checkpoints.mamba1())
    exact = integrated_gradients(lens, IDS, steps=128)
    sampled = gradient_shap(lens, IDS, baseline="mean", samples=2048)
    assert gap(sampled.scores, exact.scores) < 0.1
    assert gap(sampled.bias, exact.bias) <= EXACT


@pytest.mark.parametrize("method", [gradient_x_input, integrated_gradients, smoothgrad, gradient_shap])
def test_a_padded_row_is_its_single_run(method) -> None:
    lens = ssmlens.load(checkpoints.mamba1(use_bias=True))
    ids, mask = torch.full((3, 8), 9), torch.zeros(3, 8, dtype=torch.long)
    for i, row in enumerate(ROWS):
        ids[i, 8 - len(row) :] = torch.tensor(row)
        mask[i, 8 - len(row) :] = 1
    batch = method(lens, ids, attention_mask=mask)
    for i, row in enumerate(ROWS):
        alone = method(lens, row)
        assert gap(batch.scores[i, : len(row)], alone.scores[0]) <= 1e-11
        assert not batch.scores[i, len(row) :].any()
        assert batch.target[i] == alone.target[0]


@pytest.mark.parametrize("method", [gradient_x_input, integrated_gradients, smoothgrad, gradient_shap])
def test_tokens_after_the_position_have_no_part(method) -> None:
    lens = ssmlens.load(checkpoints.mamba2())
    found, alone = method(lens, IDS, position=3), method(lens, IDS[:4])
    assert gap(found.scores[:, :4], alone.scores) <= 1e-11
    assert not found.scores[:, 4:].any()


@pytest.mark.parametrize("method", [smoothgrad, gradient_shap])
def test_draws_repeat_and_leave_the_generators_alone(method) -> None:
    lens = ssmlens.load(checkpoints.mamba1())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = method(lens, IDS, samples=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.scores, method(lens, IDS, samples=4).scores)
    assert not torch.equal(first.scores, method(lens, IDS, samples=4, seed=1).scores)


def test_bad_options_are_refused() -> None:
    lens = ssmlens.load(checkpoints.mamba1())
    with pytest.raises(PromptError, match=r"unknown baseline 'pad': choose one of zero, mean, or a token id"):
        integrated_gradients(lens, IDS, baseline="pad")
    with pytest.raises(PromptError, match=r"zero, mean, tokens, or a token id from 0 to 36"):
        gradient_shap(lens, IDS, baseline=37)
    for wrong in (lambda: integrated_gradients(lens, IDS, steps=1), lambda: smoothgrad(lens, IDS, samples=0)):
        with pytest.raises(SsmlensError, match=r"is at least"):
            wrong()
