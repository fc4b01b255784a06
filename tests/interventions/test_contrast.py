"""Two runs side by side: against distributions written down by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ssmlens.errors import SsmlensError
from ssmlens.interventions import contrast


def test_divergence_and_table_of_known_distributions() -> None:
    before = torch.tensor([[[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]]).log()
    after = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]).log() + 3.0
    found = contrast(before, after)
    expected = 0.7 * math.log(8)
    assert found.kl.shape == (1, 2)
    assert float(found.kl[0, 0]) == pytest.approx(0, abs=1e-6)
    assert float(found.kl[0, 1]) == pytest.approx(expected, rel=1e-5)
    table = found.table(most=1, decode=lambda ids: "abc"[ids[0]])
    assert list(table["token"]) == ["a", "c"]
    assert list(table["before"]) == pytest.approx([0.8, 0.1])
    assert list(table["change"]) == pytest.approx([-0.7, 0.7])
    assert list(found.table(0, most=9)["token"]) == ["<0>", "<1>", "<2>"]


def test_a_run_does_not_differ_from_itself() -> None:
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    assert float(contrast(logits, logits).kl.max()) == 0


def test_runs_of_different_length_are_refused() -> None:
    with pytest.raises(SsmlensError, match="of one shape"):
        contrast(torch.zeros(1, 3, 4), torch.zeros(1, 2, 4))
