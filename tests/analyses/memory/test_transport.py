"""Survival and addressability of single writes: closed forms, plain loops, the control, and real models."""

from __future__ import annotations

import math

import memory_cases as cases
import pytest
import torch
from tiny import tiny_mamba1, tiny_tokenizer
from tolerances import EXACT

import ssmlens
from ssmlens.analyses import memory
from ssmlens.kernels import naive
from ssmlens.recurrence import Recurrence


@pytest.mark.parametrize("a", [0.5, 0.99])
def test_one_write(a: float) -> None:
    rec = cases.constant(a, 200)
    value = torch.zeros_like(rec.value)
    value[:, 70] = 3.0
    found = memory.transport(Recurrence(rec.inputs.replace(value=value)), lags=range(0, 60, 5), reads=90)
    # Only tokens that wrote count: lag k is read at token 70 + k alone.
    for k, survival, cosine in zip(range(0, 60, 5), found.value.flatten(), found.columns["addressability"].flatten()):
        assert survival.item() == pytest.approx(a**k, rel=EXACT)
        assert cosine.item() == pytest.approx(1, rel=EXACT)


def test_constant_writes_of_one_direction_are_all_alike() -> None:
    found = memory.transport(cases.constant(0.9, 100), lags=[0, 1, 10])
    assert found.value.flatten().tolist() == pytest.approx([1, 0.9, 0.9**10], rel=EXACT)
    # Nothing tells them apart, and the control says so: a write that was never made points there just as much.
    assert found.columns["addressability"].flatten().tolist() == pytest.approx([1, 1, 1], rel=EXACT)
    assert found.control["absent"].flatten()[1:].tolist() == pytest.approx([1, 1], rel=EXACT)


def test_white_writes_stand_out_by_their_share_of_the_state() -> None:
    # h = sum of a^j w[t-j]: the cosine with a^k w[t-k] is near a^k sqrt(1 - a^2) where writes are isotropic.
    a, g = 0.9, torch.Generator().manual_seed(0)
    value, write = (torch.randn(1, 2000, 1, n, generator=g, dtype=torch.float64) for n in (32, 16))
    log_decay = torch.full((1, 2000, 1, 1), math.log(a), dtype=torch.float64)
    rec = Recurrence(cases.ScanInputs(value=value, write=write, read=write, log_decay=log_decay))
    found = memory.transport(rec, lags=[0, 2, 5, 10], reads=1500)
    for k, cosine in zip((0, 2, 5, 10), found.columns["addressability"].flatten().tolist()):
        assert cosine == pytest.approx(a**k * math.sqrt(1 - a * a), rel=0.03)
    assert found.control["absent"].flatten()[1:].abs().max() < 0.01
    low, high = found.columns["addressability_low"], found.columns["addressability_high"]
    assert (low < found.columns["addressability"]).all()
    assert (found.columns["addressability"] < high).all()
    assert ((high - low) < 0.02).all()


@pytest.mark.parametrize("form", cases.FORMS)
def test_equals_plain_loops(form: str) -> None:
    rec = cases.random(form, lengths=[23, 17])
    lags = [0, 1, 3]
    found = memory.transport(rec, lags=lags, reads=5)
    states = naive.states(rec.inputs)
    for b, n in enumerate((23, 17)):
        where = torch.linspace(3, n - 4, 5, dtype=torch.float64).round().long().tolist()
        for h in range(3):
            for i, k in enumerate(lags):
                survival, cosine, absent = [], [], []
                for t in where:
                    decay = torch.exp(rec.log_decay[b, t - k + 1 : t + 1, h].sum(0))
                    w = torch.outer(rec.value[b, t - k, h], rec.write[b, t - k, h])
                    survival.append(float((decay * w).norm() / w.norm()))
                    state = states[b, t, h]
                    cosine.append(float((decay * w * state).sum() / (decay * w).norm() / state.norm()))
                    v = decay * torch.outer(rec.value[b, t + k, h], rec.write[b, t + k, h])
                    absent.append(float((v * state).sum() / v.norm() / state.norm()))
                assert found.value[b, h, i].item() == pytest.approx(sum(survival) / 5, rel=1e-10)
                assert found.columns["addressability"][b, h, i].item() == pytest.approx(sum(cosine) / 5, rel=1e-10)
                if k:
                    assert found.control["absent"][b, h, i].item() == pytest.approx(sum(absent) / 5, rel=1e-10)


def test_a_trace_and_its_layers() -> None:
    lens = ssmlens.load(tiny_mamba1(), tokenizer=tiny_tokenizer(), dtype=torch.float64)
    trace = lens.trace(["The cat sat on the mat. " * 3, "It rained and it rained."])
    found = memory.transport(trace, lags=[0, 1, 5], reads=8, repeats=50)
    assert found.dims == ("layer", "batch", "head", "lag")
    torch.testing.assert_close(found.value[..., 0], torch.ones(3, 2, 64, dtype=torch.float64))
    assert found.value.min() >= 0
    assert found.value.max() <= 1
    alone = memory.transport(trace[2], lags=[0, 1, 5], reads=8, repeats=50)
    torch.testing.assert_close(found.value[2], alone.value)
    with pytest.raises(ValueError, match="before and after it"):
        memory.transport(trace, lags=[0, 20])
