"""The mix of the recall stage: shares, weights, windows kept apart, and a probe that an oracle passes."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ssmlens.zoo.english import Sampler
from ssmlens.zoo.loop import Budget
from ssmlens.zoo.recall_stage import (
    ASKED_WEIGHT,
    PROBE_WINDOWS,
    RecallMix,
    dense_share,
    reachable_share,
    windows_of_pack,
)

CPU = torch.device("cpu")
LENGTH, WINDOWS = 96, 100


@pytest.fixture(scope="module")
def mix(pack):
    return RecallMix(pack, Sampler(pack, CPU, LENGTH, 1), CPU, LENGTH, 1, WINDOWS)


def test_shares_along_the_stage():
    assert [dense_share(s) for s in (-1, 0, 0.4, 0.8, 1, 2)] == pytest.approx([0.6, 0.6, 0.375, 0.15, 0.15, 0.15])
    assert [reachable_share(s) for s in (-1, 0, 0.2, 0.4, 1, 2)] == pytest.approx([0.1, 0.1, 0.55, 1, 1, 1])


def test_probe_windows_are_kept_from_training(pack, mix):
    made = windows_of_pack(pack, WINDOWS + PROBE_WINDOWS, LENGTH, 1)
    assert mix.ids.shape == (WINDOWS, LENGTH + 1)
    assert mix.probe_ids.shape == (PROBE_WINDOWS, LENGTH + 1)
    trained, kept = ({tuple(row) for row in x.tolist()} for x in (mix.ids, mix.probe_ids))
    assert not trained & kept
    assert trained | kept == {tuple(row) for row in made.ids.tolist()}
    # the first and the last window are among them: the probe spans every difficulty
    assert mix.probe_ids[0].tolist() == made.ids[0].tolist()
    assert mix.probe_ids[-1].tolist() == made.ids[-1].tolist()


def test_draws_stay_within_the_share(mix):
    easy = {tuple(row) for row in mix.ids[:10].tolist()}
    ids, asked = mix.draw(200, 0.1)
    assert {tuple(row) for row in ids.tolist()} == easy
    known = {tuple(row): mask for row, mask in zip(mix.ids.tolist(), mix.asked.tolist())}
    assert asked.tolist() == [known[tuple(row)] for row in ids.tolist()]


@pytest.mark.parametrize(("step", "dense"), [(0, 12), (8, 3)])
def test_batches_weigh_asked_values(pack, step, dense):
    mix = RecallMix(pack, Sampler(pack, CPU, LENGTH, 1), CPU, LENGTH, 1, WINDOWS)
    batches = mix.batches(20, Budget(10, None))
    for _ in range(step):
        next(batches)
    ids, targets, weights = next(batches)
    assert ids.shape == targets.shape == weights.shape == (20, LENGTH)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    known = {tuple(row): mask for row, mask in zip(mix.ids.tolist(), mix.asked)}
    for row in range(dense):
        asked = known[(*ids[row].tolist(), int(targets[row, -1]))][1:]
        assert torch.equal(weights[row], torch.where(asked, ASKED_WEIGHT, 1.0))
    assert (weights[dense:] == 1).all()
    assert (weights[:dense] > 1).any() or step  # at this length the hardest windows may end before they ask


def test_an_oracle_passes_the_probe(mix):
    def oracle(shift):
        def model(ids, use_cache):
            return SimpleNamespace(logits=F.one_hot(mix.probe_ids[:, shift : shift + LENGTH], 320).float())

        return model

    assert mix.probe(oracle(1)) == {"recall_easy": 1.0, "recall_hard": 1.0}
    found = mix.probe(oracle(0))  # names the token it reads instead of the next one
    assert max(found.values()) < 0.2
