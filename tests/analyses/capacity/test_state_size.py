"""Effective state size against the dense matrix, by a definition written out plainly."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_mamba2

import ssmlens
from ssmlens.analyses import capacity
from ssmlens.analyses.capacity.checks import random_recurrence
from ssmlens.kernels import naive
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.recurrence import Recurrence

FORMS = ("scalar", "per-state", "scalar reset", "per-state reset", "delta", "delta per-state reset")


def plain_entropy(values: list[float]) -> float:
    total = sum(values)
    if total == 0:
        return 0.0  # nothing passes
    return math.exp(-sum(s / total * math.log(s / total) for s in values if s > 0))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_recurrence_equals_the_dense_block(form: str) -> None:
    rec = random_recurrence(form, length=30)
    cuts = [1, 2, 7, 15, 28, 29]
    found = capacity.effective_state_size(rec, cuts, tolerance=1e-2)
    spectra = capacity.hankel(rec, cuts).value
    matrix = naive.attention(rec.inputs)
    for b in range(2):
        for h in range(4):
            for k, i in enumerate(cuts):
                exact = torch.linalg.svdvals(matrix[b, h, i:, :i])[: rec.d_state]
                ours = spectra[b, h, k]
                assert (ours[: len(exact)] - exact).abs().max() <= 1e-10 * exact[0]
                assert not ours[len(exact) :].any()
                assert found.value[b, h, k].item() == pytest.approx(plain_entropy(exact.tolist()), abs=1e-10)
                assert found.columns["tolerance"][b, h, k] == (exact > 1e-2).sum()
                assert found.columns["relative"][b, h, k] == (exact > 1e-2 * exact[0]).sum()
                assert found.control["rank_bound"][b, h, k] == min(i, 30 - i, rec.d_state)


def test_cuts_do_not_depend_on_each_other() -> None:
    rec = random_recurrence("per-state")
    every = capacity.effective_state_size(rec, "all").value
    alone = torch.cat([capacity.effective_state_size(rec, i).value for i in range(1, rec.length)], dim=-1)
    torch.testing.assert_close(every, alone, rtol=1e-12, atol=1e-12)


def test_float32_recurrences_are_decomposed_in_float64() -> None:
    rec = random_recurrence("scalar")
    short = Recurrence(rec.inputs.cast(torch.float32))
    matrix = naive.attention(short.inputs.cast(torch.float64))
    exact = capacity.effective_state_size(matrix, 20).value
    torch.testing.assert_close(capacity.effective_state_size(short, 20).value, exact, rtol=1e-10, atol=1e-10)


def test_padding_neither_counts_nor_disturbs() -> None:
    rec = random_recurrence("scalar", length=20)
    padded = Recurrence(rec.inputs, lengths=torch.tensor([20, 13]))
    found = capacity.effective_state_size(padded, [6, 12, 16]).value
    alone = capacity.effective_state_size(Recurrence(rec.inputs.map(lambda x: x[:, :13] if x.ndim > 2 else x)), [6, 12])
    torch.testing.assert_close(found[1, :, :2], alone.value[1], rtol=1e-12, atol=1e-12)
    assert found[1, :, 2].isnan().all()
    assert found[0].isfinite().all()


def test_one_head_and_one_channel_per_state_as_in_mamba1() -> None:
    lens = ssmlens.load("mamba1-recall", dtype=torch.float64)
    trace = lens.trace("c 7 a 19 . . a . c . .")
    found = capacity.effective_state_size(trace, 5)
    assert found.dims == ("layer", "batch", "head", "cut")
    matrix = trace[1].recurrence.attention.dense(heads=[0, 3])
    exact = capacity.effective_state_size(matrix, 5).value
    torch.testing.assert_close(found.value[1, :, [0, 3]], exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("form", "expected"), [("entropy", 3.0), ("tolerance", 2.0), ("relative", 3.0), ("rank", 3.0)])
def test_forms_count_what_their_names_say(form: str, expected: float) -> None:
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    matrix[3:, :3] = torch.diag(torch.tensor([2.0, 2.0, 2.0] if form == "entropy" else [2.0, 1.0, 0.5]))
    tolerance = 0.2 if form == "relative" else 0.6
    assert capacity.effective_state_size(matrix, 3, form=form, tolerance=tolerance).value.item() == pytest.approx(
        expected
    )


def test_zero_blocks_have_no_size() -> None:
    rec = random_recurrence("scalar")
    inputs = rec.inputs.replace(reset=torch.arange(rec.length).expand(2, -1) == 10)
    found = capacity.effective_state_size(Recurrence(inputs), [10])
    for form in capacity.FORMS:
        assert not found.columns[form].any()


def test_axes_of_a_matrix() -> None:
    ones = torch.ones(8, 8).tril()
    assert capacity.effective_state_size(ones).dims == ("cut",)
    assert capacity.effective_state_size(ones.expand(3, 8, 8)).dims == ("head", "cut")
    assert capacity.effective_state_size(ones.expand(2, 3, 8, 8).numpy(), 4).dims == ("batch", "head", "cut")


def test_default_cuts_leave_room_for_the_state() -> None:
    rec = random_recurrence("scalar", length=48, d_state=6)
    cuts = capacity.effective_state_size(rec).coords["cut"]
    assert len(cuts) == 16
    assert (min(cuts), max(cuts)) == (6, 42)


def test_cuts_and_matrices_may_be_given_in_many_ways() -> None:
    rec = random_recurrence("scalar", length=12)
    one = capacity.effective_state_size(rec, 5).value
    for cut in (np.int64(5), torch.tensor(5), torch.tensor([5]), (5,), range(5, 6)):
        assert torch.equal(capacity.effective_state_size(rec, cut).value, one)
    assert capacity.effective_state_size([[1.0, 0.0], [1.0, 1.0]], form="rank").value.tolist() == [1]


def test_refusals() -> None:
    rec = random_recurrence("scalar", length=12)
    with pytest.raises(ValueError, match="choose one of entropy, tolerance, relative, rank"):
        capacity.effective_state_size(rec, form="size")
    with pytest.raises(ValueError, match="cuts 1 to 11"):
        capacity.effective_state_size(rec, 12)
    with pytest.raises(ValueError, match="t = s"):
        capacity.effective_state_size(torch.ones(3, 4))
    with pytest.raises(ValueError, match="NaN"):
        capacity.hankel(torch.full((3, 3), torch.nan))
    with pytest.raises(ValueError, match="writes or reads of the recurrence hold NaN"):
        capacity.effective_state_size(Recurrence(replace(rec.inputs, read=rec.inputs.read * torch.nan)))
    with pytest.raises(ValueError, match="one token"):
        capacity.effective_state_size(torch.ones(1, 1))
    with pytest.raises(ValueError, match="above 0"):
        capacity.effective_state_size(rec, tolerance=0)


def test_summary_has_a_row_for_each_layer() -> None:
    lens = ssmlens.load(tiny_mamba2())
    found = capacity.summary(lens.trace(list(range(3, 43))))
    assert found.dims == ("layer", "batch")
    assert (found.value <= found.control["rank_bound"]).all()
    rank = capacity.effective_state_size(lens.trace(list(range(3, 43))), 20)
    assert found.value[2, 0] == rank.value[2, 0, :, 0].median()


def test_a_wide_layer_is_quick() -> None:
    # The promise is 10 s on two cores; here one core and a busy machine, hence the time of the process itself.
    generator = torch.Generator().manual_seed(0)
    t, h, n = 512, 24, 128
    inputs = ScanInputs(
        value=torch.randn(1, t, h, 64, generator=generator),
        write=torch.randn(1, t, 1, n, generator=generator),
        read=torch.randn(1, t, 1, n, generator=generator),
        dt=torch.rand(1, t, h, generator=generator) * 0.1,
        A=-torch.rand(h, 1, generator=generator) * 4,
    )
    start = time.process_time()
    found = capacity.effective_state_size(Recurrence(inputs))
    assert time.process_time() - start < 20
    assert found.shape == (1, 24, 16)
