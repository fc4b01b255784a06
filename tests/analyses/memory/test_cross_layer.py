"""Fidelity across layers: rotations, projections, independent layers, CKA against its definition, and real models."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import tiny_mamba1, tiny_mamba2, tiny_tokenizer

import ssmlens
from ssmlens.analyses import memory
from ssmlens.analyses.memory._cross import debiased_cka

TINY = {
    "mamba1": partial(tiny_mamba1, hidden_size=16, state_size=4),
    "mamba2": partial(tiny_mamba2, hidden_size=16, num_heads=4, state_size=4),
}


def white(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n: int) -> torch.Tensor:
    return torch.linalg.qr(white(n, n, seed=4))[0]


@pytest.mark.parametrize("how", ["identity", "rotated", "invertible", "shifted and scaled"])
def test_what_an_invertible_map_leads_to_is_told_exactly(how: str) -> None:
    x = white(2000, 6)
    y = {
        "identity": x,
        "rotated": x @ rotation(6),
        "invertible": x @ white(6, 6, seed=5),
        "shifted and scaled": 40 - 1e-3 * x,
    }[how]
    found = memory.cross_layer_fidelity(x, y)
    assert found.value.item() == pytest.approx(1, abs=1e-8)
    assert found.control["chance"].abs() < 0.02
    if how != "invertible":
        assert found.columns["cka"].item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("r", [1, 3, 5])
def test_a_projection_tells_its_share(r: int) -> None:
    x = white(6000, 6)
    found = memory.cross_layer_fidelity(x, x @ rotation(6)[:, :r])
    assert found.value.item() == pytest.approx(r / 6, abs=0.01)
    assert found.columns["low"] < r / 6 < found.columns["high"]
    # And back: what is left is told by the whole.
    back = memory.cross_layer_fidelity(x @ rotation(6)[:, :r], x)
    assert back.value.item() == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_columns_that_repeat_each_other_count_once(dtype: torch.dtype, shift: float) -> None:
    # Five columns of rank two: whitening must not blow the rounding of the other three up to features.
    x = white(2000, 2) + shift
    repeated = (x @ torch.tensor([[1.0, 0, 1, 2, -1], [0, 1, 1, 1, 3]]).double()).to(dtype)
    found = memory.cross_layer_fidelity(repeated, x)
    assert found.value.item() == pytest.approx(1, abs=1e-6 if dtype == torch.float64 or not shift else 1e-4)


def test_independent_layers_tell_nothing() -> None:
    found = memory.cross_layer_fidelity(white(1200, 40), white(1200, 60, seed=1))
    assert found.value.abs() < 0.01
    assert found.columns["cka"].abs() < 0.05


def test_cka_by_its_definition() -> None:
    x, y = white(50, 4), white(50, 3, seed=1) + white(50, 4)[:, :3]

    def hsic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        m, one = len(a), torch.ones(len(a), 1, dtype=torch.float64)
        k, v = (u @ u.mT - torch.diag((u @ u.mT).diag()) for u in (a, b))
        total = (k @ v).trace() + (one.mT @ k @ one) * (one.mT @ v @ one) / ((m - 1) * (m - 2))
        return (total - 2 / (m - 2) * one.mT @ k @ v @ one) / (m * (m - 3))

    x, y = x - x.mean(0), y - y.mean(0)
    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    assert debiased_cka(x, y) == pytest.approx(expected.item(), abs=1e-12)


@pytest.fixture(scope="module", params=TINY)
def trace(request: pytest.FixtureRequest) -> ssmlens.Trace:
    lens = ssmlens.load(TINY[request.param](), tokenizer=tiny_tokenizer(), dtype=torch.float64)
    ids = torch.randint(0, 256, (10, 60), generator=torch.Generator().manual_seed(0))
    return lens.trace(ids)


def test_a_trace_gives_every_later_reader(trace: ssmlens.Trace, tmp_path: Path) -> None:
    found = memory.cross_layer_fidelity(trace, rank=32, repeats=200)
    assert found.dims == ("layer", "reader")
    later = torch.ones(3, 3).triu(1).bool()
    for x in (found.value, found.control["residual"], found.columns["cka"]):
        assert x[later].isfinite().all()
        assert x[~later].isnan().all()
    assert (found.columns["low"][later] <= found.columns["high"][later]).all()
    assert (found.control["chance"][later].abs() < 0.1).all()
    once = memory.cross_layer_fidelity(trace, rank=32, repeats=200, resume=tmp_path / "a.jsonl")
    again = memory.cross_layer_fidelity(trace, rank=32, repeats=200, resume=tmp_path / "a.jsonl")
    for other in (once, again):
        torch.testing.assert_close(other.value, found.value, rtol=0, atol=0, equal_nan=True)


def test_the_residual_stream_tells_itself(trace: ssmlens.Trace) -> None:
    found = memory.cross_layer_fidelity(trace, features="residual", rank=32, repeats=50)
    torch.testing.assert_close(found.value, found.control["residual"], rtol=1e-6, atol=1e-9, equal_nan=True)


def test_refusals(trace: ssmlens.Trace) -> None:
    with pytest.raises(ValueError, match="needs two layers"):
        memory.cross_layer_fidelity(trace[0])
    with pytest.raises(ValueError, match="tokens and the second"):
        memory.cross_layer_fidelity(white(100, 2), white(90, 2))
    with pytest.raises(ValueError, match="do not vary"):
        memory.cross_layer_fidelity(torch.ones(100, 2), white(100, 2))
