"""Saturation and onset: the table of known values, the simulated state, and the ends of the scale."""

from __future__ import annotations

import math

import memory_cases as cases
import pytest
import torch
from tolerances import EXACT

from ssmlens.analyses import memory


@pytest.mark.parametrize(("a", "variance", "mean"), [(0.999, 0.983, 0.871), (0.9999, 0.336, 0.185)])
def test_known_saturation(a: float, variance: float, mean: float) -> None:
    result = memory.saturation(cases.constant(a, 10), 2048)
    assert result.value.item() == pytest.approx(mean, abs=5e-4)
    assert result.columns["variance_saturation"].item() == pytest.approx(variance, abs=5e-4)


@pytest.mark.parametrize(("a", "onset"), [(0.999, math.inf), (0.9995, 3230), (0.9999, 2633), (0.99997, 2580)])
def test_known_onset(a: float, onset: float) -> None:
    result = memory.onset_time(cases.constant(a, 10), 2048)
    assert result.value.item() == pytest.approx(onset, abs=0.5)
    assert result.control["no_decay_onset"].item() == 2560


@pytest.mark.parametrize("moment", ["mean", "variance"])
@pytest.mark.parametrize("a", [0.9, 0.98, 0.995, 0.9999])
def test_a_simulated_state_says_the_same(a: float, moment: str) -> None:
    """Drive one state with ones (its mean) or add up independent writes (its variance), token by token."""
    train, delta = 40, 0.25
    keep = a if moment == "mean" else a * a
    level, reached, onset = 0.0, 0.0, math.inf
    for t in range(1, 4000):
        level = keep * level + 1
        reached = level if t == train else reached
        if t > train and level > (1 + delta) * reached:
            onset = t
            break
    rec = cases.constant(a, 10)
    saturation = memory.saturation(rec, train)
    share = saturation.value if moment == "mean" else saturation.columns["variance_saturation"]
    assert share.item() == pytest.approx(reached * (1 - keep), rel=1e-10)
    predicted = memory.onset_time(rec, train, delta=delta, moment=moment).value.item()
    assert math.ceil(predicted) == onset if math.isfinite(onset) else predicted == math.inf


@pytest.mark.parametrize("form", cases.FORMS)
def test_equals_a_plain_loop(form: str) -> None:
    rec = cases.random(form, lengths=[23, 14])
    shape = (2, rec.n_heads, cases.states(rec))
    result, onset = memory.saturation(rec, 3), memory.onset_time(rec, 3)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        log_decay = cases.decays(rec, b, h, n)
        rate = sum(log_decay) / len(log_decay)
        mean = 1 - math.exp(3 * rate)
        index = (b, h) if len(result.shape) == 2 else (b, h, n)
        assert result.value[index].item() == pytest.approx(mean, rel=1e-10)
        assert result.columns["unsaturated"][index].item() == (mean < 0.8)
        time = math.log(1 - 1.25 * mean) / rate if 1.25 * mean < 1 else math.inf
        assert onset.value[index].item() == pytest.approx(time, rel=1e-10)
        assert time >= 1.25 * 3


def test_without_decay_the_state_never_settles() -> None:
    rec = cases.constant(1.0, 10)
    assert memory.saturation(rec, 2048).value.item() == 0
    assert memory.saturation(rec, 2048).columns["unsaturated"].item() == 1
    assert memory.onset_time(rec, 2048).value.item() == 2560


def test_tiny_and_huge_decays() -> None:
    ones = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    for nats, share, onset in ((1e-18, 2048e-18, 2560.0), (1e9, 1.0, math.inf), (math.inf, 1.0, math.inf)):
        rec = cases.Recurrence(cases.ScanInputs(value=ones, write=ones, read=ones, log_decay=-nats * ones))
        assert memory.saturation(rec, 2048).value.item() == pytest.approx(share, rel=EXACT)
        assert memory.onset_time(rec, 2048).value.item() == pytest.approx(onset, rel=EXACT)


@pytest.mark.parametrize("study", [memory.saturation, memory.onset_time])
def test_refusals(study) -> None:
    rec = cases.random("scalar")
    for bad in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="train_length is a positive number"):
            study(rec, bad)
        with pytest.raises(ValueError, match="delta is a positive number"):
            study(rec, 10, delta=bad)
    with pytest.raises(ValueError, match="choose one of mean, variance"):
        memory.onset_time(rec, 10, moment="median")


@pytest.mark.parametrize("study", [memory.saturation, memory.onset_time])
def test_without_a_training_length_the_text_stands_in(study) -> None:
    rec = cases.constant(0.99, 70)
    found, given = study(rec), study(rec, 70)
    assert torch.equal(found.value, given.value)
    assert found.settings["train_length"] == 70
    assert set(found.assumes) - set(given.assumes) == {
        "No training length was given: the 70 tokens of this text stand in for it."
    }
