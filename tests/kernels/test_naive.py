"""The truth itself, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from scan_cases import DECAYS, Case, make, relative_error
from tolerances import EXACT

from ssmlens.kernels import naive
from ssmlens.kernels.inputs import ScanInputs


def ones(t: int, n: int = 1, log_decay: float = 0.0, **pieces: torch.Tensor) -> ScanInputs:
    one = torch.ones(1, t, 1, n, dtype=torch.float64)
    decay = torch.full((1, t, 1, 1), log_decay, dtype=torch.float64)
    return ScanInputs(value=one[..., :1], write=one, read=one, log_decay=decay, **pieces)


def test_constant_decay_is_a_geometric_series():
    a, t = 0.9, 50
    y, final = naive.run(ones(t, log_decay=math.log(a)))
    series = (1 - a ** torch.arange(1, t + 1, dtype=torch.float64)) / (1 - a)
    assert relative_error(y[0, :, 0, 0], series) < EXACT
    assert relative_error(final.flatten(), series[-1:]) < EXACT


def test_no_decay_is_a_cumulative_sum():
    x = make(Case(t=40, p=2, n=3, g=4)).replace(
        dt=None, A=None, log_decay=torch.zeros(2, 40, 4, 1, dtype=torch.float64)
    )
    outer = x.value[..., None] * x.write[..., None, :]
    assert relative_error(naive.states(x), outer.cumsum(1)) < EXACT


def test_one_token_is_one_outer_product():
    x = make(Case(t=1, initial=True, decay="dt*A state"))
    decay = (x.dt[:, 0, :, None] * x.A).exp()
    write = (x.write.repeat_interleave(2, 2) * x.dt[..., None])[:, 0]
    state = x.initial * decay[:, :, None] + x.value[:, 0, :, :, None] * write[:, :, None]
    y, final = naive.run(x)
    assert relative_error(final, state) < EXACT
    assert relative_error(y[:, 0], (state * x.read.repeat_interleave(2, 2)[:, 0, :, None]).sum(-1)) < EXACT


def test_a_reset_starts_anew():
    x = make(Case(t=12, initial=True))
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[:, 5] = True
    y, final = naive.run(x.replace(reset=reset))
    tail, tail_final = naive.run(x.slice(5, 12))
    assert torch.equal(y[:, 5:], tail)
    assert torch.equal(final, tail_final)


def test_the_delta_rule_overwrites_what_a_key_held():
    key = torch.tensor([0.6, 0.8], dtype=torch.float64).expand(1, 3, 1, 2)
    value = torch.tensor([1.0, 5.0, -2.0], dtype=torch.float64).view(1, 3, 1, 1)
    x = ones(3, n=2).replace(value=value, write=key, read=key, erase_read=key, erase_write=key)
    y, final = naive.run(x)
    assert relative_error(y, value) < EXACT
    assert relative_error(final[0, 0, 0], value[0, -1, 0] * key[0, 0, 0]) < EXACT


@pytest.mark.parametrize("decay", DECAYS)
def test_attention_is_the_closed_sum(decay: str):
    x = make(Case(t=7, h=2, g=1, n=3, decay=decay, reset=True))
    log_decay, write = x.full_log_decay(), x.full_write()
    found = naive.attention(x)
    for t in range(7):
        for s in range(7):
            between = log_decay[:, s + 1 : t + 1].sum(1).exp()
            entry = (x.read[:, t] * between * write[:, s]).sum(-1) if s <= t else torch.zeros(2, 2, dtype=torch.float64)
            assert torch.allclose(found[:, :, t, s], entry, rtol=EXACT, atol=EXACT)


def test_no_tokens_keep_the_initial_state():
    x = make(Case(t=0, initial=True))
    y, final = naive.run(x)
    assert y.shape == (2, 0, 4, 3)
    assert torch.equal(final, x.initial)
    assert naive.states(x).shape == (2, 0, 4, 3, 5)
