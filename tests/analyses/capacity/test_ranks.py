"""Ranks of states, their null model, the load law and effective bits."""

from __future__ import annotations

import math

import pytest
import torch

import ssmlens
from ssmlens.analyses import capacity
from ssmlens.analyses.capacity.checks import random_recurrence
from ssmlens.kernels import naive
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.recurrence import Recurrence
from ssmlens.tasks import Copy


def test_ranks_by_hand() -> None:
    rec = random_recurrence("scalar", length=12)
    found = capacity.rank_statistics(rec, [5, 11])
    states = naive.states(rec.inputs)[:, [5, 11]]
    mean = states.mean((0, 1))
    for b in range(2):
        for h in range(4):
            for k in range(2):
                s = torch.linalg.svdvals(states[b, k, h])
                c = torch.linalg.svdvals(states[b, k, h] - mean[h])
                at = (b, h, k)
                assert found.value[at].item() == pytest.approx((s.pow(2).sum() ** 2 / s.pow(4).sum()).item())
                shares = s / s.sum()
                exact = torch.exp(-(shares * shares.log()).sum()).item()
                assert found.columns["entropy_rank"][at].item() == pytest.approx(exact)
                assert found.columns["stable_rank"][at].item() == pytest.approx((s.pow(2).sum() / s[0] ** 2).item())
                exact = (c.pow(2).sum() ** 2 / c.pow(4).sum()).item()
                assert found.columns["centred_participation"][at].item() == pytest.approx(exact)
    energy = states.square().sum((-2, -1)).mean((0, 1))
    share = mean.square().sum((-2, -1)) / energy
    torch.testing.assert_close(found.columns["mean_energy"][0, :, 0], share)


def test_the_null_is_that_of_the_mean_decay() -> None:
    rec = random_recurrence("scalar", length=12)
    found = capacity.rank_statistics(rec, [11])
    decay = rec.log_decay[1, :, 2, 0].mean().exp().item()
    assert found.control["null"][1, 2, 0].item() == pytest.approx(capacity.rank_null(decay, 6, 3).value.item())
    apart = capacity.rank_statistics(random_recurrence("per-state", length=12), [11])
    assert apart.control["null"].isnan().all()


def test_one_state_has_no_mean_of_its_own() -> None:
    rec = random_recurrence("scalar", length=12)
    single = Recurrence(rec.inputs.map(lambda x: x[:1] if x.ndim > 2 else x))
    found = capacity.rank_statistics(single, [3])
    assert found.columns["centred_participation"].isnan().all()
    assert found.columns["mean_energy"].isnan().all()


def test_padding_has_no_state() -> None:
    rec = Recurrence(random_recurrence("scalar", length=12).inputs, lengths=torch.tensor([12, 6]))
    found = capacity.rank_statistics(rec, [4, 9])
    assert found.value[1, :, 1].isnan().all()
    assert found.value[0].isfinite().all()
    assert found.columns["centred_participation"][1, :, 0].isfinite().all()


def test_mamba1_layers_are_one_matrix() -> None:
    trace = ssmlens.load("mamba1-recall").trace("c 7 a 19 . . a . c . .")
    found = capacity.rank_statistics(trace, [5, 8])
    assert found.shape == (2, 1, 1, 2)
    state = trace[1].recurrence.states([8])[0, 0, :, 0].double()
    s = torch.linalg.svdvals(state)
    assert found.value[1, 0, 0, 1].item() == pytest.approx((s.pow(2).sum() ** 2 / s.pow(4).sum()).item())
    single = capacity.rank_statistics(trace, [5, 8], per="head")
    assert (single.value[0, 0].isnan() | (single.value[0, 0] == pytest.approx(1))).all()


