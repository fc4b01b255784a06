"""Exponents of maps: closed forms, every way to write a map, vanishing directions, resuming, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssmlens.analyses import lyapunov
from ssmlens.analyses.lyapunov import systems
from ssmlens.errors import SsmlensError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_spectrum(matrices: list[Tensor], start: Tensor, every: int = 1) -> Tensor:
    """Mean log R_ii of a product of matrices, by the book."""
    q, total = torch.linalg.qr(start)[0], torch.zeros(start.shape[1], dtype=torch.float64)
    for t, J in enumerate(matrices, 1):
        q = J @ q
        if t % every == 0:
            q, r = torch.linalg.qr(q)
            total += r.diagonal().abs().log()
    return total / len(matrices)


def test_random_products_equal_a_plain_loop() -> None:
    matrices = list(normal(200, 5, 5))
    found = lyapunov.spectrum(
        lambda x, u: u @ x, torch.zeros(5), 200, inputs=torch.stack(matrices), discard=0, control=False
    )
    exact = plain_spectrum(matrices, normal(5, 5, seed=9))
    # Two random starts forget each other at the rate of the gaps between exponents.
    assert float((found.value - exact).abs().max()) < 0.05
    log_det = torch.stack([torch.linalg.slogdet(J).logabsdet for J in matrices]).mean()
    assert found.settings["sum"] == pytest.approx(float(log_det), abs=1e-10)


def test_jacobians_and_pushed_tangents_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    W, u = normal(6, 6) / 2, normal(80, 6, seed=1)

    def function(x: Tensor, v: Tensor) -> Tensor:
        return torch.tanh(W @ x) + v

    by_matrices = lyapunov.spectrum(function, torch.zeros(6), 60, inputs=u, every=2)
    monkeypatch.setattr("ssmlens.analyses.lyapunov._spectrum.SMALL", 0)
    pushed = lyapunov.spectrum(function, torch.zeros(6), 60, inputs=u, every=2)
    assert torch.allclose(by_matrices.value, pushed.value, atol=1e-10)
    assert torch.allclose(by_matrices.control["other_start"], pushed.control["other_start"], atol=1e-10)
    by_differences = lyapunov.spectrum(function, torch.zeros(6), 60, inputs=u, every=2, derivative="difference")
    assert torch.allclose(by_matrices.value, by_differences.value, atol=1e-7)


def test_fixed_point_has_the_eigenvalues_of_its_jacobian() -> None:
    J = torch.diag(torch.tensor([0.9, -0.5, 0.2], dtype=torch.float64))
    S = normal(3, 3)
    M = S @ J @ torch.linalg.inv(S)
    found = lyapunov.spectrum(lambda x: M @ x, torch.zeros(3), 50, discard=300)
    assert found.value.tolist() == pytest.approx([math.log(0.9), math.log(0.5), math.log(0.2)], abs=1e-9)
    assert float((found.control["other_start"] - found.value).abs().max()) < 1e-9


def henon_loops(x: Any) -> Any:
    return [1 - 1.4 * x[0] ** 2 + x[1], 0.3 * x[0]]


WAYS: dict[str, tuple[Any, str]] = {
    "torch": (systems.henon, "forward"),
    "list of tensors": (henon_loops, "forward"),
    "numpy": (lambda x: np.array([1 - 1.4 * x[0] ** 2 + x[1], 0.3 * x[0]]), "difference"),
    "torch.tensor of numbers": (lambda x: torch.tensor([float(v) for v in henon_loops(x)]).double(), "difference"),
    "an if on a number": (lambda x: systems.henon(x) if x[0] > 0 else systems.henon(x * 1.0), "forward"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_map_may_be_written_in_many_ways(way: str) -> None:
    function, derivative = WAYS[way]
    if way == "torch.tensor of numbers":  # kept in float64 all the way
        function = lambda x: torch.tensor([float(v) for v in henon_loops(x)], dtype=torch.float64)  # noqa: E731
    found = lyapunov.spectrum(function, [0.1, 0.1], 100, discard=50)
    assert found.settings["derivative"] == derivative
    exact = lyapunov.spectrum(systems.henon, [0.1, 0.1], 100, discard=50)
    # The orbits part by rounding before they end.
    assert float((found.value - exact.value).abs().max()) < 0.05
    assert found.settings["sum"] == pytest.approx(math.log(0.3), abs=1e-8)


@pytest.mark.parametrize("state", [[0.1, 0.1], (0.1, 0.1), np.array([0.1, 0.1]), torch.tensor([0.1, 0.1])])
def test_a_state_may_be_given_in_many_ways(state: Any) -> None:
    found = lyapunov.spectrum(systems.henon, state, 40, discard=0)
    assert found.settings["sum"] == pytest.approx(math.log(0.3), abs=1e-10)


def test_a_float32_network_keeps_its_dtype() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    found = lyapunov.spectrum(lambda x: torch.tanh(net(x)), torch.zeros(4), 100, discard=100)
    wide = torch.nn.Linear(4, 4).double().requires_grad_(False)
    wide.load_state_dict(net.state_dict())
    exact = lyapunov.spectrum(lambda x: torch.tanh(wide(x)), torch.zeros(4), 100, discard=100)
    assert float((found.value - exact.value).abs().max()) < 1e-3


def test_a_state_may_have_any_shape() -> None:
    found = lyapunov.spectrum(lambda x: systems.henon(x.flatten()).view(2, 1), [[0.1], [0.1]], 100, discard=10)
    flat = lyapunov.spectrum(systems.henon, [0.1, 0.1], 100, discard=10)
    assert float((found.value - flat.value).abs().max()) < 1e-9


@pytest.mark.parametrize("kind", ["tensor", "list", "array", "function"])
def test_inputs(kind: str) -> None:
    u = normal(120)
    inputs = {"tensor": u, "list": list(u), "array": u.numpy(), "function": lambda t: u[t]}[kind]
    found = lyapunov.spectrum(lambda x, v: torch.sigmoid(v) * x + v, [1.0], 120, inputs=inputs, discard=0)
    assert float(found.value[0]) == pytest.approx(float(torch.sigmoid(u).log().mean()), abs=1e-12)
    assert any("conditional on this drive" in sentence for sentence in found.assumes)


def test_inputs_that_are_just_enough_leave_nothing_to_discard() -> None:
    found = lyapunov.spectrum(lambda x, v: 0.5 * x + v, [1.0], 50, inputs=normal(53))
    assert found.settings["discard"] == 3
    with pytest.raises(SsmlensError, match="54 steps need as many inputs, got 53"):
        lyapunov.spectrum(lambda x, v: 0.5 * x + v, [1.0], 50, inputs=normal(53), discard=4)


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_shift_registers_have_minus_infinity_never_nan(every: int) -> None:
    def step(x: Tensor) -> Tensor:
        return torch.cat([(0.5 * x[0] + x[3])[None] * 0 + 0.5 * x[:1], x[:1], x[1:3]])

    found = lyapunov.spectrum(step, torch.ones(4, dtype=torch.float64), 63, every=every)
    assert found.value.tolist() == [pytest.approx(math.log(0.5)), -math.inf, -math.inf, -math.inf]
    for x in (*found.columns.values(), *found.control.values()):
        assert not bool(x.isnan().any())
    assert found.columns["vanished"].tolist()[0] == 0


@pytest.mark.parametrize("inputs", [3, 7])
def test_shift_registers_vanish_in_long_runs(inputs: int) -> None:
    """Rounding, left alone, makes log(eps) / inputs of the exponents of a register."""
    S = normal(inputs + 1, inputs + 1)
    back = torch.linalg.inv(S)

    def step(x: Tensor) -> Tensor:
        x = back @ x
        return S @ torch.cat([0.9 * x[:1], x[:1].sin(), x[1:inputs]])

    found = lyapunov.spectrum(step, torch.zeros(inputs + 1), 600)
    assert found.value.tolist() == [pytest.approx(math.log(0.9)), *[-math.inf] * inputs]
    assert found.control["other_start"][1:].tolist() == [-math.inf] * inputs
    assert found.columns["vanished"].tolist()[0] == 0


@pytest.mark.parametrize("state", [0.3, torch.tensor(0.3, dtype=torch.float64)])
def test_a_state_may_be_a_number(state: Any) -> None:
    found = lyapunov.spectrum(lambda x: 4 * x * (1 - x), state, 2e3)
    listed = lyapunov.spectrum(lambda x: 4 * x * (1 - x), [0.3], 2000)
    assert found.value.tolist() == listed.value.tolist()
    assert lyapunov.covariant_vectors(lambda x: 0.5 * x, 1.0, 10).value.abs().tolist() == [[[1.0]]] * 10


def test_strong_contraction_is_no_vanishing() -> None:
    D = torch.tensor([0.9, 1e-12, 1e-30], dtype=torch.float64)
    found = lyapunov.spectrum(lambda x: D * x, torch.ones(3), 40)
    assert found.value[2].item() == pytest.approx(math.log(1e-30), rel=1e-6) or found.value[2].item() == -math.inf
    assert found.value[1].item() == pytest.approx(math.log(1e-12), rel=1e-4)


def test_a_superstable_orbit_is_minus_infinity() -> None:
    found = lyapunov.spectrum(lambda x: 4 * x * (1 - x) * 0.5, [0.5], 20)
    assert found.value.tolist() == [-math.inf]


def test_time_of_a_step() -> None:
    a = lyapunov.spectrum(systems.lorenz, [1.0, 1.0, 20.0], 200, discard=100, dt=0.01)
    b = lyapunov.spectrum(systems.lorenz, [1.0, 1.0, 20.0], 200, discard=100)
    assert torch.allclose(a.value, 100 * b.value, rtol=1e-12)
    assert (a.units, b.units) == ("nats/time", "nats/step")


def test_windows_average_to_the_whole() -> None:
    found = lyapunov.spectrum(systems.henon, [0.1, 0.1], 120, discard=20, window=30)
    assert found.dims == ("window", "exponent")
    assert found.coords["window"] == [20, 50, 80, 110]
    assert torch.allclose(found.value.mean(0), found.columns["mean"], atol=1e-12)
    whole = lyapunov.spectrum(systems.henon, [0.1, 0.1], 120, discard=20)
    assert torch.allclose(whole.value, found.columns["mean"], atol=1e-12)
    with pytest.raises(SsmlensError, match="multiple of the steps between"):
        lyapunov.spectrum(systems.henon, [0.1, 0.1], 120, every=7, window=30)


def test_intervals_cover_the_exact_value_about_as_often_as_they_say() -> None:
    inside = 0
    for seed in range(20):
        u = normal(400, seed=seed)
        found = lyapunov.spectrum(lambda x, v: v.exp() * x, [1.0], 400, inputs=u, discard=0, every=20, control=False)
        inside += bool(found.columns["low"][0] <= 0 <= found.columns["high"][0])
    assert 16 <= inside <= 20


def test_error_is_that_of_independent_blocks() -> None:
    u = normal(4000, seed=3)
    found = lyapunov.spectrum(lambda x, v: v.exp() * x, [1.0], 4000, inputs=u, discard=0, control=False)
    assert float(found.columns["standard_error"][0]) == pytest.approx(1 / 4000**0.5, rel=0.5)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("size", [3, 40])
def test_a_stopped_run_goes_on_and_ends_the_same(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmlens.analyses.lyapunov._benettin.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("ssmlens.analyses.lyapunov._small.Matrices.most", 10)
    W = normal(size, size) / size**0.5
    function, start, path = (lambda x: torch.tanh(2 * W @ x)), normal(size), tmp_path / "run"
    whole = lyapunov.spectrum(function, start, 60, 3)
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append((done, total))
        if done >= 33:
            raise Stopped

    with pytest.raises(Stopped):
        lyapunov.spectrum(function, start, 60, 3, resume=path, progress=stop)
    assert calls[-1][1] == 66
    after: list[int] = []
    again = lyapunov.spectrum(function, start, 60, 3, resume=path, progress=lambda done, total: after.append(done))
    assert min(after) > 33
    assert torch.equal(again.value, whole.value)
    assert torch.equal(again.control["other_start"], whole.control["other_start"])
    # A finished run is only read.
    assert torch.equal(lyapunov.spectrum(function, start, 60, 3, resume=path).value, whole.value)
    with pytest.raises(SsmlensError, match=r"other settings \(seed\)"):
        lyapunov.spectrum(function, start, 60, 3, resume=path, seed=1)
    with pytest.raises(SsmlensError, match=r"other settings \(start\)"):
        lyapunov.spectrum(function, start + 1, 60, 3, resume=path)
    path.write_bytes(b"nonsense, and long enough to have a header")
    with pytest.raises(SsmlensError, match="does not hold a run"):
        lyapunov.spectrum(function, start, 60, 3, resume=path)


def test_refusals() -> None:
    with pytest.raises(SsmlensError, match=r"turns a state \(2,\) into \(3,\)"):
        lyapunov.spectrum(lambda x: torch.zeros(3), [1.0, 2.0], 5)
    with pytest.raises(SsmlensError, match="k is at most the 2 dimensions"):
        lyapunov.spectrum(systems.henon, [0.1, 0.1], 5, 3)
    with pytest.raises(SsmlensError, match="steps is at least 1"):
        lyapunov.spectrum(systems.henon, [0.1, 0.1], 0)
    with pytest.raises(SsmlensError, match="NaN or infinite"):
        lyapunov.spectrum(systems.henon, [math.nan, 0.1], 5)
    with pytest.raises(SsmlensError, match="leaves the finite numbers"):
        lyapunov.spectrum(systems.henon, [9.0, 9.0], 50)
    M = normal(6, 6)
    with pytest.raises(SsmlensError, match="leaves the finite numbers"):
        lyapunov.spectrum(lambda x: M @ x, torch.ones(6), 3000)
    with pytest.raises(SsmlensError, match="steps is a whole number"):
        lyapunov.spectrum(systems.henon, [0.1, 0.1], 2.5)
    with pytest.raises(SsmlensError, match="say how many exponents"):
        lyapunov.spectrum(lambda x: x / 2, torch.zeros(1000), 5)
    with pytest.raises(SsmlensError, match="dt is above 0"):
        lyapunov.spectrum(systems.henon, [0.1, 0.1], 5, dt=0)
    with pytest.raises(ValueError, match="choose one of auto, forward, difference"):
        lyapunov.spectrum(systems.henon, [0.1, 0.1], 5, derivative="backward")
    with pytest.raises(SsmlensError, match="no forward derivative"):
        lyapunov.spectrum(WAYS["numpy"][0], [0.1, 0.1], 5, derivative="forward")


def test_a_warning_says_that_tangents_fall_together() -> None:
    D = torch.tensor([0.9, 1e-3], dtype=torch.float64)
    found = lyapunov.spectrum(lambda x: D * x, torch.ones(2), 40, every=4)
    assert any("more than a millionfold" in sentence for sentence in found.assumes)


def test_chaos_of_random_networks_is_extensive() -> None:
    """Engelken et al. (2020): exponents over i / N of tanh networks lie on one curve, whatever N."""
    curves = []
    for n in (24, 48):
        W = 3.0 * normal(n, n, seed=n) / n**0.5
        found = lyapunov.spectrum(lambda x, W=W: torch.tanh(W @ x), normal(n), 400, n // 2, every=4, control=False)
        curves.append(found.value)
    assert float((curves[0] - curves[1][1::2]).abs().mean()) < 0.12
    assert float(curves[0][0]) > 0.1
