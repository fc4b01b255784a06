"""Gradients of the fused diagonal walk against float64 autograd through the loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scan_cases import DECAYS, Case, gradients, make, relative_error
from tolerances import GRAD_TOL
from torch import Tensor

from ssmlens.kernels import naive
from ssmlens.kernels.fused import walk_backward
from ssmlens.kernels.fused.walk_backward import EVERY, Plan
from ssmlens.kernels.inputs import ScanInputs

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = GRAD_TOL[torch.float32]
# Some heads a thread, few states in registers, many segments: every loop runs more than once.
SMALL = Plan(per_thread=2, states=2, heads=16, lanes=2, warps=1, steps=4, segment=16)


def fused(x: ScanInputs, picks: list[int] | str | None, every: int = EVERY, **options: Any) -> dict[str, Tensor]:
    """Gradients of the same weighting as that of `truth`, by the kernels."""
    outputs = [z.shape for z in reference(x, picks)]
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=rng, dtype=torch.float64).to(DEVICE, torch.float32) for shape in outputs]
    dy, dfinal, dstates = (*weights, None)[:3]
    known = x.cast(torch.float64)
    bounds = naive.states(known, range(every - 1, x.length - 1, every)).to(DEVICE, torch.float32)
    return walk_backward.backward(
        x.map(lambda z: z.to(DEVICE)), dy, dfinal, dstates, picks, bounds, every, **options
    )


def reference(x: ScanInputs, picks: list[int] | str | None) -> list[Tensor]:
    y, final = naive.run(x)
    at = range(x.length) if picks == "all" else picks
    return [y, final] if at is None else [y, final, naive.states(x, at)]


def check(x: ScanInputs, picks: list[int] | str | None = None, every: int = EVERY, **options: Any) -> None:
    _, true = gradients(x.cast(torch.float64), lambda z: reference(z, picks))
    found = fused(x, picks, every, **options)
    assert set(found) == set(true)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert gradient.is_contiguous()
        assert relative_error(gradient.cpu(), true[name]) < TOLERANCE, f"gradient of {name}"


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("t", [1, 63, 64, 65])
def test_gradients(decay: str, t: int):
    check(make(Case(t=t, h=6, p=1, g=1, n=5, b=1, decay=decay, initial=True, reset=True), torch.float32), [t - 1, 0, 0])
