"""States of a long stream by hand, the onset of a collapse, remedies in the model, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_mamba1, tiny_mamba2, tiny_tokenizer

import ssmlens
from ssmlens.analyses import memory

MAKE = {"mamba1": tiny_mamba1, "mamba2": tiny_mamba2}


def onset(loss: list[float], variance: list[list[float]], train: int, **more: float) -> memory.Result:
    ends = torch.arange(1, len(loss) + 1) * 10
    return memory.collapse_onset(torch.tensor(loss), torch.tensor(variance), train, ends=ends, **more)


def test_a_known_onset() -> None:
    loss = [3.0, 2.0, 2.2, 2.6, 2.4, 2.7]
    # Two heads: one calm, one whose variance passes 3 times that of the second bucket in the fifth.
    variance = [[1.0, 1.0], [1.0, 2.0], [1.0, 3.0], [1.0, 6.0], [1.0, 6.1], [1.0, 9.0]]
    found = onset(loss, variance, 20)
    assert found.columns["loss_onset"].item() == 40
    assert found.columns["variance_onset"].item() == 50
    assert found.value.item() == 60
    assert onset(loss, variance, 20, rise=5).value.item() == math.inf
    assert onset(loss, [[1.0, 1.0]] * 6, 20).columns["variance_onset"].item() == math.inf
    # Growth inside the training length is no onset.
    assert onset(loss, variance, 60).value.item() == math.inf
    with pytest.raises(ValueError, match="same k buckets"):
        onset(loss, variance[:3], 20)


@pytest.mark.parametrize("name", MAKE)
def test_buckets_by_hand(name: str) -> None:
    lens = ssmlens.load(MAKE[name](), tokenizer=tiny_tokenizer(), dtype=torch.float64)
    ids = torch.randint(0, 256, (2, 25), generator=torch.Generator().manual_seed(0))
    found = memory.state_stream(lens, ids, 16, bucket=8)
    assert found.dims == ("layer", "batch", "bucket", "head")
    assert found.coords["bucket"] == [7, 15, 23, 24]
    trace = lens.trace(ids)
    logits = trace.logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    for i, (a, b) in enumerate(((1, 8), (8, 16), (16, 24), (24, 25))):
        torch.testing.assert_close(found.columns["loss"][0, :, i, 0], losses[:, a - 1 : b - 1].mean(1))
    for k in range(3):
        states = trace[k].recurrence.states([7, 15, 23, 24]).flatten(3)
        torch.testing.assert_close(found.value[k], states.var(-1), rtol=1e-8, atol=1e-14)
        torch.testing.assert_close(found.columns["mean"][k], states.mean(-1), rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(found.columns["rms"][k], states.square().mean(-1).sqrt(), rtol=1e-8, atol=1e-14)
        torch.testing.assert_close(found.columns["median"][k], states.median(-1).values, rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(found.control["trained_variance"][k, :, 0], found.value[k, :, 1])


@pytest.mark.parametrize("name", MAKE)
def test_remedies_that_change_nothing_change_nothing(name: str) -> None:
    lens = ssmlens.load(MAKE[name](), tokenizer=tiny_tokenizer(), dtype=torch.float64)
    ids = torch.randint(0, 256, (20,), generator=torch.Generator().manual_seed(0))
    plain = memory.state_stream(lens, ids, 8, bucket=8)
    for setting in ({"clip": 1e9}, {"forget": 1.0 + 1e-13}, {"insert": 1.0 - 1e-13}):
        other = memory.state_stream(lens, ids, 8, bucket=8, **setting)
        torch.testing.assert_close(other.value, plain.value, rtol=1e-7, atol=1e-14)
        torch.testing.assert_close(other.columns["loss"], plain.columns["loss"], rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", MAKE)
def test_remedies_make_states_smaller(name: str) -> None:
    lens = ssmlens.load(MAKE[name](), tokenizer=tiny_tokenizer(), dtype=torch.float64)
    ids = torch.zeros(40, dtype=torch.long) + 10
    plain = memory.state_stream(lens, ids, 8, bucket=8).columns["rms"]
    for setting in ({"forget": 3.0}, {"insert": 0.5}):
        smaller = memory.state_stream(lens, ids, 8, bucket=8, **setting).columns["rms"]
        assert (smaller[0] <= plain[0] + 1e-15).all()
        assert smaller[0].sum() < plain[0].sum()
    count = math.sqrt(lens.trace(ids)[0].recurrence.head_dim * lens.trace(ids)[0].recurrence.d_state)
    clipped = memory.state_stream(lens, ids, 8, bucket=8, clip=1e-3).columns["rms"] * count
    assert clipped.max() <= 1e-3 * (1 + 1e-9)
    # Half of each write makes half of the first layer's state, which depends on nothing before it.
    halved = memory.state_stream(lens, ids, 8, bucket=8, insert=0.5).columns["rms"]
    torch.testing.assert_close(halved[0], plain[0] / 2, rtol=1e-9, atol=1e-15)


def test_progress_and_refusals() -> None:
    lens = ssmlens.load(tiny_mamba2(), tokenizer=tiny_tokenizer())
    seen: list[tuple[int, int]] = []
    memory.state_stream(lens, "0123456789", 5, bucket=4, progress=lambda *x: seen.append(x))
    assert seen == [(4, 10), (8, 10), (10, 10)]
    for bad in ({"bucket": 0}, {"clip": 0.0}):
        with pytest.raises(ValueError, match="above 0"):
            memory.state_stream(lens, "0123456789", 5, **bad)
    with pytest.raises(ValueError, match="two tokens"):
        memory.state_stream(lens, "0", 5)
