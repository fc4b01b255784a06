"""Window by difference, rescaled decays and writes, and clipped norms, against plain loops."""

from __future__ import annotations

import math

import memory_cases as cases
import pytest
import torch

import ssmlens
from ssmlens import zoo
from ssmlens.analyses import memory
from ssmlens.kernels import naive


@pytest.mark.parametrize("width", [1, 4, 30])
@pytest.mark.parametrize("form", cases.FORMS)
def test_a_window_is_a_fresh_run(form: str, width: int) -> None:
    rec = cases.random(form, lengths=[23, 17])
    found = memory.window_by_difference(rec, width)
    for b, n in enumerate((23, 17)):
        for t in range(n):
            start = max(0, t - width + 1)
            fresh = naive.run(rec.inputs.slice(start, t + 1).replace(initial=None))[1][b]
            torch.testing.assert_close(found.value[b, t], fresh, rtol=0, atol=1e-12)
    assert found.value[1, 17:].isnan().all()


def test_what_came_before_the_text_is_outside_the_window() -> None:
    rec = cases.random("per-state")
    carried = cases.Recurrence(rec.inputs.replace(initial=torch.full((2, 3, 2, 4), 5.0, dtype=torch.float64)))
    torch.testing.assert_close(
        memory.window_by_difference(carried, 30, at=[0, 9, -1]).value,
        memory.window_by_difference(rec, 30, at=[0, 9, -1]).value,
        rtol=0,
        atol=1e-12,
    )


def test_digits_are_lost_where_little_decays() -> None:
    slow, fast = (memory.window_by_difference(cases.constant(a, 2000), 2, at=[-1]) for a in (0.99999, 0.5))
    assert slow.columns["lost_digits"].item() == pytest.approx(math.log10(1980 / 2), abs=0.01)
    assert fast.columns["lost_digits"].item() < 0.2
    assert slow.control["whole_norm"].item() == pytest.approx((1 - 0.99999**2000) / 1e-5, rel=1e-9)


def test_a_shipped_layer_in_float32() -> None:
    mixer = ssmlens.load("mamba2-recall").trace(zoo.passage("mamba2-recall"))[1]
    found = memory.window_by_difference(mixer, 5, at=[-1])
    rec, last = mixer.recurrence, mixer.recurrence.length
    fresh = naive.run(rec.inputs.slice(last - 5, last))[1][0].double()
    torch.testing.assert_close(found.value[0, 0], fresh, rtol=0, atol=1e-5 * float(fresh.abs().max()))


@pytest.mark.parametrize("form", cases.FORMS)
def test_rescaled_decays_and_writes(form: str) -> None:
    rec = cases.random(form)
    changed = memory.rescaled(rec, forget=2.0, insert=0.5)
    torch.testing.assert_close(changed.log_decay, 2 * rec.log_decay)
    torch.testing.assert_close(changed.write, rec.write / 2)
    torch.testing.assert_close(memory.half_life(changed).value, memory.half_life(rec).value / 2)
    state = torch.zeros(2, 3, 2, 4, dtype=torch.float64)
    for t in range(rec.length):
        write = rec.value[:, t, ..., None] * rec.write[:, t, :, None] / 2
        state = torch.exp(2 * rec.log_decay[:, t])[:, :, None] * state + write
    torch.testing.assert_close(changed.final_state(), state)
    with pytest.raises(ValueError, match="forget is a number"):
        memory.rescaled(rec, forget=-1)


def test_clipped_norms_by_a_plain_loop() -> None:
    rec = cases.random("scalar", lengths=[23, 17])
    limit = 0.2
    found = memory.norm_clip(rec, limit)
    state, kept = torch.zeros(3, 2, 4, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for t in range(17):
        write = rec.value[1, t, ..., None] * rec.write[1, t, :, None]
        state = torch.exp(rec.log_decay[1, t])[..., None] * state + write
        for h in range(3):
            size = state[h].norm()
            if size > limit:
                state[h] *= limit / size
                kept[h] *= limit / size
        torch.testing.assert_close(found.value[1, t], state.norm(dim=(-2, -1)))
        torch.testing.assert_close(found.columns["kept"][1, t], kept)
    assert found.value[1, 17:].isnan().all()
    assert found.columns["clipped"][0].sum() > 0
    real = found.value.isfinite()
    assert (found.value[real] <= limit * (1 + 1e-12)).all()
    torch.testing.assert_close(memory.norm_clip(rec, 1e9).value, found.control["whole_norm"], equal_nan=True)


def test_refusals() -> None:
    rec = cases.random("scalar")
    with pytest.raises(ValueError, match="width is a whole number"):
        memory.window_by_difference(rec, 0)
    with pytest.raises(ValueError, match="does not exist"):
        memory.window_by_difference(rec, 2, at=[99])
    with pytest.raises(ValueError, match="limit is a norm"):
        memory.norm_clip(rec, 0)
    erase = torch.zeros(2, 23, 1, 4, dtype=torch.float64)
    delta = cases.Recurrence(rec.inputs.replace(erase_read=erase, erase_write=erase))
    with pytest.raises(ValueError, match="delta rule"):
        memory.window_by_difference(delta, 2)
    with pytest.raises(ValueError, match="delta rule"):
        memory.norm_clip(delta, 1)
    with pytest.raises(ValueError, match="one layer"):
        memory.norm_clip(ssmlens.load("mamba2-recall").trace("a 3 b 4 . . a"), 1)
