"""The precision horizon of heads: counts, errors and predictions against a plain loop, and real models."""

from __future__ import annotations

import math

import memory_cases as cases
import pytest
import torch
from tiny import tiny_mamba1, tiny_mamba2

import ssmlens
from ssmlens.analyses import precision
from ssmlens.analyses.precision.checks import driven
from ssmlens.errors import ReconstructionError
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.recurrence import Recurrence


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn"])
def test_equals_a_plain_loop(form: str, name: str) -> None:
    rec = cases.random(form, length=31, lengths=[31, 17])
    to = precision.format_of(name)
    found = precision.horizon(rec, name)
    log_decay = rec.log_decay.expand(2, 31, 3, -1)
    m = log_decay.shape[-1]
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(m)).tolist():
        length = int(rec.real_lengths[b])
        decays = [math.exp(x) for x in log_decay[b, :length, h, i].tolist()]
        stalls = [1 - a < to.stalls_at_once for a in decays]
        run = longest = 0
        for yes in stalls:
            run = run + 1 if yes else 0
            longest = max(longest, run)
        at = (b, h, i) if "state" in found.dims else (b, h)
        nats = [-math.log(a) for a in decays]
        assert found.value[at].item() == sum(stalls) / length
        assert found.columns["slow_share"][at].item() == sum(1 - a < to.stalls_soon for a in decays) / length
        assert found.columns["longest_stall"][at].item() == longest
        lost = sum(x for x, yes in zip(nats, stalls) if yes) / sum(nats)
        assert found.columns["forgetting_lost"][at].item() == pytest.approx(lost, rel=1e-12, abs=1e-15)
        assert found.columns["half_life"][at].item() == pytest.approx(math.log(2) * length / sum(nats), rel=1e-12)
        error = plain_error(rec, b, h, slice(i, i + 1) if m > 1 else slice(None), to)
        assert found.columns["error"][at].item() == pytest.approx(error, rel=1e-9)


def plain_error(rec: Recurrence, b: int, h: int, states: slice, to) -> float:
    """Relative RMS error of some states of one head, walked with and without rounding."""
    decay = rec.log_decay.expand(*rec.log_decay.shape[:3], rec.d_state)[b, :, h, states].exp()
    exact = short = torch.zeros(rec.head_dim, decay.shape[-1], dtype=torch.float64)
    wrong = size = 0.0
    for t in range(int(rec.real_lengths[b])):
        added = torch.outer(rec.value[b, t, h], rec.write[b, t, h, states])
        exact = decay[t] * exact + added
        short = precision.rounded(decay[t] * short + added, to)
        wrong, size = wrong + (short - exact).square().sum().item(), size + exact.square().sum().item()
    return math.sqrt(wrong / size)


@pytest.mark.parametrize("a", [0.5, 0.9, 0.99])
def test_a_driven_state_is_off_by_the_noise_law(a: float) -> None:
    found = precision.horizon(driven(a, heads=64, length=1200, seed=3), "bfloat16").columns
    law = precision.ROUNDING_NOISE * 2**-8 / math.sqrt(1 - a * a)
    assert found["error"].square().mean().sqrt().item() == pytest.approx(law, rel=0.05)
    assert found["predicted_error"].mean().item() == pytest.approx(law, rel=0.1)


def test_known_errors_of_a_driven_bfloat16_state() -> None:
    for a, known in ((0.9, 0.0036), (0.99, 0.0108)):
        error = precision.horizon(driven(a, seed=1), "bfloat16").columns["error"]
        assert error.square().mean().sqrt().item() == pytest.approx(known, rel=0.1)


def test_a_quiet_stretch_stalls_and_a_stochastic_state_forgets() -> None:
    """One write, and then 2000 tokens of decay 0.999: 86 % should be gone."""
    length, decay = 2000, math.log(0.999)
    ones = torch.ones(1, length, 1, 1, dtype=torch.float64)
    value = torch.zeros(1, length, 1, 64, dtype=torch.float64)
    value[:, 0] = torch.linspace(1, 2, 64, dtype=torch.float64)
    rec = Recurrence(ScanInputs(value=value, write=ones, read=ones, log_decay=ones * decay))
    found = precision.horizon(rec, "bfloat16")
    assert found.value.item() == 1
    assert found.columns["longest_stall"].item() == length
    assert found.columns["forgetting_lost"].item() == 1
    assert found.columns["error"].item() > 0.5
    assert found.control["stochastic_error"].item() < 0.2
    # 1 - a is above the law of float16, so its rounding is no more than noise.
    assert precision.horizon(rec, "float16").columns["error"].item() < 0.1 * found.columns["error"].item()


