"""Attribution on a CUDA device equals that on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import ssmlens
from ssmlens import zoo
from ssmlens.attribution import (
    decompose,
    feature_ablation,
    gradient_shap,
    gradient_x_input,
    integrated_gradients,
    occlusion,
    relevance,
    residual_parts,
    smoothgrad,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONSERVING = (decompose, relevance)
BY_CAPTUM = (integrated_gradients, feature_ablation, occlusion)
METHODS = (*CONSERVING, gradient_x_input, *BY_CAPTUM)


def texts(name: str) -> list[str]:
    return ["a 3 b 7 c 9 . . . b", "b 4 d 5 . . b"] if "recall" in name else ["The captain walked slowly", "She said"]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", zoo.names())
def test_scores_are_those_of_the_cpu(name: str, method: Callable[..., Any], dtype: torch.dtype, limit: float) -> None:
    if method in BY_CAPTUM:
        pytest.importorskip("captum")
    ours = method(ssmlens.load(name, device="cuda", dtype=dtype), texts(name))
    truth = method(ssmlens.load(name, dtype=torch.float64), texts(name), target=ours.target.cpu())
    assert ours.scores.is_cuda
    assert (ours.scores.cpu() - truth.scores).abs().max() <= limit * truth.scores.abs().max()
    assert (ours.logit.cpu() - truth.logit).abs().max() <= limit * truth.logit.abs().max()
    if method in CONSERVING:
        assert ours.completeness_error.max() <= (1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name", zoo.names())
def test_parts_and_draws(name: str) -> None:
    lens = ssmlens.load(name, device="cuda", dtype=torch.float64)
    parts = residual_parts(lens, texts(name))
    assert max(parts.error) <= 1e-12
    assert parts.logits().error <= 1e-12
    pytest.importorskip("captum")
    for method in (smoothgrad, gradient_shap):
        first, second = (method(lens, texts(name), samples=4) for _ in range(2))
        assert torch.equal(first.scores, second.scores)
