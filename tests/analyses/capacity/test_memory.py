"""Linear memory and information processing capacity against regressions written out plainly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import tiny_mamba2

import ssmlens
from ssmlens.analyses import capacity
from ssmlens.analyses.capacity._drive import _vectors
from ssmlens.analyses.capacity.checks import drive, orthogonal, selective
from ssmlens.tap import tapping


def test_raw_is_the_squared_multiple_correlation() -> None:
    states, u = drive(orthogonal(3, 0.8), 3, 2000)
    found = capacity.memory_capacity(states, u, 5)
    x, y = states.numpy(), u.numpy()
    for k in range(6):
        design = np.column_stack([x[5:], np.ones(len(x) - 5)])
        target = y[5 - k : len(y) - k]
        residual = target - design @ np.linalg.lstsq(design, target, rcond=None)[0]
        exact = 1 - residual.var() / target.var()
        assert found.columns["raw"][k].item() == pytest.approx(exact, abs=1e-9)


def test_a_reservoir_may_be_given_as_a_function() -> None:
    u = torch.rand(3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5

    def delays(inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(inputs, (k, 0))[: len(inputs)] for k in (0, 2, 5)], dim=1)

    found = capacity.memory_capacity(delays, u, 8)
    exact = torch.tensor([1.0, 0, 1, 0, 0, 1, 0, 0, 0], dtype=torch.float64)
    # Making the lags orthogonal moves a little between them, and leaves the sum.
    torch.testing.assert_close(found.value, exact, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.columns["held_out"], exact, rtol=0, atol=0.03)
    assert found.value.sum().item() == pytest.approx(3, abs=1e-6)
    assert found.columns["total"] == found.value.sum()
    assert found.control["rank"] == 3


@pytest.mark.parametrize("radius", [0.5, 0.95])
def test_linear_reservoirs_have_as_much_as_they_have_states(radius: float) -> None:
    states, u = drive(orthogonal(12, radius), 12, 20000)
    found = capacity.memory_capacity(states, u, 150)
    assert found.value.sum().item() == pytest.approx(12, abs=0.1 if radius > 0.6 else 0.01)
    plain = capacity.memory_capacity(states, u, 150, orthogonal=False)
    assert plain.value.sum().item() == pytest.approx(12, abs=0.5)
    assert float(plain.columns["raw"].sum() - plain.value.sum()) == pytest.approx(151 * 12 / 20000, rel=0.2)


def test_features_of_something_else_have_none() -> None:
    random = torch.Generator().manual_seed(0)
    states = torch.randn(3000, 40, generator=random, dtype=torch.float64)
    u = torch.randn(3000, generator=random, dtype=torch.float64)
    for orthogonal_lags in (True, False):
        found = capacity.memory_capacity(states, u, 50, orthogonal=orthogonal_lags)
        # 51 lags of standard deviation about sqrt(2 * 40) / 3000 each.
        assert abs(found.value.sum().item()) < 4 * math.sqrt(51 * 80) / 3000
        assert found.columns["held_out"].max() < 0.01
        assert found.control["chance"][0].item() == pytest.approx(40 / 2950, rel=0.02)
        assert abs(found.control["shuffled"].sum().item()) < 0.1


def test_a_leaky_unit_follows_its_law_within_the_interval() -> None:
    lags = torch.arange(6, dtype=torch.float64)
    exact, inside = 0.36 * 0.8 ** (2 * lags), 0
    for seed in range(5):
        states, u = drive(lambda h, x: 0.8 * h + x, 1, 8000, seed)
        found = capacity.memory_capacity(states, u, 5)
        torch.testing.assert_close(found.value, exact, rtol=0, atol=0.04)
        inside += int(((found.columns["low"] <= exact) & (exact <= found.columns["high"])).sum())
        nats = -0.5 * torch.log1p(-found.value.clamp(0, 1))
        torch.testing.assert_close(found.columns["information"], nats)
    assert inside >= 24  # of 30, at a confidence of 95 %


def test_noise_is_a_ridge_on_the_covariance() -> None:
    states, u = drive(orthogonal(4, 0.9), 4, 4000)
    found = capacity.memory_capacity(states, u, 20, noise=0.1)
    x = states[20:] - states[20:].mean(0)
    gram = x.mT @ x / len(x)
    gram = gram + 0.1 * gram.trace() / 4 * torch.eye(4, dtype=x.dtype)
    for k in (0, 3, 20):
        y = u[20 - k : len(u) - k]
        y = y - y.mean()
        p = x.mT @ y / len(x)
        exact = p @ torch.linalg.solve(gram, p) / (y @ y / len(y))
        assert found.columns["raw"][k].item() == pytest.approx(exact.item(), abs=1e-10)


def test_exact_capacities_need_no_samples() -> None:
    decay = torch.exp(-0.01 * torch.arange(1, 17))
    table = [capacity.memory_capacity_exact(decay, lags=5000, noise=e).value.sum().item() for e in (1e-8, 1e-4, 1e-2)]
    assert table == pytest.approx([8.39, 5.48, 3.79], abs=0.005)
    spread = torch.exp(-torch.logspace(-3, -1, 16, dtype=torch.float64))
    wide = [capacity.memory_capacity_exact(spread, lags=20000, noise=e).value.sum().item() for e in (1e-8, 1e-4, 1e-2)]
    assert wide == pytest.approx([12.6, 7.5, 4.7], abs=0.05)
    with pytest.raises(ValueError, match="from 0 to below 1"):
        capacity.memory_capacity_exact([1.0])


def test_fisher_memory_of_an_unstable_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="does not decay"):
        capacity.fisher_memory(torch.eye(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"\(n, n\)"):
        capacity.fisher_memory(torch.zeros(2, 3), torch.ones(2))


def test_memory_refusals() -> None:
    u = torch.rand(500, dtype=torch.float64)
    with pytest.raises(ValueError, match="too few"):
        capacity.memory_capacity(torch.rand(500, 300), u)
    with pytest.raises(ValueError, match="as many steps"):
        capacity.memory_capacity(torch.rand(400, 3), u)
    with pytest.raises(ValueError, match="constant"):
        capacity.memory_capacity(torch.rand(500, 3), torch.ones(500))
    with pytest.raises(ValueError, match="NaN"):
        capacity.memory_capacity(torch.full((500, 2), torch.nan), u)
    with pytest.raises(ValueError, match="at least 0"):
        capacity.memory_capacity(torch.rand(500, 3), u, 5, noise=-1)


def test_features_that_never_move_remember_nothing() -> None:
    u = torch.rand(500, generator=torch.Generator().manual_seed(0))
    found = capacity.memory_capacity(torch.ones(500, 3), u, 5)
    assert found.value.tolist() == [0] * 6
    assert found.columns["held_out"].abs().max() < 0.05
    assert capacity.information_processing_capacity(torch.ones(500, 3), u, lags=5).value.tolist() == [0]


def test_a_quadratic_feature_has_degree_two_alone() -> None:
    u = torch.rand(8000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    square, product = 3 * u**2 - 1, u.roll(1) * u.roll(3)
    states = torch.stack([u, square, product], dim=1)
    found = capacity.information_processing_capacity(states, u, lags=(5, 5, 3), washout=10)
    torch.testing.assert_close(found.value, torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64), rtol=0, atol=0.02)
    assert found.columns["targets"].tolist() == [6, 21, 20]
    assert found.columns["counted"].tolist()[:2] == [1, 2]


def test_chance_alone_has_no_capacity_but_a_spread() -> None:
    random = torch.Generator().manual_seed(0)
    u = torch.rand(4000, generator=random, dtype=torch.float64)
    off = []
    for _ in range(6):
        states = torch.randn(4000, 20, generator=random, dtype=torch.float64)
        found = capacity.information_processing_capacity(states, u, lags=(30, 8, 4))
        off.append(found.value / found.control["chance_spread"])
    every = torch.stack(off)
    assert every.abs().max() < 4
    assert 0.5 < every.square().mean().sqrt() < 1.6


def test_hermite_polynomials_suit_gaussian_inputs() -> None:
    u = torch.randn(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = torch.stack([u.roll(2), u**3 - 3 * u], dim=1)
    found = capacity.information_processing_capacity(states, u, polynomials="hermite", lags=(4, 4, 2), washout=10)
    torch.testing.assert_close(found.value, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), rtol=0, atol=0.05)


def test_selection_spends_linear_memory() -> None:
    states, u = drive(selective(4, False), 4, 12000)
    frozen, again = drive(selective(4, True), 4, 12000)
    assert torch.equal(u, again)
    found = capacity.selectivity_tax(states, frozen, u, lags=(150, 12, 8))
    assert found.columns["frozen"][0].item() == pytest.approx(4, abs=0.02)
    assert found.columns["frozen"][1:].abs().max() < 0.02
    assert found.value[0] > 1
    assert found.value[1] < -0.5
    assert found.columns["selective_total"] <= 4


def test_processing_refusals() -> None:
    u = torch.rand(300, dtype=torch.float64)
    with pytest.raises(ValueError, match="choose one of legendre, hermite"):
        capacity.information_processing_capacity(torch.rand(300, 2), u, polynomials="chebyshev")
    with pytest.raises(ValueError, match="too few"):
        capacity.information_processing_capacity(torch.rand(300, 2), u)
    with pytest.raises(ValueError, match="inputs that take few values"):
        capacity.information_processing_capacity(torch.rand(300, 2), (u - 0.5).sign(), lags=(3, 2))
    with pytest.raises(ValueError, match="below the 1 samples"):
        capacity.memory_capacity(torch.rand(1, 2), u[:1])


def test_a_trained_model_as_a_reservoir() -> None:
    lens = ssmlens.load("mamba2-recall")
    states, u = capacity.drive(lens, 1, 1500, features=32, warmup=100)
    assert states.shape == (1500, 32)
    assert u.abs().max() <= 1
    again, same = capacity.drive(lens, 1, 1500, features=32, warmup=100)
    assert torch.equal(states, again)
    assert torch.equal(u, same)
    found = capacity.memory_capacity(states, u, 10)
    assert found.value.sum() > 5 * found.control["shuffled"].sum().abs()
    other, _ = capacity.drive(lens, 1, 1500, features=32, warmup=100, frozen=True)
    assert not torch.equal(states, other)


def test_drive_reads_the_states_of_the_model() -> None:
    lens = ssmlens.load(tiny_mamba2().double())
    size = 8 * 8 * 16
    states, _ = capacity.drive(lens, 1, 30, features=size, warmup=40)
    seen: list[torch.Tensor] = []

    def on_scan(call: object) -> object:
        seen.append(call.family.lower(call.arguments, None).recurrence.states()[0].flatten(1))  # type: ignore[attr-defined]
        return call.run()  # type: ignore[attr-defined]

    u = torch.rand(70, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    with tapping({1: lens._mixers[1]}, on_scan), torch.no_grad():
        lens.model.base_model(inputs_embeds=_vectors(lens, u / u.std(), 0)[None], use_cache=False)
    torch.testing.assert_close(states, seen[0][40:], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="choose one of uniform, gaussian"):
        capacity.drive(lens, 1, law="cauchy")