def test_scaling_spares_eight_bits_over_and_underflow() -> None:
    rec = driven(0.9, heads=4, length=200)
    for factor in (1e-4, 1e4):
        inputs = rec.inputs.replace(value=rec.value * factor, initial=None)
        plain = precision.horizon(Recurrence(inputs), "fp8").columns["error"].min().item()
        scaled = precision.horizon(Recurrence(inputs), "fp8", scaled=True).columns["error"].max().item()
        assert plain > 0.9
        assert scaled < 0.12


def test_padding_changes_nothing() -> None:
    rec = cases.random("scalar", length=23, lengths=[23, 11])
    both, alone = precision.horizon(rec), precision.horizon(cases.single(rec, 1))
    for name in ("error", "predicted_error", "longest_stall", "forgetting_lost", "half_life"):
        assert torch.allclose(both.columns[name][1], alone.columns[name][0], rtol=1e-9), name
    assert torch.equal(both.value[1], alone.value[0])


def test_float32_and_no_measurement() -> None:
    rec = cases.random("per-state")
    found = precision.horizon(rec, "float32")
    assert found.columns["error"].max().item() < 1e-6
    without = precision.horizon(rec, "bfloat16", measure=False)
    assert "error" not in without.columns
    assert not without.control
    assert torch.equal(without.value, precision.horizon(rec, "bfloat16").value)


def test_intervals_hold_the_value() -> None:
    found = precision.horizon(cases.random("scalar", length=60), "float8_e5m2")
    assert bool((found.columns["stalled_low"] <= found.value + 1e-12).all())
    assert bool((found.columns["stalled_high"] >= found.value - 1e-12).all())
    assert bool((found.columns["error_low"] <= found.columns["error"]).all())
    assert bool((found.columns["error_high"] >= found.columns["error"]).all())


@pytest.mark.parametrize("make", [tiny_mamba1, tiny_mamba2])
def test_a_trace_has_a_layer_axis_and_files(make, tmp_path) -> None:
    trace = ssmlens.load(make()).trace(list(range(40)))
    found = precision.horizon(trace, "bfloat16")
    assert found.dims == (("layer", "batch", "head", "state") if make is tiny_mamba1 else ("layer", "batch", "head"))
    assert len(found.table()) == found.value.numel()
    back = type(found).load(found.save(tmp_path / "found.json"))
    assert torch.equal(back.columns["error"], found.columns["error"])
    assert found.settings["dtype_of_state"] == "bfloat16"


@pytest.mark.parametrize("name", ["mamba1-english", "mamba2-english"])
def test_shipped_models_have_heads_beyond_bfloat16(name: str) -> None:
    """Some heads are so slow that a bfloat16 state stalls; the noise law holds for those that are not."""
    trace = ssmlens.load(name).trace(ssmlens.zoo.passage(name), layers=[8, 9])
    found = precision.horizon(trace, "bfloat16")
    ratio = (found.columns["error"] / found.columns["predicted_error"]).flatten()
    fast = (found.columns["slow_share"] == 0).flatten()
    assert found.value.max().item() > 0.5
    assert ratio[fast].nanmedian().item() == pytest.approx(1, abs=0.1)
    assert precision.horizon(trace, "float16", measure=False).value.mean() < found.value.mean()


def test_a_trace_that_is_not_the_model_is_refused() -> None:
    mixer = ssmlens.load(tiny_mamba2()).trace([1, 2, 3])[0]
    object.__setattr__(mixer, "reconstruction_error", 0.5)
    with pytest.raises(ReconstructionError, match="layer 0 was rebuilt with relative error"):
        precision.horizon(mixer)
