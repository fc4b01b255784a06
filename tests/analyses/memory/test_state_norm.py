"""Norms of states: closed forms, the states themselves, padding, reductions, and stretches of time."""

from __future__ import annotations

import math

import memory_cases as cases
import pytest
import torch
from tolerances import EXACT

from ssmlens.analyses import memory


def test_a_constant_drive() -> None:
    a, length = 0.9, 200
    result = memory.state_norm(cases.constant(a, length))
    assert result.dims == ("batch", "token", "head")
    steps = torch.arange(1, length + 1, dtype=torch.float64)
    norm = (1 - a**steps) / (1 - a)
    torch.testing.assert_close(result.value[0, :, 0], norm, rtol=EXACT, atol=0)
    assert (result.control["write_norm"] == 1).all()
    share = result.columns["kept_share"][0, :, 0]
    assert math.isnan(share[0])
    torch.testing.assert_close(share[1:], torch.full_like(share[1:], a), rtol=EXACT, atol=0)


@pytest.mark.parametrize("form", cases.FORMS)
def test_against_the_states_themselves(form: str) -> None:
    rec = cases.random(form, lengths=[23, 14])
    result = memory.state_norm(rec)
    states = rec.states(impl="naive")
    kept = states[:, :-1] * rec.log_decay[:, 1:, :, None].exp()
    written = rec.value[..., None] * rec.write[..., None, :]
    for b, length in enumerate([23, 14]):
        for found, x in ((result.value, states), (result.control["write_norm"], written)):
            torch.testing.assert_close(found[b, :length], x[b, :length].norm(dim=(-2, -1)), rtol=1e-10, atol=0)
            assert found[b, length:].isnan().all()
        norm = kept[b, : length - 1].norm(dim=(-2, -1))
        torch.testing.assert_close(result.columns["kept_norm"][b, 1:length], norm, rtol=1e-10, atol=0)
        share = norm / result.value[b, : length - 1]
        torch.testing.assert_close(result.columns["kept_share"][b, 1:length], share, rtol=1e-10, atol=0)


@pytest.mark.parametrize("reduce", memory.REDUCTIONS)
def test_chosen_tokens_and_joined_heads(reduce: str) -> None:
    rec = cases.random("per-state", lengths=[23, 14])
    every = memory.state_norm(rec).value
    joined = {
        "none": every,
        "mean": every.mean(-1),
        "median": every.median(-1).values,
        "pooled": every.square().sum(-1).sqrt(),
    }[reduce]
    whole = memory.state_norm(rec, reduce=reduce)
    torch.testing.assert_close(whole.value, joined, rtol=EXACT, atol=0, equal_nan=True)
    some = memory.state_norm(rec, at=[-1, 3, 20], reduce=reduce)
    assert some.coords["token"] == [-1, 3, 20]
    for b, tokens in enumerate([[22, 3, 20], [13, 3, -1]]):
        for i, t in enumerate(tokens):
            expected = joined[b, t] if t >= 0 else torch.full_like(joined[b, 0], torch.nan)
            torch.testing.assert_close(some.value[b, i], expected, rtol=EXACT, atol=0, equal_nan=True)


def test_stretches_of_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rec = cases.random("scalar", lengths=[23, 14])
    whole = [memory.state_norm(rec), memory.state_norm(rec, at=[4, -1])]
    monkeypatch.setattr("ssmlens.kernels.statistics._CPU_BLOCK", 2 * 3 * 2 * 4 * 5)
    for result, other in zip(whole, [memory.state_norm(rec), memory.state_norm(rec, at=[4, -1])], strict=True):
        for name, x in {"value": result.value, **result.columns, **result.control}.items():
            now = {"value": other.value, **other.columns, **other.control}[name]
            torch.testing.assert_close(now, x, rtol=1e-10, atol=0, equal_nan=True)


def test_an_initial_state_is_kept_too() -> None:
    rec = cases.random("per-state")
    initial = torch.ones(2, 3, 2, 4, dtype=torch.float64)
    result = memory.state_norm(cases.Recurrence(rec.inputs.replace(initial=initial)))
    kept = (initial * rec.log_decay[:, 0, :, None].exp()).norm(dim=(-2, -1))
    torch.testing.assert_close(result.columns["kept_norm"][:, 0], kept, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.columns["kept_share"][:, 0], kept / math.sqrt(8), rtol=1e-12, atol=0)


def test_refusals() -> None:
    rec = cases.random("scalar")
    with pytest.raises(ValueError, match="choose one of none, mean, median, pooled"):
        memory.state_norm(rec, reduce="max")
    with pytest.raises(ValueError, match="token 23 does not exist"):
        memory.state_norm(rec, at=[23])
