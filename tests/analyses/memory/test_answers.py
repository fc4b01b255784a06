"""Answers by age: hand-made questions, a model that knows nothing, and the shipped recall models."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_mamba1, tiny_tokenizer

import ssmlens
from ssmlens import zoo
from ssmlens.analyses import memory
from ssmlens.zoo import recall_task


def test_ages_and_shares_by_hand() -> None:
    lens = ssmlens.load(tiny_mamba1(), tokenizer=tiny_tokenizer())
    ids = torch.tensor([[5, 6, 7, 8, 5, 9, 4, 4], [1, 2, 3, 1, 2, 3, 1, 2]])
    named = lens.trace(ids).logits.argmax(-1)
    # Ask for what the model says wherever that was told before, and once for what it does not say.
    targets = torch.full_like(ids, -100)
    targets[0, 6], targets[1, 7], targets[0, 3] = 5, 2, 250
    ids[0, 4], ids[0, 2] = named[0, 6], named[0, 6]
    named = lens.trace(ids).logits.argmax(-1)
    targets[0, 6] = ids[0, 4]
    found = memory.answers_by_age(lens, ids, targets, [1, 2, 3], repeats=50)
    assert found.columns["count"].tolist() == [0, 1, 1]
    assert found.columns["mean_age"][1:].tolist() == [2, 3]
    assert found.value[0].isnan()
    assert found.value[1:].tolist() == [float(named[0, 6] == targets[0, 6]), float(named[1, 7] == 2)]
    rates = torch.cat([m.recurrence.log_decay.double().mean((0, 1)).flatten() for m in lens.trace(ids)])
    assert found.columns["retained_slowest"][2].item() == pytest.approx(torch.exp(3 * rates.max()).item(), rel=1e-5)
    assert found.columns["retained_median"][2].item() == pytest.approx(torch.exp(3 * rates.median()).item(), rel=1e-5)


@pytest.mark.parametrize("name", [n for n in zoo.names() if n.endswith("-recall")])
def test_a_shipped_model_recalls_what_it_was_trained_to(name: str) -> None:
    batch = recall_task.batch(24, 64, 8, 3)
    found = memory.answers_by_age(ssmlens.load(name), batch.ids, batch.targets)
    known = found.columns["count"] >= 10
    assert (found.value[known] > 0.95).all()
    assert (found.control["guess"][known] < 0.5).all()
    # The age is that of the told value, one after its key.
    total = (batch.asked - batch.source).double().mean()
    mean = (found.columns["mean_age"].nan_to_num(0.0) * found.columns["count"]).sum() / found.columns["count"].sum()
    assert mean.item() == pytest.approx(total.item())


def test_refusals() -> None:
    lens = ssmlens.load(tiny_mamba1(), tokenizer=tiny_tokenizer())
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="both"):
        memory.answers_by_age(lens, ids, torch.tensor([1]))
    with pytest.raises(ValueError, match="nothing to recall"):
        memory.answers_by_age(lens, ids, torch.full_like(ids, -100))
    with pytest.raises(ValueError, match="1 or later"):
        memory.answers_by_age(lens, torch.tensor([[1, 2, 1]]), torch.tensor([[-1, -1, 1]]), [0])