def test_the_summary_has_no_null_where_states_decay_apart() -> None:
    found = capacity.summary(ssmlens.load("mamba1-recall").trace("c 7 a 19 . . a . c . ."))
    assert found.control["null"].isnan().all()
    single = capacity.rank_statistics(ssmlens.load("mamba2-recall").trace("c 7 a 19 . . a . c . ."))
    both = capacity.summary(ssmlens.load("mamba2-recall").trace("c 7 a 19 . . a . c . ."))
    middle = single.control["null"].flatten(2).sort(-1).values[..., (single.control["null"][0, 0].numel() - 1) // 2]
    torch.testing.assert_close(both.control["null"], middle)


def test_tiny_and_empty_states() -> None:
    tiny = capacity.rank_statistics(torch.eye(3).double() * 1e-90)
    assert tiny.value.item() == pytest.approx(3)
    assert capacity.rank_statistics(torch.zeros(2, 3, 4)).value.tolist() == [0, 0]
    assert capacity.rank_statistics([[2.0, 0.0], [0.0, 2.0]]).value.item() == pytest.approx(2)


def test_null_model_limits() -> None:
    assert capacity.rank_null(0.0, 16, 64).value.item() == pytest.approx(16 * 64 / (18 * 66))
    assert capacity.rank_null(1.0, 16, 64).value.item() == pytest.approx(16 * 64 / 81)
    assert capacity.rank_null([0.5, 0.9], 16, 64).shape == (2,)
    with pytest.raises(ValueError, match="between 0 and 1"):
        capacity.rank_null(1.1, 16, 64)
    with pytest.raises(ValueError, match="at least 1"):
        capacity.rank_null(0.5, 0, 64)


@pytest.mark.parametrize(("n", "p"), [(16, 64), (64, 64)])
def test_the_prediction_of_the_load_law_agrees_with_simulation(n: int, p: int) -> None:
    half = n * p / (2 * math.log(256))
    found = capacity.hebbian_load(n, p, 256, [round(half / 4), round(half), round(2 * half)], simulate=3000)
    torch.testing.assert_close(found.value, found.columns["simulated"], rtol=0, atol=0.035)
    assert (found.columns["low"] <= found.columns["simulated"]).all()
    assert found.control["chance"].item() == pytest.approx(1 / 256)


def test_older_pairs_fade() -> None:
    ages = [capacity.hebbian_load(32, 32, 64, [60], decay=0.95, age=k, simulate=600) for k in (0, 20, 50)]
    value = torch.tensor([x.value.item() for x in ages])
    assert (value.diff() < 0).all()
    for x in ages:
        assert x.value.item() == pytest.approx(x.columns["simulated"].item(), abs=0.08)


def test_one_pair_is_always_found() -> None:
    assert capacity.hebbian_load(16, 64, 32, [1]).value.item() == pytest.approx(1, abs=2e-3)


def test_a_load_may_be_one_number() -> None:
    assert capacity.hebbian_load(16, 64, 32, 5).value.tolist() == capacity.hebbian_load(16, 64, 32, [5]).value.tolist()


def test_load_refusals() -> None:
    with pytest.raises(ValueError, match="above the age"):
        capacity.hebbian_load(16, 16, 10, [3], age=3)
    with pytest.raises(ValueError, match="decay lies above 0"):
        capacity.hebbian_load(16, 16, 10, decay=0)
    with pytest.raises(ValueError, match="vocabulary 2"):
        capacity.hebbian_load(16, 16, 1)


def test_effective_bits() -> None:
    found = capacity.effective_bits([4, 8, 16], [1.0, 0.95, 0.75], 64, trials=100, elements=100)
    # 0.9 lies a quarter of the way from 8 to 16.
    assert found.columns["effective_length"].item() == pytest.approx(10)
    assert found.columns["effective_bits"].item() == pytest.approx(60)
    assert found.columns["efficiency"].item() == pytest.approx(60 / 3200)
    assert found.columns["effective_bits_low"] < 60 < found.columns["effective_bits_high"]
    assert found.columns["reached"] == 1
    never = capacity.effective_bits([4, 8], [1.0, 1.0], 64)
    assert never.columns["effective_bits"].item() == pytest.approx(48)
    assert never.columns["reached"] == 0
    assert capacity.effective_bits([4, 8], [0.5, 0.1], 64).columns["effective_bits"] == 0
    with pytest.raises(ValueError, match="increasing"):
        capacity.effective_bits([8, 4], [1, 1], 64)
    with pytest.raises(ValueError, match="between 0 and 1"):
        capacity.effective_bits([4], [1.5], 64)


def test_the_copy_bound_is_that_of_counting_states() -> None:
    found = capacity.effective_bits([2, 10, 12], [1, 0.5, 0.1], 8, elements=10, bits=3)
    torch.testing.assert_close(found.control["bound"], torch.tensor([1, 1, 2.0 ** (30 - 36)], dtype=torch.float64))


def test_random_writes_fill_the_state_as_the_null_says() -> None:
    generator = torch.Generator().manual_seed(0)
    t, a = 300, 0.95
    draw = [torch.randn(30, t, 2, k, generator=generator, dtype=torch.float64) for k in (16, 8)]
    decay = torch.full((30, t, 2, 1), math.log(a), dtype=torch.float64)
    rec = Recurrence(ScanInputs(value=draw[0], write=draw[1], read=draw[1], log_decay=decay))
    at = range(100, 300, 10)
    found = capacity.rank_statistics(rec, at)
    energy = torch.linalg.svdvals(rec.states(at)).square()
    # The formula is a ratio of expectations.
    ratio = energy.sum(-1).square().mean() / energy.square().sum(-1).mean()
    assert ratio.item() == pytest.approx(found.control["null"].mean().item(), rel=0.05)
    assert found.value.mean().item() == pytest.approx(ratio.item(), rel=0.15)
    assert found.columns["mean_energy"].max() < 0.1


def test_bits_that_a_model_copies() -> None:
    lens = ssmlens.load("organism-copy")
    found = capacity.copied_bits(lens, [4, 8, 24], trials=60)
    assert found.value[0] == 1
    assert found.value[2] < 0.5
    assert 32 <= found.columns["effective_bits"].item() < 96
    # Two layers of 4 x 32 x 16 numbers, and three inputs of 160 channels in each convolution.
    assert found.settings["elements"] == 2 * (4 * 32 * 16 + 3 * 160)
    logits = lens.trace(Copy(8, 16).batch(60, 0).ids).logits
    right = (logits[:, 8:, 1:17].argmax(-1) + 1 == Copy(8, 16).batch(60, 0).targets[:, 8:]).double()
    assert found.columns["each"][1].item() == pytest.approx(right.mean().item())
    assert (found.value <= found.control["bound"]).all()
    with pytest.raises(ValueError, match="do not fit a vocabulary of 17"):
        capacity.copied_bits(lens, [4], 64)
