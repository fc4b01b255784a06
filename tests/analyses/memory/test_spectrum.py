"""Time constants, modes of a state matrix, and local and global channels."""

from __future__ import annotations

import math

import memory_cases as cases
import pytest
import torch
from tolerances import EXACT

import ssmlens
from ssmlens import zoo
from ssmlens.analyses import memory


def several(decays: list[float], length: int = 400) -> cases.Recurrence:
    """One head for each constant decay."""
    ones = torch.ones(1, length, len(decays), 1, dtype=torch.float64)
    log_decay = ones * torch.tensor(decays, dtype=torch.float64).log()[:, None]
    one = ones[:, :, :1]
    return cases.Recurrence(cases.ScanInputs(value=ones, write=one, read=one, log_decay=log_decay))


def test_constant_decays_are_sorted_from_slow_to_fast() -> None:
    decays = [0.5, 0.999, 0.9, 0.99]
    found = memory.timescale_spectrum(several(decays))
    assert found.columns["head"][0].tolist() == [1, 3, 2, 0]
    for a, tau, half, slow, fast, held, energy in zip(
        sorted(decays, reverse=True),
        *(found.value[0], *(found.columns[k][0] for k in _COLUMNS)),
    ):
        for x in (tau, slow, fast):
            assert x.item() == pytest.approx(1 / -math.log(a), rel=EXACT)
        assert half.item() == pytest.approx(math.log(2) / -math.log(a), rel=EXACT)
        assert held.item() == pytest.approx(1 / (1 - a), rel=1e-10)
        assert energy.item() == pytest.approx((1 + a * a) / (1 - a * a), rel=1e-10)


_COLUMNS = ("half_life", "slowest", "fastest", "writes_held", "energy_held")


@pytest.mark.parametrize("form", cases.FORMS)
def test_equals_the_half_lives_in_another_order(form: str) -> None:
    rec = cases.random(form, lengths=[23, 14])
    found = memory.timescale_spectrum(rec, windows=3)
    lives = memory.half_life(rec).value.flatten(1)
    torch.testing.assert_close(found.columns["half_life"], lives.sort(1, descending=True).values)
    states = cases.states(rec)
    index = (found.columns["head"] * states + found.columns["state"]).long()
    torch.testing.assert_close(lives.gather(1, index), found.columns["half_life"])
    assert (found.columns["fastest"] <= found.columns["slowest"]).all()


def test_windows_show_what_the_mean_hides() -> None:
    rec = several([0.9])
    log_decay = rec.inputs.log_decay.clone()
    log_decay[:, :200] = math.log(0.5)
    found = memory.timescale_spectrum(cases.Recurrence(rec.inputs.replace(log_decay=log_decay)), windows=2)
    assert found.columns["fastest"].item() == pytest.approx(1 / math.log(2), rel=EXACT)
    assert found.columns["slowest"].item() == pytest.approx(-1 / math.log(0.9), rel=EXACT)
    with pytest.raises(ValueError, match="1 to 400 windows"):
        memory.timescale_spectrum(rec, windows=401)


def test_modes_of_s4d() -> None:
    # S4D-Lin: -1/2 + i pi n. All of one half-life, periods 2 / n.
    n = torch.arange(4)
    lin = memory.modes(torch.complex(torch.full((4,), -0.5), math.pi * n), dt=0.01)
    torch.testing.assert_close(lin.value, torch.full((1, 4), 200.0, dtype=torch.float64))
    assert lin.columns["period"][0, 0] == math.inf
    torch.testing.assert_close(lin.columns["period"][0, 1:], 200.0 / n[1:].double())
    torch.testing.assert_close(lin.columns["quality"][0], math.pi * n.double())
    # S4D-Real: -(n + 1), time constants from 1 / dt down to 1 / (N dt).
    real = memory.modes(-(n.double() + 1), dt=0.1)
    torch.testing.assert_close(real.value[0], 10 / (n.double() + 1))
    torch.testing.assert_close(real.columns["half_life"], real.value * math.log(2))
    many = memory.modes(-torch.ones(3, 4), dt=torch.tensor([1.0, 0.1, 0.01])[:, None])
    torch.testing.assert_close(many.value[:, 0], torch.tensor([1.0, 10.0, 100.0]).double(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="0 or less"):
        memory.modes(torch.tensor([0.1]))
    with pytest.raises(ValueError, match="steps above 0"):
        memory.modes(torch.tensor([-0.1]), dt=0.0)


def test_rotation_does_not_change_a_half_life() -> None:
    A = -torch.rand(5, generator=torch.Generator().manual_seed(0)).double()
    turned = memory.modes(torch.complex(A, torch.arange(5).double()), dt=0.3)
    torch.testing.assert_close(turned.value, memory.modes(A, dt=0.3).value)


def test_channels_by_decay() -> None:
    # 0.99^100 = 0.37 is left of a write, 0.9^100 = 3e-5.
    found = memory.channel_class(several([0.99, 0.9, 1.0]), 100)
    assert found.value[0].tolist() == [1, 0, 1]
    expected = [100 * math.log(0.99), 100 * math.log(0.9), 0]
    assert found.columns["log_left"][0].tolist() == pytest.approx(expected, rel=EXACT)
    assert found.control["log_threshold"][0, 0] == pytest.approx(math.log(1e-2))
    assert memory.channel_class(several([0.99, 0.9, 1.0]), 100, threshold=0.5).value[0].tolist() == [0, 0, 1]
    # The text is four training sequences long, and the clock ran four times as far where it runs at all.
    assert found.columns["dt_ratio"][0].tolist() == pytest.approx([4, 4, 1], rel=1e-10)


def test_the_slowest_state_decides() -> None:
    rec = cases.random("per-state")
    found = memory.channel_class(rec, 30)
    left = 30 * rec.log_decay.mean(1)
    torch.testing.assert_close(found.columns["log_left"], left.amax(2))
    ratio = rec.inputs.dt.sum(1) / rec.inputs.dt[:, :10].sum(1)
    torch.testing.assert_close(memory.channel_class(rec, 10).columns["dt_ratio"], ratio)


def test_channels_by_distance() -> None:
    found = memory.channel_class(several([0.5, 0.99, 0.9, 0.8, 0.7]), by="distance", share=0.2)
    assert found.value[0].tolist() == [0, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="unknown criterion"):
        memory.channel_class(several([0.5]), by="norm")
    with pytest.raises(ValueError, match="between 0 and 1"):
        memory.channel_class(several([0.5]), threshold=2)


@pytest.mark.parametrize("name", zoo.names())
def test_shipped_models(name: str) -> None:
    trace = ssmlens.load(name).trace(zoo.passage(name))
    spectrum = memory.timescale_spectrum(trace, windows=2)
    assert (spectrum.value > 0).all()
    assert (spectrum.value.diff(dim=-1) <= 0).all()
    kinds = memory.channel_class(trace, 512)
    assert set(kinds.value.flatten().tolist()) <= {0.0, 1.0}
