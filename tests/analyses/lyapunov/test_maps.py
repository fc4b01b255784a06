"""What else is measured on maps: dimensions, covariant vectors, two trajectories, transient gains."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssmlens.analyses import lyapunov
from ssmlens.analyses.lyapunov import systems
from ssmlens.errors import PromptError, SsmlensError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("exponents", "dimension", "entropy"),
    [
        ([0.419, -1.623], 1 + 0.419 / 1.623, 0.419),
        ([-1.623, 0.419], 1 + 0.419 / 1.623, 0.419),
        ([0.3, 0.1, -0.2, -5.0], 3 + 0.2 / 5, 0.4),
        ([0.0, -1.0], 1.0, 0.0),
        ([-0.1], 0.0, 0.0),
        ([0.5, -0.5], 2.0, 0.5),
        ([0.5, -math.inf], 1.0, 0.5),
    ],
)
def test_kaplan_yorke(exponents: list[float], dimension: float, entropy: float) -> None:
    found = lyapunov.kaplan_yorke(exponents)
    assert float(found.value) == pytest.approx(dimension, abs=1e-12)
    assert float(found.columns["entropy_bound"]) == pytest.approx(entropy, abs=1e-12)


def test_a_result_of_one_number_is_a_number() -> None:
    assert float(lyapunov.kaplan_yorke([0.419, -1.623])) == pytest.approx(1.25816, abs=1e-5)
    with pytest.raises(TypeError, match="holds 2 numbers"):
        float(lyapunov.spectrum(systems.henon, [0.1, 0.1], 5))


def test_kaplan_yorke_of_too_few_exponents_is_a_lower_bound() -> None:
    found = lyapunov.kaplan_yorke([0.5, 0.2], dimensions=10)
    assert float(found.value) == 2
    assert any("a lower bound" in sentence for sentence in found.assumes)
    spectrum = lyapunov.spectrum(systems.henon, [0.1, 0.1], 50, 1)
    assert any("a lower bound" in sentence for sentence in lyapunov.kaplan_yorke(spectrum).assumes)
    whole = lyapunov.kaplan_yorke(lyapunov.spectrum(systems.henon, [0.1, 0.1], 50, window=10))
    assert 1 < float(whole.value) < 2
    assert not any("a lower bound" in sentence for sentence in whole.assumes)
    for wrong in ([], [math.nan], [[0.1, 0.2]], [math.inf]):
        with pytest.raises(SsmlensError, match="exponents"):
            lyapunov.kaplan_yorke(wrong)


def test_covariant_vectors_are_carried_into_each_other() -> None:
    found = lyapunov.covariant_vectors(systems.henon, [0.1, 0.1], 40, discard=100, tail=100)
    x = torch.tensor([0.1, 0.1], dtype=torch.float64)
    orbit = [x]
    for _ in range(140):
        orbit.append(systems.henon(orbit[-1]))
    grown = torch.zeros(2, dtype=torch.float64)
    for i, t in enumerate(found.coords["time"][:-1]):
        J = torch.autograd.functional.jacobian(systems.henon, orbit[t])
        moved = found.value[i] @ J.T
        size = moved.norm(dim=1)
        grown += size.log()
        cosine = (moved / size[:, None] * found.value[i + 1]).sum(1).abs()
        assert float((cosine - 1).abs().max()) < 1e-9
    assert torch.allclose(grown / 39, found.columns["exponent"].flatten(), atol=0.1)
    exponents = lyapunov.spectrum(systems.henon, [0.1, 0.1], 40, discard=100, control=False).value
    assert float(found.columns["exponent"].sum()) == pytest.approx(float(exponents.sum()), abs=0.3)


def test_covariant_vectors_of_random_products_against_clean_powers() -> None:
    # Of a constant matrix with known eigenvectors, in five dimensions.
    S = torch.linalg.qr(normal(5, 5))[0] + 0.3 * normal(5, 5, seed=1)
    M = S @ torch.diag(torch.tensor([1.5, 1.1, 0.8, 0.4, 0.1], dtype=torch.float64)) @ torch.linalg.inv(S)
    found = lyapunov.covariant_vectors(lambda x: M @ x, normal(5), 3, discard=60, tail=60, keep=2)
    assert found.coords["time"] == [60, 62]
    vectors = S / S.norm(dim=0)
    assert float(((found.value @ vectors).diagonal(dim1=1, dim2=2).abs() - 1).abs().max()) < 1e-8
    a, b = torch.linalg.qr(vectors[:, :2])[0], torch.linalg.qr(vectors[:, 2:])[0]
    angle = math.degrees(math.acos(min(1.0, float(torch.linalg.svdvals(a.T @ b)[0]))))
    assert float(found.columns["angle"].max()) == pytest.approx(angle, abs=1e-5)


def test_covariant_vectors_refuse_what_vanishes() -> None:
    with pytest.raises(SsmlensError, match="a direction vanishes"):
        lyapunov.covariant_vectors(lambda x: torch.stack([x[0] / 2, x[0]]), [1.0, 1.0], 20)
    with pytest.raises(SsmlensError, match="tail is at least 0"):
        lyapunov.covariant_vectors(systems.henon, [0.1, 0.1], 20, tail=-1)
    alone = lyapunov.covariant_vectors(lambda x: x / 2, [1.0], 5)
    assert bool(alone.columns["angle"].isnan().all())


def test_two_trajectories_and_their_noise() -> None:
    wide = lyapunov.two_trajectory(systems.henon, [0.1, 0.1], 500)
    assert float(wide.control["rounding"]) < 1e-6
    assert not any("NOT MET" in sentence for sentence in wide.assumes)
    assert float(wide.columns["low"]) < float(wide.value) < float(wide.columns["high"])
    # A separation of about one unit in the last place measures rounding, and says so.
    narrow = lyapunov.two_trajectory(systems.henon, torch.tensor([0.1, 0.1]), 300, 1e-7)
    assert float(narrow.control["rounding"]) > 0.1
    assert any("NOT MET" in sentence for sentence in narrow.assumes)


def test_two_trajectories_against_another_implementation() -> None:
    found = lyapunov.two_trajectory(
        lambda x, u: x * u, [2.0], 60, 1e-6, inputs=torch.full((70,), 0.9), other=lambda x, u: x * u + 1e-8
    )
    assert float(found.value) == pytest.approx(math.log(0.9), abs=1e-6)
    assert float(found.control["rounding"]) == pytest.approx(1e-8 / 0.9e-6, rel=1e-3)


def test_trajectories_that_meet_are_minus_infinity() -> None:
    found = lyapunov.two_trajectory(lambda x: x * 0, [1.0], 20)
    assert float(found.value) == -math.inf
    with pytest.raises(SsmlensError, match="d0 is above 0"):
        lyapunov.two_trajectory(systems.henon, [0.1, 0.1], 5, 0.0)
    with pytest.raises(SsmlensError, match="leaves the finite numbers"):
        lyapunov.two_trajectory(systems.henon, [9.0, 9.0], 50)


def test_gain_is_the_norm_of_the_power() -> None:
    M = normal(6, 6) / 2
    found = lyapunov.transient_gain(M, horizons=[1, 3, 20, 40])
    for gain, h in zip(found.value, (1, 3, 20, 40), strict=True):
        assert float(gain) == pytest.approx(float(torch.linalg.matrix_norm(torch.matrix_power(M, h), 2)), rel=1e-3)
    radius = float(torch.linalg.eigvals(M).abs().max())
    assert float(found.control["spectral"][1]) == pytest.approx(radius**3, rel=1e-9)
    T = torch.linalg.eigvals(M).abs().square().sum()
    assert found.settings["henrici"] == pytest.approx(float((M.square().sum() - T).sqrt()), rel=1e-9)
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    normal_map = lyapunov.transient_gain(rotation, horizons=[1, 5])
    assert normal_map.value.tolist() == pytest.approx([1.0, 1.0])
    assert normal_map.settings["henrici"] == pytest.approx(0, abs=1e-7)


def test_gain_of_a_map_is_that_of_its_jacobians(tmp_path: Path) -> None:
    u = normal(200)

    def step(x: Tensor, v: Tensor) -> Tensor:
        return torch.stack([1 - 1.4 * x[0] ** 2 + x[1] + 0.01 * v, 0.3 * x[0]])

    path = tmp_path / "gains"
    found = lyapunov.transient_gain(step, [0.1, 0.1], [1, 5], starts=4, inputs=u, discard=3, resume=path)
    assert found.settings["starts"] == [3, 8, 13, 18]
    x, products = torch.tensor([0.1, 0.1], dtype=torch.float64), []
    for t in range(23):
        products.append(torch.autograd.functional.jacobian(lambda y, t=t: step(y, u[t]), x))
        x = step(x, u[t])
    for h, gain, start in zip((1, 5), found.value, found.columns["start"], strict=True):
        exact = {}
        for at in (3, 8, 13, 18):
            P = torch.eye(2, dtype=torch.float64)
            for t in range(at, at + h):
                P = products[t] @ P
            exact[at] = float(torch.linalg.matrix_norm(P, 2))
        assert float(gain) == pytest.approx(max(exact.values()), rel=1e-3)
        assert exact[int(start)] == max(exact.values())
    calls: list[int] = []
    again = lyapunov.transient_gain(
        step, [0.1, 0.1], [1, 5], starts=4, inputs=u, discard=3, resume=path, progress=lambda d, t: calls.append(d)
    )
    assert torch.equal(again.value, found.value)


def test_gain_refusals() -> None:
    with pytest.raises(SsmlensError, match="square floating tensor"):
        lyapunov.transient_gain(torch.ones(2, 3))
    with pytest.raises(SsmlensError, match="horizons are whole numbers above 0"):
        lyapunov.transient_gain(torch.eye(2), horizons=[0])
    with pytest.raises(SsmlensError, match="a map needs the state"):
        lyapunov.transient_gain(systems.henon)
    with pytest.raises(SsmlensError, match="as many inputs"):
        lyapunov.transient_gain(lambda x, u: x * u, [1.0], [10], starts=2, inputs=torch.ones(15))
    assert issubclass(PromptError, SsmlensError)
