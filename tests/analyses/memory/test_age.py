"""Recall against age: the closed form of a leaky unit, plain loops, and real models."""

from __future__ import annotations

import math

import memory_cases as cases
import pytest
import torch
from tiny import tiny_mamba1, tiny_tokenizer

import ssmlens
from ssmlens.analyses import memory
from ssmlens.analyses.memory._age import energy_shares
from ssmlens.recurrence import Recurrence


def test_one_leaky_unit() -> None:
    a, lags, length = 0.8, [0, 1, 2, 4, 8], 4000
    value = torch.randn(1, length, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ones = torch.ones_like(value)
    rec = Recurrence(cases.ScanInputs(value=value, write=ones, read=ones, log_decay=ones * math.log(a)))
    found = memory.recall_by_age(rec, lags=lags)
    exact = torch.tensor([(1 - a * a) * a ** (2 * k) for k in lags], dtype=torch.float64)
    torch.testing.assert_close(found.value, exact, rtol=0, atol=0.05)
    # The energies of 48 places, of squares that spread by sqrt(2): within four standard errors.
    torch.testing.assert_close(found.columns["predicted"], exact, rtol=4 * math.sqrt(2 / 48), atol=0.02)
    assert found.columns["rank_correlation"].item() > 0.85
    # Reads of 1: row t of M is a^k, whose share is (1 - a) a^k / (1 - a^(t + 1)).
    rows = torch.linspace(8, length - 1, 48, dtype=torch.float64).round()
    whole = (1 / (1 - a ** (rows + 1))).mean()
    read = whole * torch.tensor([(1 - a) * a**k for k in lags], dtype=torch.float64)
    torch.testing.assert_close(found.columns["read"], read, rtol=1e-9, atol=0)


def test_constant_writes_are_shared_out_exactly() -> None:
    a, lags = 0.9, [0, 1, 5, 20]
    found = energy_shares(cases.constant(a, 400), 0, torch.tensor([399, 398]), lags)
    exact = torch.tensor([[(1 - a * a) * a ** (2 * k) for k in lags]], dtype=torch.float64)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=0)


@pytest.mark.parametrize("form", cases.FORMS)
def test_shares_by_plain_loops(form: str) -> None:
    rec = cases.random(form, lengths=[23, 17])
    found = energy_shares(rec, 1, torch.tensor([9, 16]), [0, 2, 5])
    for h in range(3):
        for i, k in enumerate((0, 2, 5)):
            shares = []
            for t in (9, 16):
                left = []
                for s in range(t + 1):
                    decay = torch.exp(rec.log_decay[1, s + 1 : t + 1, h].sum(0))
                    left.append(float((decay * torch.outer(rec.value[1, s, h], rec.write[1, s, h])).square().sum()))
                shares.append(left[t - k] / sum(left))
            assert found[h, i].item() == pytest.approx(sum(shares) / 2, rel=1e-10)


def test_a_trace_has_a_curve_for_each_layer() -> None:
    lens = ssmlens.load(tiny_mamba1(hidden_size=16, state_size=4), tokenizer=tiny_tokenizer(), dtype=torch.float64)
    ids = torch.randint(0, 256, (8, 40), generator=torch.Generator().manual_seed(0))
    found = memory.recall_by_age(lens.trace(ids), lags=[0, 1, 2, 4, 8])
    assert found.dims == ("layer", "lag")
    assert found.columns["predicted"].shape == (3, 5)
    assert (found.columns["predicted_best"] >= found.columns["predicted"]).all()
    assert found.columns["rank_correlation"].shape == (3, 1)
