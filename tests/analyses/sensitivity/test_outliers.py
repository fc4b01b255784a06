"""Outliers and rotations: Hadamard matrices, known tails, tensors that are the model's own, and every check."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kurtosis
from tiny import tiny_mamba1, tiny_mamba2
from tolerances import EXACT

import ssmlens
from ssmlens.analyses import sensitivity
from ssmlens.analyses.sensitivity import _outliers
from ssmlens.analyses.sensitivity.checks import CHECKS, correlated
from ssmlens.errors import SsmlensError

IDS = [(7 * k * k + 3) % 251 for k in range(48)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_closed_forms(check) -> None:
    outcome = check()
    assert outcome.passed, outcome


@pytest.mark.parametrize("d", [1, 2, 4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 256, 768, 1536])
def test_hadamard_matrices(d: int) -> None:
    h = sensitivity.hadamard(d)
    assert torch.equal(h.abs(), torch.ones(d, d, dtype=torch.float64))
    assert torch.equal(h @ h.T, d * torch.eye(d, dtype=torch.float64))


@pytest.mark.parametrize("d", [0, 3, 6, 28, 100, 257])
def test_orders_without_a_matrix_are_refused(d: int) -> None:
    # 28 and 100 have matrices, but of other constructions.
    with pytest.raises(SsmlensError, match="Hadamard matri"):
        sensitivity.hadamard(d)


def test_klt_then_hadamard_equalises_and_hadamard_alone_does_not() -> None:
    x = correlated(seed=4)
    ginis = {way: sensitivity.gini(sensitivity.rotated(x, way).var(0)) for way in sensitivity.ROTATIONS}
    assert ginis["klt_hadamard"] < EXACT
    assert ginis["none"] > ginis["hadamard"] > 0.1
    assert EXACT < ginis["klt_hadamard_held_out"] < 0.1
    covariance = torch.cov(x.T, correction=0)
    level = covariance.trace() / x.shape[1]
    assert torch.allclose(sensitivity.rotated(x, "klt_hadamard").var(0, correction=0), level.expand(32), rtol=EXACT)


@pytest.mark.parametrize("way", sensitivity.ROTATIONS)
def test_rotations_keep_lengths(way: str) -> None:
    x = correlated(m=50)
    y = sensitivity.rotated(x, way)
    kept = x[25:] if way == "klt_hadamard_held_out" else x
    assert torch.allclose(y.norm(dim=1), kept.norm(dim=1), rtol=1e-12)


def test_random_rotations_are_orthogonal_and_differ_by_seed() -> None:
    a, b = (sensitivity.random_rotation(12, seed) for seed in (0, 1))
    assert torch.allclose(a @ a.T, torch.eye(12, dtype=torch.float64), atol=1e-12)
    assert not torch.allclose(a, b)


def test_statistics_equal_plain_ones() -> None:
    x = correlated(m=300, d=16, seed=2)
    x[17, 3] = 400
    found = sensitivity.outlier_statistics(x)
    assert found["kurtosis"] == pytest.approx(kurtosis(x.numpy().ravel(), fisher=False), rel=1e-9)
    assert found["low"] < found["kurtosis"] * 1.01
    magnitudes = sorted(abs(v) for v in x.flatten().tolist())
    assert found["max_over_median"] == pytest.approx(400 / magnitudes[(len(magnitudes) - 1) // 2])
    variances = x.var(0, correction=0).tolist()
    pairs = sum(abs(a - b) for a in variances for b in variances)
    assert found["gini"] == pytest.approx(pairs / (2 * 16 * sum(variances)), rel=1e-12)
    energies = [sum(v * v for v in x[:, c].tolist()) for c in range(16)]
    assert found["top_energy"] == pytest.approx(max(energies) / sum(energies), rel=1e-12)
    step = 400 / 127
    wrong = sum((v - step * round(v / step)) ** 2 for v in x.flatten().tolist())
    assert found["int8_error"] == pytest.approx(math.sqrt(wrong / sum(energies)), rel=1e-6)
    assert found["int8_error"] > 5 * found["normal_int8_error"]


def test_gini_of_known_lists() -> None:
    assert sensitivity.gini(torch.full((7,), 3.0)) == pytest.approx(0, abs=EXACT)
    assert sensitivity.gini(torch.tensor([0.0, 0, 0, 5])) == pytest.approx(0.75, abs=EXACT)
    even = torch.linspace(0, 1, 2001, dtype=torch.float64)
    assert sensitivity.gini(-torch.log1p(-even[:-1])) == pytest.approx(0.5, abs=5e-3)  # the exponential law
    assert math.isnan(sensitivity.gini(torch.zeros(3)))
    with pytest.raises(SsmlensError, match="not negative"):
        sensitivity.gini(torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("make", [tiny_mamba1, tiny_mamba2])
def test_projected_is_what_the_model_projects(make) -> None:
    trace = ssmlens.load(make().double()).trace(IDS)
    for mixer in trace:
        projected = _outliers._samples(mixer, "projected")
        weight = mixer.parameters["out_proj.weight"]
        assert torch.allclose(projected @ weight.T, mixer.output[0], atol=1e-12)


@pytest.mark.parametrize("make", [tiny_mamba1, tiny_mamba2])
def test_a_trace_gives_every_tensor_of_every_layer(make, tmp_path) -> None:
    trace = ssmlens.load(make()).trace(IDS)
    found = sensitivity.outliers(trace)
    assert found.shape == (9, 3, 5)
    assert bool(found.value.isfinite().all())
    index = found.coords["rotation"].index("klt_hadamard")
    assert found.columns["gini"][:, :, index].max() < 1e-9  # channels with no variance leave rounding
    n = 8 if make is tiny_mamba1 else 16
    sizes = dict(zip(found.coords["tensor"], found.columns["channels"][:, 0, 0].tolist()))
    assert (sizes["state"], sizes["gate"], sizes["input"]) == (n, 64, 32)
    assert torch.equal(type(found).load(found.save(tmp_path / "o.json")).value, found.value)


def test_padding_is_left_out() -> None:
    lens = ssmlens.load(tiny_mamba2().double())
    both = lens.trace(
        torch.tensor([IDS, IDS[:20] + [0] * 28]), attention_mask=torch.tensor([[1] * 48, [1] * 20 + [0] * 28])
    )
    alone = [lens.trace(ids) for ids in (IDS, IDS[:20])]
    for name in ("gate", "value", "dt", "output"):
        expected = torch.cat([_outliers._samples(trace[1], name) for trace in alone])
        assert torch.allclose(_outliers._samples(both[1], name), expected, atol=1e-12)


@pytest.mark.parametrize("name", ["mamba1-recall", "mamba2-recall"])
def test_shipped_models(name: str) -> None:
    trace = ssmlens.load(name).trace(ssmlens.zoo.passage(name))
    found = sensitivity.outliers(trace, ["projected", "value"], ["none", "klt_hadamard"])
    error = found.columns["int8_error"]
    assert bool((error[:, :, 1] < error[:, :, 0]).all())
    assert bool((found.columns["low"] <= found.value * 1.05).all())


def test_refusals() -> None:
    trace = ssmlens.load(tiny_mamba2()).trace(IDS)
    with pytest.raises(SsmlensError, match="unknown tensor or rotation 'query'"):
        sensitivity.outliers(trace, ["query"])
    with pytest.raises(SsmlensError, match="unknown tensor or rotation 'fft'"):
        sensitivity.outliers(trace, rotations=["fft"])
    with pytest.raises(SsmlensError, match=r"samples are finite numbers \(m, d\)"):
        sensitivity.outlier_statistics(torch.tensor([[math.nan]]))
    with pytest.raises(SsmlensError, match=r"samples are finite numbers \(m, d\)"):
        sensitivity.outlier_statistics(torch.zeros(3))
