"""One pair of tokens: the taps sum to the contribution, the shares to the output, and the decay is the product."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_mamba1, tiny_mamba2
from tolerances import TOL

import ssmlens
from ssmlens.attribution import contributions, pair_path
from ssmlens.errors import SsmlensError


@pytest.fixture(scope="module", params=[tiny_mamba1, tiny_mamba2], ids=["mamba1", "mamba2"])
def trace(request: pytest.FixtureRequest) -> ssmlens.Trace:
    ids = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return ssmlens.load(request.param().double()).trace(ids, attention_mask=mask)


@pytest.mark.parametrize(("t", "s"), [(8, 2), (8, 8), (8, 7), (5, 0), (-1, 3)])
@pytest.mark.parametrize("row", [0, 1])
def test_taps_sum_to_the_contribution(trace: ssmlens.Trace, t: int, s: int, row: int) -> None:
    path = pair_path(trace[1], t, s, row)
    wanted = contributions(trace[1]).vectors(rows=[path.target])[row, 0, s]
    assert (path.vector - wanted).abs().max() <= TOL[torch.float64] * wanted.abs().max()
    assert path.norm == pytest.approx(float(wanted.norm()))
    assert float(path.tap_shares.sum()) == pytest.approx(1)
    assert path.conv_share == pytest.approx(1 - float(path.tap_shares[0]))
    attention = trace[1].recurrence.attention.dense()[row, :, path.target, s]
    assert torch.allclose(path.attention, attention)


def test_shares_and_the_bias_make_up_the_output(trace: ssmlens.Trace) -> None:
    found = contributions(trace[2])
    output, bias = found.output[0, 7], found.bias[0, 7]
    shares = [pair_path(trace[2], 7, s).share for s in range(8)]
    assert sum(shares) + float(bias @ output / output.square().sum()) == pytest.approx(1)


def test_decay_is_the_product_of_the_steps_between(trace: ssmlens.Trace) -> None:
    path = pair_path(trace[0], 6, 2)
    step = trace[0].recurrence.log_decay[0].exp()
    assert torch.allclose(path.decay, step[3] * step[4] * step[5] * step[6])
    low, middle, high = path.decay_range
    assert low == float(path.decay.min())
    assert high == float(path.decay.max())
    assert low <= middle <= high
    assert pair_path(trace[0], 4, 4).decay_range == (1, 1, 1)


def test_table_has_one_row_per_head(trace: ssmlens.Trace) -> None:
    path = pair_path(trace[0], 6, 2)
    table = path.table()
    assert list(table.columns) == ["head", "attention", "decay"]
    assert len(table) == trace[0].recurrence.n_heads
    assert table["attention"].to_numpy() == pytest.approx(path.attention.numpy())


def test_wrong_pairs_are_refused(trace: ssmlens.Trace) -> None:
    with pytest.raises(SsmlensError, match="comes after"):
        pair_path(trace[0], 2, 3)
    with pytest.raises(IndexError, match="outside the 9 tokens"):
        pair_path(trace[0], 9, 3, row=1)
    with pytest.raises(IndexError, match="row 2"):
        pair_path(trace[0], 3, 3, row=2)
