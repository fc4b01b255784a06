"""What single tasks are known for: layouts of their papers, groups, bounds, and the laws of the chaotic series."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from ssmlens import tasks
from ssmlens.analyses import lyapunov
from ssmlens.tasks._base import Draws
from ssmlens.tasks._needles import filler_chain


def test_draws_are_uniform_and_without_repeats():
    draws = Draws(0)
    assert np.bincount(draws.integers(3, 8, 50_000), minlength=8)[3:] == pytest.approx(10_000, abs=400)
    order = draws.order(4_000, 5)
    assert (np.sort(order, 1) == np.arange(5)).all()
    assert np.bincount(order[:, 0]) == pytest.approx(800, abs=110)
    chosen = draws.choose(4_000, 6, 2)
    assert (chosen[:, 0] < chosen[:, 1]).all()
    assert len({tuple(row) for row in chosen.tolist()}) == 15


def test_weighted_draws_follow_the_weights():
    weight = np.array([1.0, 2.0, 5.0])
    found = Draws(1).weighted(40_000, weight, 2)
    assert np.bincount(found[:, 0]) / 40_000 == pytest.approx(weight / 8, abs=0.01)
    # After 2 was drawn, 0 and 1 are left in proportion 1 to 2.
    second = found[found[:, 0] == 2, 1]
    assert (second == 1).mean() == pytest.approx(2 / 3, abs=0.015)


def test_mqar_has_the_layout_of_zoology():
    task = tasks.MQAR(64, 8, 64)
    batch = task.batch(500, 0)
    keys, values = batch.ids[:, :16:2], batch.ids[:, 1:16:2]
    assert int(keys.min()) >= 1
    assert int(keys.max()) < 32 <= int(values.min())
    for told in (keys, values):
        assert all(len(set(row.tolist())) == 8 for row in told)
    asked = batch.facts["asked"]
    assert bool((asked % 2 == 0).all())
    assert bool((asked >= 16).all())
    assert torch.equal(batch.ids.gather(1, asked), keys)
    # Gaps follow g^(alpha - 1): of single questions, half the distance is asked twice as often.
    gaps = (tasks.MQAR(34, 1).batch(40_000, 1).facts["asked"][:, 0] - 2) // 2 + 1
    share = torch.bincount(gaps, minlength=17)[1:] / 40_000
    weight = torch.arange(1.0, 17.0) ** -0.99
    assert share.numpy() == pytest.approx((weight / weight.sum()).numpy(), abs=0.01)


def test_knowing_the_set_of_values_costs_log_k():
    task = tasks.MQAR(pairs=4)
    batch = task.batch(100, 0)
    logits = torch.full((*batch.ids.shape, task.n_tokens), -torch.inf)
    told = batch.ids[:, 1:8:2]
    logits.scatter_(2, told[:, None].expand(-1, task.length, -1), 0.0)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    assert float(loss) == pytest.approx(task.plateau, abs=1e-6)
    assert task.plateau == pytest.approx(math.log(4))


@pytest.mark.parametrize(("group", "order"), [("Z2", 2), ("Z60", 60), ("S3", 6), ("A3", 3), ("A4", 12), ("S5", 120)])
def test_group_tables_are_groups(group, order):
    table = tasks.group_table(group)
    every = np.arange(order)
    assert table.shape == (order, order)
    assert (table[0] == every).all()
    assert (table[:, 0] == every).all()
    assert (np.sort(table, 0) == every[:, None]).all()
    assert (np.sort(table, 1) == every).all()
    a, b, c = (Draws(s).integers(0, order, 500) for s in range(3))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()


def test_s3_does_not_commute_and_z6_does():
    assert (tasks.group_table("S3") != tasks.group_table("S3").T).any()
    assert (tasks.group_table("Z6") == tasks.group_table("Z6").T).all()


def test_words_multiply_from_the_left():
    task = tasks.GroupWord("S3", 2)
    ids = torch.tensor([[1, 3]])
    table = tasks.group_table("S3")
    assert task.oracle(tasks.Batch(ids, ids, ids >= 0)).tolist() == [[1, int(table[3, 1])]]


@pytest.mark.parametrize(
    ("bits", "length", "symbols", "share"), [(0, 1, 2, 0.5), (8, 8, 2, 1.0), (1000, 8, 2, 1.0), (10, 4, 8, 0.25)]
)
def test_copy_bound(bits, length, symbols, share):
    assert tasks.copy_bound(bits, length, symbols) == pytest.approx(share)


def test_filler_has_the_entropy_of_its_branches():
    chain = filler_chain(Draws(0), 200, 400, 13, 64)
    counts = np.zeros((51, 51))
    np.add.at(counts, (chain[:, :-1].ravel() - 13, chain[:, 1:].ravel() - 13), 1)
    used = counts[counts.sum(1) > 0]
    share = used / used.sum(1, keepdims=True)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1)
    assert (used.sum(1) @ entropy) / used.sum() == pytest.approx(math.log(4), abs=0.005)


def test_passkeys_stand_where_the_depth_says():
    for depth in (0.0, 0.25, 1.0):
        batch = tasks.Passkey(111, depth=depth).batch(3, 0)
        assert (batch.facts["source"][:, 0] - 1).tolist() == [round(depth * 100)] * 3
    drawn = tasks.Passkey(111).batch(2_000, 0).facts["depth"]
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.03)


def test_outliers_are_as_many_as_asked_and_wrong():
    task = tasks.Outliers(examples=10, share=0.3)
    batch = task.batch(200, 0)
    outlier = batch.facts["outlier"]
    assert outlier.sum(1).tolist() == [3] * 200
    assert torch.equal(batch.ids[:, :-1, -2] > 0, outlier)
    sign, label = batch.ids[:, :-1, 0], batch.ids[:, :-1, -1]
    meaning = batch.targets[:, -1] * batch.ids[:, -1, :1]
    assert torch.equal(sign * label == meaning, ~outlier)
    assert bool((batch.ids[:, -1, -2:] == 0).all())


def test_lorenz_is_solved_to_the_order_of_its_method():
    start = tasks.Lorenz(length=2).batch(20, 0).ids[:, 0]
    ends = []
    for parts in (1, 2, 4):
        x = start
        flow = tasks.Lorenz(dt=0.02 / parts, every=1)
        for _ in range(10 * parts):
            x = flow.step(x)
        ends.append(x)
    coarse, fine = ((a - b).norm() for a, b in pairwise(ends))
    assert float(coarse / fine) == pytest.approx(16, rel=0.35)


def test_the_lorenz_map_has_the_known_exponents():
    flow = tasks.Lorenz(length=2)
    start = flow.batch(1, 0).ids[0, 0]
    found = lyapunov.spectrum(flow.step, start, 700, 3, dt=flow.interval, every=5, control=False)
    assert float(found.value.sum()) == pytest.approx(sum(flow.exponents), abs=2e-4)
    error = 4 * found.columns["standard_error"]
    assert ((found.value - torch.tensor(flow.exponents, dtype=torch.float64)).abs() <= error + 0.01).all()


def test_series_go_on_from_sample_to_sample():
    for task in (tasks.Lorenz(length=20), tasks.MackeyGlass(length=20)):
        batch = task.batch(3, 0)
        assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
        r = torch.corrcoef(torch.stack([batch.ids.flatten(), batch.targets.flatten()]))[0, 1]
        assert task.persistence(batch) < 4 * float(1 - r)
    with pytest.raises(ValueError, match="does not forecast its own input"):
        tasks.NARMA(length=20).persistence(tasks.NARMA(length=20).batch(2, 0))


def test_persistence_is_twice_one_minus_the_autocorrelation():
    task = tasks.MackeyGlass(length=1_000)
    batch = task.batch(4, 0)
    x, y = (v - v.mean() for v in (batch.ids, batch.targets))
    r = float((x * y).mean() / (y * y).mean())
    assert task.persistence(batch) == pytest.approx(2 * (1 - r), rel=0.02)


def test_mackey_glass_at_the_usual_delay_stays_on_its_attractor():
    batch = tasks.MackeyGlass(length=400, burn=400).batch(8, 0)
    assert float(batch.ids.min()) > 0.35
    assert float(batch.ids.max()) < 1.4
    assert float(batch.ids.std()) == pytest.approx(0.23, abs=0.03)


def test_narma_written_out():
    task = tasks.NARMA(length=30, burn=20)
    batch = task.batch(2, 0)
    u = batch.facts["drive"].numpy()
    y = np.zeros((2, 51))
    for t in range(50):
        past = sum(y[:, t - i] for i in range(10) if t >= i)
        late = u[:, t - 9] if t >= 9 else 0.0
        y[:, t + 1] = 0.3 * y[:, t] + 0.05 * y[:, t] * past + 1.5 * late * u[:, t] + 0.1
    assert batch.targets[..., 0].numpy() == pytest.approx(y[:, 21:], rel=1e-12)
    assert float(batch.targets.max()) < 1


def test_newlines_as_text():
    task = tasks.Newlines(length=5)
    assert task.text() == "\n\n\n\n\n"
    assert int(task.batch(1).mask.sum()) == 4
