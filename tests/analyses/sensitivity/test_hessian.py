"""The Hessian's ends: matrices of known spectrum, finite differences of a model's gradients, and runs that go on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_mamba1, tiny_mamba2, tiny_tokenizer

import ssmlens
from ssmlens.analyses import sensitivity
from ssmlens.analyses.sensitivity import _hessian
from ssmlens.errors import SsmlensError

IDS = [(5 * k * k + 2 * k) % 17 for k in range(14)]


def symmetric(values, seed: int = 0) -> np.ndarray:
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))
    return basis * np.asarray(values) @ basis.T


def test_ends_of_a_known_spectrum() -> None:
    values = np.concatenate([[9.0, 5.0, 4.9], np.linspace(-1, 1, 40), [-7.0, -3.0]])
    matrix = symmetric(values)
    top, vectors, residuals = sensitivity.spectrum_ends(lambda v: matrix @ v, 45, 3, tolerance=1e-10)
    assert top == pytest.approx([9.0, 5.0, 4.9], abs=1e-9)
    assert residuals.max() < 1e-8
    assert np.allclose(matrix @ vectors, vectors * top, atol=1e-8)
    low, _, _ = sensitivity.spectrum_ends(lambda v: matrix @ v, 45, 2, "smallest", tolerance=1e-10)
    assert low == pytest.approx([-7.0, -3.0], abs=1e-9)


def test_quadrature_of_a_known_spectrum() -> None:
    values = np.array([4.0] * 30 + [-1.0] * 50 + [0.5] * 120)
    matrix = symmetric(values, 1)
    found = [sensitivity.spectrum_moments(lambda v: matrix @ v, 200, depth=5, seed=k) for k in range(60)]
    for name, exact in (("trace", 130.0), ("absolute", 230.0), ("negative", 50.0)):
        numbers = [x[name] for x in found]
        error = np.std(numbers) / np.sqrt(len(numbers))
        assert np.mean(numbers) == pytest.approx(exact, abs=4 * error)
        assert error < 0.05 * exact


def test_curvature_of_a_function_that_is_known() -> None:
    x = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    y = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    idle = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    h = sensitivity.Curvature((x**4).sum() + x[0] * y**2 + 5 * y, [x, y, idle])
    exact = np.zeros((5, 5))
    exact[0, 0], exact[1, 1], exact[0, 2], exact[2, 0], exact[2, 2] = 12 * 0.09, 12 * 1.44, 1.4, 1.4, 0.6
    assert np.allclose(np.stack([h(row) for row in np.eye(5)]), exact, atol=1e-12)


def dense_hessian(lens, names: str) -> np.ndarray:
    """Central differences of the gradient in the parameters whose name holds ``names``."""
    chosen = [p for name, p in lens.model.named_parameters() if names in name]
    ids = torch.tensor([IDS])

    def gradient() -> np.ndarray:
        loss = torch.nn.functional.cross_entropy(lens.model(input_ids=ids).logits[0, :-1], ids[0, 1:])
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, chosen)]).numpy()

    rows, step = [], 1e-4
    for p in chosen:
        flat = p.data.view(-1)
        for i in range(len(flat)):
            ends = []
            for sign in (1, -2):
                flat[i] += sign * step
                ends.append(gradient())
            flat[i] += step
            rows.append((ends[0] - ends[1]) / (2 * step))
    return np.stack(rows)


@pytest.mark.parametrize(("make", "names"), [(tiny_mamba2, "layers.1.mixer.dt_bias"), (tiny_mamba1, "norm_f")])
def test_a_models_hessian_is_that_of_finite_differences(make, names: str) -> None:
    lens = sharp(make)
    dense = dense_hessian(lens, names)
    assert np.allclose(dense, dense.T, atol=1e-6 * np.abs(dense).max())
    values = np.linalg.eigvalsh(dense)[::-1]
    found = sensitivity.hessian(lens, IDS, 2, only=[names], tolerance=1e-8, probes=3, depth=8)
    scale = np.abs(values).max()
    assert found.value.numpy() == pytest.approx(values[:2], abs=1e-5 * scale)
    assert found.columns["smallest"].item() == pytest.approx(values[-1], abs=1e-5 * scale)
    assert abs(found.columns["trace"].item() - values.sum()) < 5 * found.columns["trace_error"].item() + 1e-6 * scale
    assert 0 <= found.columns["negative_share"].item() <= 1
    assert found.settings["parameters"] == len(values)
    for shares in found.settings["where"]:
        assert len(shares) == 1
        assert next(iter(shares)).endswith(names.split(".")[-1]) or names in next(iter(shares))


def sharp(make):
    model = make().double()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
        for layer in model.backbone.layers:
            layer.mixer.out_proj.weight.mul_(6)
    return ssmlens.load(model, tokenizer=tiny_tokenizer())


def test_the_model_is_left_as_it_was_and_padding_is_left_out() -> None:
    lens = sharp(tiny_mamba2)
    before = {name: p.clone() for name, p in lens.model.named_parameters()}
    rows = ["abcab", "abcabcabd"]
    both = sensitivity.hessian(lens, rows, 1, only=["dt_bias"], probes=0)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in lens.model.named_parameters())
    ids = [torch.tensor(lens.tokenizer.encode(row)) for row in rows]
    losses = [
        torch.nn.functional.cross_entropy(lens.model(input_ids=x[None]).logits[0, :-1], x[1:]).item() for x in ids
    ]
    assert both.settings["loss"] == pytest.approx((4 * losses[0] + 8 * losses[1]) / 12, rel=1e-10)
    assert both.columns["trace"].isnan().all()


def test_killed_half_way_it_goes_on(tmp_path, monkeypatch) -> None:
    lens, file = sharp(tiny_mamba2), tmp_path / "run.jsonl"
    settings = {"k": 1, "only": ["layers.1.mixer.dt_bias"], "probes": 1}
    whole = sensitivity.hessian(lens, IDS, **settings)

    def stop(done: int, total: int) -> None:
        assert total == 4
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity.hessian(lens, IDS, **settings, resume=file, progress=stop)
    calls, inner = [], _hessian.spectrum_ends
    monkeypatch.setattr(_hessian, "spectrum_ends", lambda *a, **k: calls.append(a[3]) or inner(*a, **k))
    again = sensitivity.hessian(lens, IDS, **settings, resume=file)
    assert calls == ["largest"]  # of the shuffled targets
    assert torch.allclose(again.value, whole.value)
    assert torch.allclose(again.columns["smallest"], whole.columns["smallest"])
    assert torch.allclose(again.control["shuffled_targets"], whole.control["shuffled_targets"])


@pytest.mark.parametrize("name", ["mamba1-recall", "mamba2-recall"])
def test_shipped_models(name: str) -> None:
    lens = ssmlens.load(name)
    found = sensitivity.hessian(lens, ssmlens.zoo.passage(name), 1, only=["layers.1.mixer.D"], probes=0)
    assert found.columns["residual"][0] <= 1e-2 * found.value[0].abs() + 1e-5
    assert found.columns["smallest"][0] <= found.value[0]
    assert found.columns["scaled"][0] == pytest.approx(found.value[0].item() * found.settings["squared_norm"])


def test_refusals() -> None:
    lens = sharp(tiny_mamba2)
    with pytest.raises(SsmlensError, match=r"no trainable parameter is called .*: names hold .*A_log"):
        sensitivity.hessian(lens, IDS, only=["query"])
    with pytest.raises(SsmlensError, match="k is from 1 to below the 24 parameters, got 24"):
        sensitivity.hessian(lens, IDS, 24, only=["A_log"])
    with pytest.raises(SsmlensError, match="unknown end 'middle'"):
        sensitivity.spectrum_ends(lambda v: v, 5, 1, "middle")
