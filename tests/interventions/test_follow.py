"""Tokens followed from layer to layer agree with the reading they come from."""

from __future__ import annotations

import pytest
from tiny import tiny_mamba1

import ssmlens
from ssmlens.interventions import logit_lens


def test_follow_reads_probabilities_and_ranks_off_the_logits() -> None:
    lens = ssmlens.load(tiny_mamba1().double())
    assert lens.has_head
    trace = lens.trace([3, 1, 4, 1, 5])
    reading = logit_lens(trace)
    table = reading.follow(2, tokens=[7, 9])
    assert list(table.columns) == ["layer", "token", "id", "probability", "rank"]
    assert len(table) == 2 * len(reading.layers)
    chances = reading.logits[:, 0, 2].softmax(-1)
    for line in table.itertuples():
        assert line.probability == pytest.approx(float(chances[line.layer, line.id]), rel=1e-12)
        assert line.rank == 1 + int((chances[line.layer] > chances[line.layer, line.id]).sum())
    top = reading.follow(most=3, decode=lambda ids: f"<{ids[0]}>")
    assert list(top[top["layer"] == reading.layers[-1]]["rank"]) == [1, 2, 3]
    assert top["token"][0] == f"<{int(trace.logits[0, -1].argmax())}>"
    with pytest.raises(IndexError, match="outside the 5 tokens"):
        reading.follow(5)
