"""The same answers on a CUDA device as from the float64 loop on the CPU."""

from __future__ import annotations

import pytest
import torch
from tolerances import GRAD_TOL, TOL

import ssmlens
from ssmlens import zoo
from ssmlens.kernels import attention, naive, scan
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.trace import TOLERANCE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make(kind: str, length: int, dtype: torch.dtype, seed: int = 0) -> ScanInputs:
    """Recurrence inputs of one decay kind on the CPU, leaves of a graph."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    def positive(*shape: int, high: float) -> torch.Tensor:
        return (torch.rand(*shape, generator=g, dtype=torch.float64) * high).to(dtype).requires_grad_()

    if kind == "mamba1":
        rate = (-positive(24, 5, high=3.0)).detach().requires_grad_()
        return ScanInputs(
            normal(2, length, 24, 1), normal(2, length, 1, 5), normal(2, length, 1, 5),
            dt=positive(2, length, 24, high=0.5), A=rate,
        )  # fmt: skip
    if kind == "mamba2":
        rate = (-positive(6, 1, high=3.0)).detach().requires_grad_()
        return ScanInputs(
            normal(2, length, 6, 8), normal(2, length, 2, 7), normal(2, length, 2, 7),
            dt=positive(2, length, 6, high=0.5), A=rate, initial=normal(2, 6, 8, 7),
        )  # fmt: skip
    decay = (-positive(2, length, 3, 7, high=1.0)).detach().requires_grad_()
    return ScanInputs(normal(2, length, 3, 8), normal(2, length, 3, 7), normal(2, length, 3, 7), log_decay=decay)


def on(device: str, inputs: ScanInputs) -> ScanInputs:
    moved = {k: x.detach().to(device).requires_grad_(x.requires_grad) for k, x in inputs.tensors().items()}
    return ScanInputs(**moved)


def close(ours: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    error = (ours.double().cpu() - truth.double()).abs().max().item()
    assert error <= tolerance * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 500])
@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "per_key"])
def test_scan_and_gradients(kind: str, length: int, dtype: torch.dtype) -> None:
    inputs = make(kind, length, dtype)
    truth_inputs = ScanInputs(**{k: x.detach().double().requires_grad_() for k, x in inputs.tensors().items()})
    ours_inputs = on("cuda", inputs)
    truth, truth_final = naive.run(truth_inputs)
    ours, final = scan.run(ours_inputs)
    close(ours, truth, TOL[dtype] * 4)
    close(final, truth_final, TOL[dtype] * 4)
    (truth.sin().sum() + truth_final.cos().sum()).backward()
    (ours.sin().sum() + final.cos().sum()).backward()
    for name, x in ours_inputs.tensors().items():
        close(x.grad, truth_inputs.tensors()[name].grad, GRAD_TOL[dtype] * 4)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "per_key"])
def test_attention(kind: str) -> None:
    inputs = make(kind, 65, torch.float32)
    truth = naive.attention(ScanInputs(**{k: x.detach().double() for k, x in inputs.tensors().items()}))
    ours = ScanInputs(**{k: x.detach().cuda() for k, x in inputs.tensors().items()})
    close(attention.dense(ours), truth, TOL[torch.float32] * 4)
    close(attention.row(ours, 40), truth[:, :, 40], TOL[torch.float32] * 4)
    close(attention.column(ours, 3), truth[..., 3], TOL[torch.float32] * 4)
    close(attention.reduce(ours, "mean_abs"), truth.abs().mean(1), TOL[torch.float32] * 4)


@pytest.mark.parametrize("how", ["model", "fast"])
@pytest.mark.parametrize("name", zoo.names())
def test_shipped_models(name: str, how: str) -> None:
    trace = ssmlens.load(name, device="cuda").trace(zoo.passage(name), scan=how)
    assert max(trace.reconstruction_error.values()) <= TOLERANCE[torch.float32]
    cpu = ssmlens.load(name).trace(zoo.passage(name), scan="model")
    close(trace.logits, cpu.logits, 1e-4)
