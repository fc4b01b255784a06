"""Half-lives of a few tokens of a long text: the search walks away from each token and stops where all have ended."""

from __future__ import annotations

import math

import memory_cases as cases
import pytest
import torch
from torch import Tensor

from ssmlens.analyses import memory
from ssmlens.analyses.memory import _clock as clock
from ssmlens.analyses.memory import _crossing as crossing
from ssmlens.analyses.memory._crossing import WINDOW

LENGTH = 4000


def mixed(form: str, lengths: list[int] | None = None) -> cases.Recurrence:
    """Heads that forget at once, within windows of any number, and not at all before the text ends."""
    rec = cases.random(form, batch=1 if lengths is None else len(lengths), length=LENGTH, lengths=lengths)
    speed = torch.tensor([1.0, 1e-2, 1e-5], dtype=torch.float64)
    if form == "explicit":
        return changed(rec, log_decay=rec.inputs.log_decay * speed[:, None])
    return changed(rec, dt=rec.inputs.dt * speed)


def changed(rec: cases.Recurrence, **pieces: Tensor) -> cases.Recurrence:
    return cases.Recurrence(rec.inputs.replace(**pieces), lengths=rec.lengths)


def reference(rec: cases.Recurrence, kind: str, b: int, token: int) -> tuple[Tensor, Tensor]:
    """(h, n) half-lives of one token by adding up its own log decays, in whole tokens and with fractions."""
    log_decay = rec.log_decay[b, : int(rec.real_lengths[b])].double()
    steps = log_decay[token + 1 :] if kind == "forward" else log_decay[1 : token + 1].flip(0)
    left = torch.cat([torch.zeros_like(log_decay[:1]), steps.cumsum(0)])
    ended = left <= -math.log(2) * (1 - 1e-12)
    first = ended.long().argmax(0, keepdim=True)
    late, early = left.take_along_dim(first, 0), left.take_along_dim((first - 1).clamp(min=0), 0)
    # A reset ends everything as its step begins.
    part = torch.where(late.isinf(), 1.0, (-math.log(2) - late) / (early - late)).clamp(0, 1)
    whole, exact = (x.double().where(ended.any(0), torch.inf)[0] for x in (first, first - part))
    return whole, exact


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", cases.FORMS)
def test_equals_adding_up_from_each_token(form: str, packed: bool, kind: str) -> None:
    rec = mixed(form, lengths=[LENGTH, 2500])
    if packed:
        reset = torch.zeros(2, LENGTH, dtype=torch.bool)
        reset[:, ::900] = True
        rec = changed(rec, reset=reset)
    at = [0, 1, 700, 2499, -1]
    whole = memory.half_life(rec, kind, at=at).value.reshape(2, 5, 3, -1)
    exact = memory.half_life(rec, kind, at=at, interpolate=True).value.reshape(2, 5, 3, -1)
    assert whole.isfinite().any()
    assert packed or whole.isinf()[:, :, 2].all()
    for b, length in enumerate((LENGTH, 2500)):
        for i, token in enumerate(at):
            tokens, fractions = reference(rec, kind, b, token % length)
            assert torch.equal(whole[b, i], tokens)
            # The clock counts a reset as 1000 nats, of which the first ln 2 end everything.
            slack = 1e-3 if packed else 0.0
            torch.testing.assert_close(exact[b, i], fractions, rtol=1e-10, atol=slack)
    assert memory.half_life(rec, kind, at=[3000]).value[1].isnan().all()


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("form", cases.FORMS)
def test_windows_of_any_size_and_the_whole_clock_agree(form: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rec, at = mixed(form), [0, 5, 1000, LENGTH - 2, LENGTH - 1]
    found = memory.half_life(rec, kind, at=at).value
    every = memory.half_life(rec, kind, at=range(LENGTH)).value
    assert torch.equal(found, every[:, at])
    for width in (1, 7, 1000):
        monkeypatch.setattr(crossing, "WINDOW", width)
        assert torch.equal(memory.half_life(rec, kind, at=at).value, found)
    monkeypatch.setattr("ssmlens.analyses._layers.BLOCK_ENTRIES", 1)
    assert torch.equal(memory.half_life(rec, kind, at=at).value, found)


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("k", [WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW, 3 * WINDOW + 1, 5000])
def test_exactly_one_half_at_the_edge_of_a_window(k: int, kind: str) -> None:
    rec = cases.constant(0.5 ** (1 / k), 3 * k + 1)
    for token in (k - 1, k, 2 * k, 2 * k + 1):
        room = 3 * k - token if kind == "forward" else token
        expected = k if room >= k else math.inf
        assert memory.half_life(rec, kind, at=[token]).value.item() == expected


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_what_ends_early_costs_its_own_length(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that are added up, and not only those that are returned."""
    seen: list[int] = []
    ticks = clock.Steps.ticks

    def counted(steps: clock.Steps) -> Tensor:
        found = ticks(steps)
        seen.append(found.numel())
        return found

    monkeypatch.setattr(clock.Steps, "ticks", counted)
    costs = []
    for length in (20_000, 200_000):
        seen.clear()
        half = memory.half_life(cases.constant(0.99, length), kind, at=[length // 4, length // 2]).value
        assert half.flatten().tolist() == [69.0, 69.0]
        costs.append(list(seen))
    assert costs[0] == costs[1] == [2 * WINDOW, 4 * WINDOW]


def test_what_never_ends_costs_no_more_than_a_few_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    ticks = clock.Steps.ticks

    def counted(steps: clock.Steps) -> Tensor:
        found = ticks(steps)
        seen.append(found.numel())
        return found

    monkeypatch.setattr(clock.Steps, "ticks", counted)
    length, at = 100_000, list(range(0, 1000, 10))
    never = cases.constant(1.0 - 1e-9, length)
    assert memory.half_life(never, "forward", at=at).value.isinf().all()
    assert sum(seen) <= 4 * length
    seen.clear()
    # A state without any decay is known to last.
    frozen = changed(cases.random("per-state", batch=1, length=LENGTH), A=torch.zeros(3, 4, dtype=torch.float64))
    assert memory.half_life(frozen, "forward", at=[0]).value.isinf().all()
    assert not seen
