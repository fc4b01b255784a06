"""Retention: exp of the summed log decay between a write and a reading."""

from __future__ import annotations

import math

import memory_cases as cases
import pytest
import torch
from tolerances import EXACT

from ssmlens.analyses import memory


@pytest.mark.parametrize("a", [0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize(("s", "t"), [(0, 0), (0, 1), (3, 40), (0, 63)])
def test_constant_decay(a: float, s: int, t: int) -> None:
    kept = memory.retention(cases.constant(a, 64), s, t)
    assert kept.dims == ("batch", "head")
    assert kept.value.item() == pytest.approx(a ** (t - s), rel=EXACT)
    assert kept.control["mean_decay_retention"].item() == pytest.approx(a ** (t - s), rel=EXACT)


@pytest.mark.parametrize("form", cases.FORMS)
def test_equals_a_plain_loop(form: str) -> None:
    rec = cases.random(form)
    kept = memory.retention(rec, 4, 17).value.reshape(rec.batch, rec.n_heads, -1)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, kept.shape)).tolist():
        left = 1.0
        for x in cases.decays(rec, b, h, n)[5:18]:
            left *= math.exp(x)
        assert kept[b, h, n].item() == pytest.approx(left, rel=EXACT)


def test_a_write_is_whole_when_it_is_made() -> None:
    assert (memory.retention(cases.random("per-state"), 7, 7).value == 1).all()


def test_retentions_multiply_along_time() -> None:
    rec = cases.random("per-state")
    whole, first, second = (memory.retention(rec, s, t).value for s, t in ((2, 20), (2, 9), (9, 20)))
    torch.testing.assert_close(whole, first * second, rtol=EXACT, atol=0)


@pytest.mark.parametrize("form", ["per-state", "explicit"])
def test_what_one_huge_step_forgets_is_gone_and_later_steps_still_count(form: str) -> None:
    rec = cases.random(form, batch=1)
    name = "dt" if form == "per-state" else "log_decay"
    step = getattr(rec.inputs, name).clone()
    step[:, 10] = 1e30 if name == "dt" else -torch.inf
    huge = cases.Recurrence(rec.inputs.replace(**{name: step}))
    assert (memory.retention(huge, 4, 17).value == 0).all()
    after = memory.retention(huge, 10, 17).value
    torch.testing.assert_close(after, memory.retention(rec, 10, 17).value, rtol=1e-9, atol=0)


def test_tiny_decays_survive_many_large_ones() -> None:
    # A plain float32 sum of 4096 steps of -0.5 cannot resolve one step of -1e-5.
    log_decay = torch.full((1, 4096, 1, 1), -0.5, dtype=torch.float32)
    log_decay[:, -1] = -1e-5
    ones = torch.ones(1, 4096, 1, 1)
    rec = cases.Recurrence(cases.ScanInputs(value=ones, write=ones, read=ones, log_decay=log_decay))
    nats = memory.retention(rec, -2, -1).columns["log_retention"].item()
    assert nats == pytest.approx(-1e-5, rel=1e-6)


def test_a_packed_boundary_forgets_everything() -> None:
    reset = torch.zeros(2, 23, dtype=torch.bool)
    reset[0, 10] = True
    for form in cases.FORMS:
        plain = cases.random(form)
        packed = cases.Recurrence(plain.inputs.replace(reset=reset))
        across, plainly = memory.retention(packed, 4, 17).value, memory.retention(plain, 4, 17).value
        assert (across[0] == 0).all()
        torch.testing.assert_close(across[1], plainly[1], rtol=EXACT, atol=0)


def test_a_state_without_decay_forgets_at_a_boundary_too() -> None:
    rec = cases.random("per-state")
    A = rec.inputs.A.clone()
    A[:, 0] = 0
    reset = torch.zeros(2, 23, dtype=torch.bool)
    reset[:, 10] = True
    kept = memory.retention(cases.Recurrence(rec.inputs.replace(A=A, reset=reset)), 4, 17).value
    assert (kept == 0).all()


def test_rows_that_are_too_short_are_nan_and_negative_tokens_count_in_each_row() -> None:
    rec = cases.random("scalar", lengths=[23, 12])
    assert memory.retention(rec, 3, 15).value[0].isfinite().all()
    assert memory.retention(rec, 3, 15).value[1].isnan().all()
    last = memory.retention(rec, 3, -1).value
    torch.testing.assert_close(last[:1], memory.retention(rec, 3, 22).value[:1])
    torch.testing.assert_close(last[1:], memory.retention(rec, 3, 11).value[1:])


def test_refusals() -> None:
    rec = cases.random("scalar")
    with pytest.raises(ValueError, match="t=3 comes before s=4"):
        memory.retention(rec, 4, 3)
    with pytest.raises(ValueError, match="token 23 does not exist: the longest row has tokens 0 to 22"):
        memory.retention(rec, 4, 23)
