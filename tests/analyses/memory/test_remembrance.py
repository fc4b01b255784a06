"""Effective remembrance: a model with a window, a counter that never forgets, and real models by hand."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_mamba1, tiny_mamba2, tiny_tokenizer

import ssmlens
from ssmlens.analyses import memory


def windowed(width: int) -> object:
    """Logits that depend on the last ``width`` tokens alone."""

    def last(ids: torch.Tensor) -> torch.Tensor:
        some = ids[:, -width:].double()
        weights = torch.arange(1, some.shape[1] + 1, dtype=torch.float64).flip(0)
        total = (some * weights).sum(1, keepdim=True)
        return torch.sin(total * torch.arange(1, 6, dtype=torch.float64))

    return last


def counter(ids: torch.Tensor) -> torch.Tensor:
    """Logits that name the number of tokens read, for certain."""
    out = torch.full((len(ids), 200), -60.0, dtype=torch.float64)
    out[:, ids.shape[1]] = 60.0
    return out


def test_a_sliding_window_model() -> None:
    ids = torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(0))
    found = memory.effective_remembrance(windowed(8), ids, range(1, 41))
    kept = torch.tensor(found.coords["kept"])
    assert (found.value[:, kept >= 8] == 0).all()
    assert (found.value[:, kept < 8] > 0.01).all()
    assert found.value.max() <= 1


def test_a_counter_that_never_forgets() -> None:
    found = memory.effective_remembrance(counter, torch.zeros(1, 64, dtype=torch.long))
    assert found.coords["kept"] == [1, 2, 4, 8, 16, 32, 64]
    assert found.value[0, :-1].tolist() == pytest.approx([1] * 6)
    assert found.value[0, -1] == 0
    assert "low" not in found.columns


@pytest.mark.parametrize("make", [tiny_mamba1, tiny_mamba2])
def test_equals_runs_of_the_model_itself(make: object) -> None:
    lens = ssmlens.load(make(), tokenizer=tiny_tokenizer(), dtype=torch.float64)
    ids = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
    found = memory.effective_remembrance(lens, ids, [1, 7, 20], repeats=100)
    whole = lens.model(ids).logits[:, -1].softmax(-1)
    for i, k in enumerate((1, 7, 20)):
        part = lens.model(ids[:, 20 - k :]).logits[:, -1].softmax(-1)
        expected = (whole - part).abs().sum(-1) / 2
        torch.testing.assert_close(found.value[:, i], expected.detach(), rtol=1e-8, atol=1e-12)
    assert torch.equal(memory.effective_remembrance(lens, ids, 7).value[:, 0], found.value[:, 1])
    assert (found.columns["low"] <= found.columns["mean"]).all()
    assert (found.columns["mean"] <= found.columns["high"]).all()
    torch.testing.assert_close(found.control["last_token"][:, 0], found.value[:, 0])


def test_a_shipped_model_needs_the_pairs_it_was_told() -> None:
    lens = ssmlens.load("mamba2-recall")
    # The value of k stands 9 tokens back, with a distractor in between.
    found = memory.effective_remembrance(lens, "a 19 k 3 m 24 . . . . . k", [4, 8, 10, 12])
    short, near, enough, whole = found.value[0].tolist()
    assert short > 0.5
    assert near > 0.5
    assert enough < 0.1
    assert whole == 0


def test_refusals() -> None:
    lens = ssmlens.load(tiny_mamba1(), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="lie between 1 and 3"):
        memory.effective_remembrance(lens, [1, 2, 3], [4])
    with pytest.raises(ValueError, match="different lengths"):
        memory.effective_remembrance(lens, ["one", "three"])
