"""Gradients of the scan on matrix units against those of the loop in float64."""

from __future__ import annotations

import pytest
import torch
from scan_cases import Case, gradients, make, relative_error
from tolerances import GRAD_TOL

from ssmlens.kernels import naive
from ssmlens.kernels.fused import ssd, ssd_backward
from ssmlens.kernels.inputs import ScanInputs

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32 = torch.float32

CASES = [
    (Case(t=1, initial=True, b=1), None, [0]),
    (Case(t=63, h=2, b=1), None, []),
    (Case(t=64, h=2, decay="log head", reset=True, initial=True, b=1), 32, [3, 63, 3]),
    (Case(t=65, h=2, reset=True, initial=True, b=1), 32, [40, 31, 32]),
    (Case(t=33, h=6, g=2, read_groups=3, n=7, b=1), 32, []),
    (Case(t=40, h=4, g=1, read_groups=4, n=7, decay="log head", b=1), 32, []),
    (Case(t=33, h=2, p=1, n=1, b=1), 16, [20]),
    (Case(t=20, h=1, g=1, p=70, n=130, b=1), 16, [5]),
    (Case(t=40, h=2, scale=1e-6, initial=True, b=1), 32, []),
    (Case(t=40, h=2, scale=50.0, initial=True, b=1), 32, []),
    (Case(t=130, h=1, g=1, p=16, n=16, b=1), None, []),
]


def found_and_true(
    case: Case, chunk: int | None, picks: list[int], dtype: torch.dtype = F32, precision: str = "fp32"
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of one random weighting of all results, from the kernels and from the loop."""
    x = make(case, dtype)

    def run(z: ScanInputs) -> list[torch.Tensor]:
        return [*naive.run(z), naive.states(z, picks)]

    outputs, true = gradients(x.cast(torch.float64), run)
    rng = torch.Generator().manual_seed(1)
    dy, dfinal, dstates = (
        torch.randn(out.shape, generator=rng, dtype=torch.float64).to(DEVICE, F32) for out in outputs
    )
    x = x.map(lambda z: z.to(DEVICE))
    kept = ssd.forward(x, chunk=chunk, precision=precision)
    found = ssd_backward.backward(x, dy, dfinal, dstates, picks, kept.boundaries, kept.chunk, precision)
    return {k: z.cpu() for k, z in found.items()}, true


@pytest.mark.parametrize(("case", "chunk", "picks"), CASES, ids=lambda v: str(v))
def test_gradients_equal_those_of_the_loop(case: Case, chunk: int | None, picks: list[int]):
    found, true = found_and_true(case, chunk, picks)
    assert set(found) == set(true)
    for name in true:
        assert relative_error(found[name], true[name]) < GRAD_TOL[F32], name


def test_narrow_inputs():
    """Only value's gradient is rounded: it comes in value's dtype."""
    case = Case(t=40, h=2, g=1, p=16, n=16, b=1)
    found, true = found_and_true(case, 32, [7], torch.bfloat16)
    assert found["value"].dtype == torch.bfloat16
    assert relative_error(found.pop("value"), true["value"]) < 5e-3
    for name in found:
        assert relative_error(found[name], true[name]) < GRAD_TOL[F32], name
    found, _ = found_and_true(case, 32, [7], torch.bfloat16, "bf16")
    for name in found:
        assert 1e-5 < relative_error(found[name], true[name]) < 2e-2, name


def test_all_states_and_nothing_else():
    x = make(Case(t=18, h=1, g=1, b=1), F32)
    outputs, true = gradients(x.cast(torch.float64), lambda z: [naive.states(z)])
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x.map(lambda z: z.to(DEVICE))
    kept = ssd.forward(x, chunk=16)
    found = ssd_backward.backward(x, None, None, weights.to(DEVICE, F32), "all", kept.boundaries, kept.chunk)
    for name in true:
        assert relative_error(found[name].cpu(), true[name]) < GRAD_TOL[F32], name


def test_decays_of_zero_have_a_gradient_of_zero():
    case = Case(t=40, h=2, g=1, decay="log head", reset=True, b=1)
    found, _ = found_and_true(case, 32, [])
    forgets = make(case, F32).full_log_decay() == -torch.inf
    assert forgets.any()
    assert not found["log_decay"][forgets].any()
    assert found["log_decay"].isfinite().all()


def test_a_scaled_write_with_its_own_decay():
    """dt beside log_decay scales the write and nothing else."""
    x = make(Case(t=20, h=2, decay="log head", b=1), F32)
    x = x.replace(dt=torch.rand(1, 20, 2, generator=torch.Generator().manual_seed(2)))
    outputs, true = gradients(x.cast(torch.float64), lambda z: list(naive.run(z)))
    rng = torch.Generator().manual_seed(1)
    dy, dfinal = (torch.randn(out.shape, generator=rng, dtype=torch.float64).to(DEVICE, F32) for out in outputs)
    x = x.map(lambda z: z.to(DEVICE))
    kept = ssd.forward(x, chunk=16)
    found = ssd_backward.backward(x, dy, dfinal, None, None, kept.boundaries, kept.chunk)
    assert set(found) == set(true)
    for name in true:
        assert relative_error(found[name].cpu(), true[name]) < GRAD_TOL[F32], name


def test_strided_gradients_and_two_runs():
    x = make(Case(t=20, h=2, g=1, b=1), F32).map(lambda z: z.to(DEVICE))
    kept = ssd.forward(x, chunk=32)
    dy = torch.randn(x.value.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    loose = dy.transpose(1, 3).contiguous().transpose(1, 3)
    tight = ssd_backward.backward(x, dy, None, None, None, kept.boundaries, kept.chunk)
    for name, one in ssd_backward.backward(x, loose, None, None, None, kept.boundaries, kept.chunk).items():
        assert torch.equal(one, tight[name]), name


def test_what_it_refuses():
    x = make(Case(t=5), F32).map(lambda z: z.to(DEVICE))
    with pytest.raises(ValueError, match="precision is fp32 or bf16"):
        ssd_backward.backward(x, None, precision="half")
    with pytest.raises(ValueError, match="needs the boundaries and the chunk"):
        ssd_backward.backward(x, x.value)
