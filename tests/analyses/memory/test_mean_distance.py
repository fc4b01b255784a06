"""Mean distance: closed forms, plain loops over the naive matrix, padding, and rows that read nothing."""

from __future__ import annotations

import math

import memory_cases as cases
import numpy as np
import pytest
import torch
from tolerances import EXACT

from ssmlens.analyses import memory
from ssmlens.analyses.memory._rows import distance_statistics


def loop_statistics(row: list[float], q: float) -> tuple[float, float, float]:
    """Mean, standard deviation and q-quantile of the distance under abs(row), where the last entry is 0 tokens back."""
    mass = [abs(x) for x in reversed(row)]
    total = sum(mass)
    if total == 0:
        return math.nan, math.nan, math.nan
    mean = sum(d * m for d, m in enumerate(mass)) / total
    spread = math.sqrt(sum((d - mean) ** 2 * m for d, m in enumerate(mass)) / total)
    reached = 0.0
    for d, m in enumerate(mass):
        reached += m
        if reached >= q * total * (1 - 1e-12):
            return mean, spread, float(d)
    raise AssertionError("the whole mass is more than a share of it")


def columns(result: memory.Result) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return result.value, result.columns["spread"], result.columns["distance_q90"]


@pytest.mark.parametrize("a", [0.5, 0.9, 0.98])
def test_geometric_kernel(a: float) -> None:
    length = math.ceil(50 / -math.log(a)) + 1
    result = memory.mean_distance(cases.constant(a, length))
    assert result.dims == ("batch", "head")
    assert result.value.item() == pytest.approx(a / (1 - a), rel=1e-9)
    assert result.columns["spread"].item() == pytest.approx(math.sqrt(a) / (1 - a), rel=1e-9)
    # The share within k tokens is 1 - a^(k + 1).
    assert result.columns["distance_q90"].item() == math.ceil(math.log(0.1) / math.log(a) - 1e-9) - 1


@pytest.mark.parametrize(("depth", "expected"), [(1, 9), (2, 18), (4, 36)])
def test_a_cascade_of_equal_layers_adds_their_distances(depth: int, expected: float) -> None:
    a, length = 0.9, 700
    att = cases.constant(a, length).attention
    kernel = torch.zeros(1, length, 1, 1, dtype=torch.float64)
    kernel[:, 0] = 1
    for _ in range(depth):
        kernel = att.apply(kernel)
    binomial = [math.comb(k + depth - 1, depth - 1) * a**k for k in range(length)]
    np.testing.assert_allclose(kernel.flatten(), binomial, rtol=1e-10)
    mean, _, _ = distance_statistics(kernel.reshape(1, 1, length), 0.9)
    assert mean.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("t", [0, 1, 2, 9, 49])
def test_a_row_that_reads_all_sources_alike_is_its_own_control(t: int) -> None:
    result = memory.mean_distance(cases.constant(1.0, 50), rows=[t])
    for value, name in zip(columns(result), ("uniform_distance", "uniform_spread", "uniform_q90")):
        assert value.item() == pytest.approx(result.control[name].item(), rel=EXACT)
    assert result.value.item() == pytest.approx(t / 2, rel=EXACT)
    fraction = result.columns["fraction_of_uniform"].item()
    assert fraction == pytest.approx(1, rel=EXACT) if t else math.isnan(fraction)


@pytest.mark.parametrize("rows", ["all", [0, 5, -1, 13, 5]])
@pytest.mark.parametrize("form", cases.FORMS)
def test_equals_plain_loops_over_the_naive_matrix(form: str, rows: str | list[int]) -> None:
    rec = cases.random(form, lengths=[23, 14])
    result = memory.mean_distance(rec, rows=rows)
    assert result.dims == ("batch", "row", "head")
    for b in range(2):
        length = int(rec.real_lengths[b])
        for k, label in enumerate(result.coords["row"]):
            t = label if label >= 0 else label + length
            for h in range(rec.n_heads):
                found = [x[b, k, h].item() for x in columns(result)]
                if t < length:
                    row = cases.matrix(rec, b, h)[t][: t + 1]
                    assert found == pytest.approx(loop_statistics(row, 0.9), rel=1e-10, abs=1e-12)
                else:
                    assert all(map(math.isnan, found))


@pytest.mark.parametrize("rows", ["last", "all", [3, 4]])
def test_without_a_quantile_the_mean_is_the_same(rows: str | list[int]) -> None:
    rec = cases.random("per-state", lengths=[23, 14])
    plain, full = (memory.mean_distance(rec, rows=rows, quantile=q) for q in (None, 0.5))
    torch.testing.assert_close(plain.value, full.value, rtol=1e-10, atol=0, equal_nan=True)
    assert set(plain.columns) == {"fraction_of_uniform"}
    assert {"spread", "distance_q50"} <= set(full.columns)


