"""The recall task: targets follow from the text, and the source of each answer is where it says."""

import pytest
import torch

from ssmlens.zoo import recall_task as task


@pytest.mark.parametrize(("length", "pairs"), [(8, 2), (32, 8), (64, 16), (104, 26)])
def test_every_target_is_the_value_told_with_its_key(length, pairs):
    made = task.batch(40, length, pairs, seed=3)
    assert made.ids.shape == made.targets.shape == (40, length)
    for ids, targets in zip(made.ids.tolist(), made.targets.tolist()):
        told = dict(zip(ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2]))
        assert len(told) == pairs
        assert len(set(told.values())) == pairs
        asked = {i: t for i, t in enumerate(targets) if t != -100}
        assert len(asked) == pairs
        assert min(asked) >= 2 * pairs
        assert {ids[i]: value for i, value in asked.items()} == told
        rest = set(range(2 * pairs, length)) - set(asked)
        assert {ids[i] for i in rest} <= {task.FILLER}


def test_source_points_at_the_value_of_the_asked_pair():
    made = task.batch(16, 64, 8, seed=1)
    at_source = made.ids.gather(1, made.source)
    assert torch.equal(at_source, made.targets.gather(1, made.asked))
    assert torch.equal(made.ids.gather(1, made.source - 1), made.ids.gather(1, made.asked))


def test_deterministic_by_seed():
    assert torch.equal(task.batch(4, 32, 4, 7).ids, task.batch(4, 32, 4, 7).ids)
    assert not torch.equal(task.batch(4, 32, 4, 7).ids, task.batch(4, 32, 4, 8).ids)


@pytest.mark.parametrize(("length", "pairs"), [(31, 2), (32, 9), (200, 27), (32, 0)])
def test_loads_that_do_not_fit_are_refused(length, pairs):
    with pytest.raises(ValueError, match="do not fit"):
        task.batch(1, length, pairs, 0)


def test_text_and_ids_agree():
    tokenizer = task.tokenizer()
    made = task.batch(1, 32, 4, seed=0)
    text = tokenizer.decode(made.ids[0].tolist())
    assert tokenizer.encode(text).ids == made.ids[0].tolist()
    ids = tokenizer.encode("c 7 a 19 . . a").ids
    assert ids == [task.KEYS[2], task.VALUES[7], task.KEYS[0], task.VALUES[19], 1, 1, task.KEYS[0]]
    assert tokenizer.get_vocab_size() == task.VALUES.stop


def test_accuracy_counts_asked_positions_only():
    targets = torch.tensor([[-100, 2, -100, 1]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 2, 1, 2]]), 3).float()
    assert task.accuracy(logits, targets) == 0.5
