"""Greedy removal: every step against a search in the model's own forward, its rank correlation, and its controls."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr
from tiny import tiny_mamba1, tiny_mamba2

from ssmlens.analyses import sensitivity
from ssmlens.analyses.sensitivity import _greedy
from ssmlens.errors import SsmlensError
from ssmlens.interventions import ablate

from .test_removal import IDS, mean_loss, sharp


@pytest.mark.parametrize("kind", ["block", "ssm"])
@pytest.mark.parametrize("make", [tiny_mamba1, tiny_mamba2])
def test_each_step_is_the_best_of_all(make, kind: str) -> None:
    lens = sharp(make)
    found = sensitivity.greedy(lens, IDS, kind, steps=3, orders=0)
    gone: list[int] = []
    for step in range(1, 4):
        tried = {k: mean_loss(ablate(lens, IDS, [*gone, k], kind), IDS) for k in range(3) if k not in gone}
        best = min(tried, key=tried.get)
        gone.append(best)
        assert found.columns["layer"][step] == best
        assert found.value[step].item() == pytest.approx(tried[best], abs=1e-10)
    assert found.value[0].item() == pytest.approx(mean_loss(lens.trace(IDS).logits, IDS), abs=1e-12)
    assert found.settings["order"] == [f"layer {k}" for k in gone]
    assert bool(found.control["random_order"].isnan().all())


def test_heads_of_one_layer() -> None:
    lens = sharp(tiny_mamba2)
    found = sensitivity.greedy(lens, IDS, "head", steps=2, layers=[1], group=2, orders=1)
    gone: list[int] = []
    for step in (1, 2):
        left = [(h, h + 1) for h in range(0, 8, 2) if h not in gone]
        tried = {pair: mean_loss(ablate(lens, IDS, 1, ("head", [*gone, *pair])), IDS) for pair in left}
        best = min(tried, key=tried.get)
        gone += best
        assert found.columns["head"][step] == best[0]
        assert found.value[step].item() == pytest.approx(tried[best], abs=1e-10)


def test_controls_are_the_losses_of_their_orders() -> None:
    lens = sharp(tiny_mamba2)
    found = sensitivity.greedy(lens, IDS, steps=2, orders=2, seed=5)
    single = sensitivity.removal(lens, IDS, control=False).value[:, 0]
    order = single.argsort().tolist()[:2]
    expected = [mean_loss(ablate(lens, IDS, order[:k], "block"), IDS) for k in (1, 2)]
    assert found.control["single_order"][1:].tolist() == pytest.approx(expected, abs=1e-10)
    generator = torch.Generator().manual_seed(5)
    paths = [torch.randperm(3, generator=generator).tolist() for _ in range(2)]
    for k in (1, 2):
        mean = sum(mean_loss(ablate(lens, IDS, path[:k], "block"), IDS) for path in paths) / 2
        assert found.control["random_order"][k].item() == pytest.approx(mean, abs=1e-10)
    assert torch.all(found.value[1:] <= found.control["random_order"][1:] + 1e-12) or found.value[2] > found.value[1]


def test_rank_correlation_is_scipys() -> None:
    g = torch.Generator().manual_seed(0)
    for n in (3, 10, 40):
        a, b = torch.randn(n, generator=g), torch.randint(0, 5, (n,), generator=g)
        assert sensitivity.rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert sensitivity.rank_correlation([1, 2, 3], [3, 2, 1]) == -1
    assert sensitivity.rank_correlation([1, 1], [1, 2]) != sensitivity.rank_correlation([1, 1], [1, 2])  # NaN


def test_the_rank_correlation_of_a_run() -> None:
    lens = sharp(tiny_mamba1)
    found = sensitivity.greedy(lens, IDS, steps=3, orders=0)
    single = sensitivity.removal(lens, IDS, control=False).value[:, 0]
    place = torch.empty(3)
    for step in (1, 2, 3):
        place[int(found.columns["layer"][step])] = step
    rho = found.columns["rank_correlation"].item()
    assert rho == pytest.approx(spearmanr(single, place).statistic, abs=1e-12)
    assert found.columns["rank_low"].item() <= rho <= found.columns["rank_high"].item()
    assert 0 <= found.control["rank_null"].item() <= 1


def test_killed_half_way_it_goes_on(tmp_path, monkeypatch) -> None:
    lens, file = sharp(tiny_mamba2), tmp_path / "run.jsonl"
    whole = sensitivity.greedy(lens, IDS, steps=3, orders=1)

    def stop(done: int, total: int) -> None:
        assert total == 9
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity.greedy(lens, IDS, steps=3, orders=1, resume=file, progress=stop)
    tried, inner = [], _greedy.Model.losses
    monkeypatch.setattr(_greedy.Model, "losses", lambda self, more: tried.append(more) or inner(self, more))
    again = sensitivity.greedy(lens, IDS, steps=3, orders=1, resume=file)
    assert len(tried) == 1  # the third step has one part left to try
    assert torch.equal(again.value, whole.value)
    assert torch.equal(again.control["random_order"], whole.control["random_order"])
    # More steps go on from the same file.
    assert torch.equal(sensitivity.greedy(lens, IDS, steps=2, orders=1, resume=file).value, whole.value[:3])


def test_refusals() -> None:
    lens = sharp(tiny_mamba2)
    for steps in (0, 4):
        with pytest.raises(SsmlensError, match="steps is from 1 to the 3 parts there are"):
            sensitivity.greedy(lens, IDS, steps=steps)
    with pytest.raises(SsmlensError, match="of at least two"):
        sensitivity.greedy(lens, IDS, layers=[1])