def test_whole_matrices_and_single_rows_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rec = cases.random("per-state", lengths=[23, 14])
    tiles = memory.mean_distance(rec, rows="all")
    monkeypatch.setattr("ssmlens.analyses._layers.BLOCK_ENTRIES", 1)
    narrow = memory.mean_distance(rec, rows="all")
    monkeypatch.setattr("ssmlens.analyses.memory._rows.DENSE_ENTRIES", 0)
    single = memory.mean_distance(rec, rows="all")
    for name, x in {"value": tiles.value, **tiles.columns}.items():
        for other in (narrow, single):
            torch.testing.assert_close(
                {"value": other.value, **other.columns}[name], x, rtol=1e-10, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("form", cases.FORMS)
def test_heads_are_joined_as_named(form: str) -> None:
    rec = cases.random(form, lengths=[23, 14])
    each = memory.mean_distance(rec)
    for how in ("mean", "median", "pooled"):
        joined = memory.mean_distance(rec, reduce=how)
        assert joined.dims == ("batch",)
        for b in range(2):
            last = int(rec.real_lengths[b]) - 1
            rows = [cases.matrix(rec, b, h)[last][: last + 1] for h in range(rec.n_heads)]
            single = [loop_statistics(row, 0.9)[0] for row in rows]
            expected = {
                "mean": sum(single) / len(single),
                "median": sorted(single)[1],
                "pooled": loop_statistics([sum(map(abs, column)) for column in zip(*rows)], 0.9)[0],
            }[how]
            assert joined.value[b].item() == pytest.approx(expected, rel=1e-10)
            fraction = joined.columns["fraction_of_uniform"][b].item()
            assert fraction == pytest.approx(expected / (last / 2), rel=1e-10)
    assert each.value.shape == (2, rec.n_heads)


def test_a_head_that_reads_nothing_is_nan_and_left_out_of_means() -> None:
    rec = cases.random("explicit", batch=1)
    read = rec.inputs.read.expand(-1, -1, 3, -1).clone()
    read[:, :, 1] = 0
    quiet = cases.Recurrence(rec.inputs.replace(read=read))
    each = memory.mean_distance(quiet)
    assert each.value.isnan().tolist() == [[False, True, False]]
    assert all(x[0, 1].isnan() for x in columns(each))
    left = each.value[0, [0, 2]].mean().item()
    assert memory.mean_distance(quiet, reduce="mean").value.item() == pytest.approx(left, rel=EXACT)
    assert memory.mean_distance(quiet, reduce="pooled").value.isfinite().all()


def test_nan_in_a_read_is_nan_in_its_row_only() -> None:
    rec = cases.random("per-state", batch=1)
    read = rec.inputs.read.clone()
    read[0, 7] = math.nan
    result = memory.mean_distance(cases.Recurrence(rec.inputs.replace(read=read)), rows=[6, 7, 8])
    for value in columns(result):
        assert value[0].isnan().all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("reduce", memory.REDUCTIONS)
@pytest.mark.parametrize("form", cases.FORMS)
def test_a_padded_batch_equals_its_single_runs(form: str, reduce: str) -> None:
    rec = cases.random(form, batch=3, lengths=[23, 1, 9])
    together = memory.mean_distance(rec, reduce=reduce)
    for b in range(3):
        alone = memory.mean_distance(cases.single(rec, b), reduce=reduce)
        for name, x in {"value": alone.value, **alone.columns, **alone.control}.items():
            ours = {"value": together.value, **together.columns, **together.control}[name][b]
            torch.testing.assert_close(ours, x[0], rtol=1e-10, atol=1e-12, equal_nan=True)


def test_one_token_reads_itself() -> None:
    result = memory.mean_distance(cases.constant(0.9, 1))
    assert [x.item() for x in columns(result)] == [0, 0, 0]


def test_a_truncated_text_reaches_less_far_than_the_closed_form() -> None:
    """Why the real row is read: at 64 tokens a decay of 0.99 cannot have its mean distance of 99."""
    a, t = 0.99, 63
    expected = sum(k * a**k for k in range(t + 1)) / sum(a**k for k in range(t + 1))
    value = memory.mean_distance(cases.constant(a, t + 1)).value.item()
    assert value == pytest.approx(expected, rel=1e-10)
    assert value < 0.31 * a / (1 - a)


def test_the_delta_rule_is_in_the_matrix() -> None:
    g = torch.Generator().manual_seed(0)
    rec = cases.random("explicit")
    key = torch.nn.functional.normalize(torch.rand(2, 23, 1, 4, generator=g, dtype=torch.float64), dim=-1)
    erased = cases.Recurrence(rec.inputs.replace(erase_read=key, erase_write=key))
    found = memory.mean_distance(erased).value
    for b, h in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        expected = loop_statistics(cases.matrix(erased, b, h)[-1], 0.9)[0]
        assert found[b, h].item() == pytest.approx(expected, rel=1e-10)
    assert not torch.allclose(found, memory.mean_distance(rec).value)


def test_refusals() -> None:
    rec = cases.random("scalar")
    with pytest.raises(ValueError, match="choose one of none, mean, median, pooled"):
        memory.mean_distance(rec, reduce="max")
    with pytest.raises(ValueError, match="choose last, all or a list of token indices"):
        memory.mean_distance(rec, rows="first")
    with pytest.raises(ValueError, match="token 99 does not exist"):
        memory.mean_distance(rec, rows=[99])
    with pytest.raises(ValueError, match="above 0 and is at most 1, got 0"):
        memory.mean_distance(rec, quantile=0)
