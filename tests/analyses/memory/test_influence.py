"""Influence: cascades of known kernels, exact Jacobians, the estimator, and real models."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_mamba1, tiny_mamba2, tiny_tokenizer
from tolerances import EXACT

import ssmlens
from ssmlens.analyses import memory


def cascade(a: float, layers: int) -> object:
    """Layers of h[t] = a h[t-1] + x[t], one after the other."""

    def run(x: torch.Tensor) -> torch.Tensor:
        for _ in range(layers):
            h, out = torch.zeros_like(x[0]), []
            for now in x:
                h = a * h + now
                out.append(h)
            x = torch.stack(out)
        return x

    return run


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_cascade_of_poles(layers: int) -> None:
    a, length = 0.9, 500
    found = memory.influence(cascade(a, layers), torch.ones(length, dtype=torch.float64), probes=0)
    for k in (0, 1, 5, 40, 200):
        expected = math.comb(k + layers - 1, layers - 1) * a**k
        assert found.value[0, k].item() == pytest.approx(expected, rel=1e-11)
    assert found.columns["mean_distance"].item() == pytest.approx(layers * a / (1 - a), rel=1e-9)
    assert torch.equal(found.columns["low"], found.value)
    if layers == 1:
        assert found.columns["slope"].item() == pytest.approx(math.log(a), rel=1e-9)
        assert found.columns["near_slope"].item() == pytest.approx(math.log(a), rel=1e-9)
    else:
        # Slower than each pole on the way there.
        assert math.log(a) < found.columns["slope"].item() < 0
        assert found.columns["near_slope"].item() > math.log(a)


def mixing(x: torch.Tensor) -> torch.Tensor:
    """Outputs that depend on all inputs up to their own."""
    return torch.tanh(x.cumsum(0) @ torch.sin(torch.arange(12, dtype=x.dtype).reshape(3, 4)))


def test_exact_jacobians() -> None:
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jacobian = torch.func.jacrev(mixing)(x)  # (t, o, s, d)
    found = memory.influence(mixing, x, [-1, 4], probes=0)
    for i, t in enumerate((8, 4)):
        for k in range(t + 1):
            expected = jacobian[t, :, t - k].norm() * x[t - k].norm()
            assert found.value[i, k].item() == pytest.approx(expected.item(), rel=EXACT)
        assert found.value[i, t + 1 :].isnan().all()
        assert found.columns["share"][i].nansum().item() == pytest.approx(1)


def test_one_position_and_outputs_without_an_axis() -> None:
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = memory.influence(lambda v: mixing(v)[:, 0], x, 4, probes=0)
    listed = memory.influence(lambda v: mixing(v)[:, :1], x, [4], probes=0)
    assert torch.equal(found.value.nan_to_num(), listed.value.nan_to_num())
    whole = memory.influence(lambda v: v.cumsum(0), [[1], [2], [3]], probes=0)
    assert whole.value.tolist() == [[3, 2, 1]]


def test_probes_estimate_it_and_know_how_well() -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = memory.influence(mixing, x, probes=0).value
    found = memory.influence(mixing, x, probes=2000)
    torch.testing.assert_close(found.value, exact, rtol=0.1, atol=0)
    inside = (found.columns["low"] <= exact) & (exact <= found.columns["high"])
    assert inside.double().mean() > 0.6
    assert ((found.columns["high"] - found.columns["low"]) / exact < 0.2).all()


@pytest.mark.parametrize("make", [tiny_mamba1, tiny_mamba2])
def test_equals_the_gradients_of_the_model_itself(make: object) -> None:
    lens = ssmlens.load(make(), tokenizer=tiny_tokenizer(), dtype=torch.float64)
    ids = torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(0))
    found = memory.influence(lens, ids, probes=2)
    vectors = lens.model.get_input_embeddings()(ids).detach().requires_grad_(True)
    logits = lens.model(inputs_embeds=vectors[None]).logits[0, -1]
    squares = torch.zeros(12, dtype=torch.float64)
    for v in torch.randn(2, len(logits), generator=torch.Generator().manual_seed(0)):
        (grad,) = torch.autograd.grad(logits @ v.double(), vectors, retain_graph=True)
        squares += (grad.norm(dim=-1) * vectors.detach().norm(dim=-1)).square() / 2
    torch.testing.assert_close(found.value[0], squares.sqrt().flip(0), rtol=1e-7, atol=0)
    rates = [m.recurrence.log_decay.mean(1).max().item() for m in lens.trace(ids)]
    assert found.control["slowest_head"].item() == pytest.approx(max(rates), rel=1e-9)


def test_refusals() -> None:
    lens = ssmlens.load(tiny_mamba1(), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="one text at a time"):
        memory.influence(lens, ["abc", "def"])
    with pytest.raises(ValueError, match="one row for each of the 5 inputs"):
        memory.influence(lambda v: v.sum(0), torch.ones(5, 2))
    with pytest.raises(ValueError, match="positions lie between"):
        memory.influence(lens, "abc", [3])
