"""Edited states, carried on: against a model stepped through by hand, and the cache against whole passes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import gap
from footprint import assert_same, fingerprint
from stepper import step_through
from torch import Tensor

import ssmlens
from ssmlens.errors import LayerError, SsmlensError
from ssmlens.interventions import StateEdit, steer

FAMILIES = ["mamba1", "falcon", "mamba2"]
IDS = [3, 17, 0, 36, 5, 5, 21, 9, 30, 2, 11]


@pytest.fixture(scope="module", params=FAMILIES)
def lens(request: pytest.FixtureRequest) -> ssmlens.Lens:
    return ssmlens.load(getattr(checkpoints, request.param)(), dtype=torch.float64)


def shape(lens: ssmlens.Lens) -> tuple[int, int, int]:
    rec = lens.trace([1])[0].recurrence
    return rec.n_heads, rec.head_dim, rec.d_state


def by_hand(lens: ssmlens.Lens, change: Any, layer: int, steps: list[int], read: str, ids: list[int] = IDS) -> Tensor:
    place = "state" if read == "now" else "carried"

    def put(name: str, k: int, t: int, value: Tensor) -> Tensor:
        return change(value) if name == place and k == layer and t in steps else value

    return step_through(lens.model, ids, put)


@pytest.mark.parametrize("read", ["now", "next"])
def test_edits_are_what_their_definition_says(lens: ssmlens.Lens, read: str) -> None:
    h, p, n = shape(lens)
    vector = torch.randn(h, p, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cases: list[tuple[StateEdit, Any, list[int]]] = [
        (StateEdit(0, 4, add=vector), lambda s: s + vector, [4]),
        (StateEdit(1, [2, -3], scale=0.3), lambda s: s * 0.3, [2, 8]),
        (StateEdit(1, 5, set=0), torch.zeros_like, [5]),
        (StateEdit(0, 5, set=vector, scale=2.0, add=1.0), lambda s: vector * 2 + 1, [5]),
        (StateEdit(0, range(3, 6), function=torch.tanh), torch.tanh, [3, 4, 5]),
        (StateEdit(1, None, add=0.1), lambda s: s + 0.1, list(range(11))),
    ]
    for edit, change, steps in cases:
        found = steer(lens, IDS, edit, read=read)
        assert found.method == "forward"
        assert gap(found.logits[0], by_hand(lens, change, edit.layer, steps, read)) <= 1e-12
        written = steer(lens, IDS, {f.name: getattr(edit, f.name) for f in fields(edit)}, read=read)
        assert torch.equal(written.logits, found.logits)

    def some(s: Tensor) -> Tensor:
        out = s.clone()
        out[[1, -1]] *= 3
        return out

    found = steer(lens, IDS, StateEdit(0, 4, scale=3.0, heads=[1, -1]), read=read)
    assert gap(found.logits[0], by_hand(lens, some, 0, [4], read)) <= 1e-12
    before = lens.trace(IDS).logits[0]
    first = 4 if read == "now" else 5
    assert gap(found.logits[0, :first], before[:first]) <= 1e-12
    assert gap(found.logits[0, first:], before[first:]) > 1e-6


def test_several_edits_apply_in_order(lens: ssmlens.Lens) -> None:
    edits = [StateEdit(0, 4, add=1.0), StateEdit(0, 4, scale=2.0), StateEdit(0, 7, scale=0.5)]

    def put(name: str, k: int, t: int, value: Tensor) -> Tensor:
        if name != "state" or k != 0:
            return value
        return (value + 1) * 2 if t == 4 else value * 0.5 if t == 7 else value

    assert gap(steer(lens, IDS, edits).logits[0], step_through(lens.model, IDS, put)) <= 1e-12


@pytest.mark.parametrize("read", ["now", "next"])
@pytest.mark.parametrize("temperature", [0.0, 30.0])
@pytest.mark.parametrize("ids", [IDS, IDS[:2], [7]], ids=len)
def test_the_cache_carries_an_edit_as_a_whole_pass_does(
    lens: ssmlens.Lens, read: str, temperature: float, ids: list[int]
) -> None:
    edits = [StateEdit(0, -1, add=0.5), StateEdit(1, 0, scale=-2.0)]
    runs = {
        method: steer(lens, ids, edits, new_tokens=5, temperature=temperature, seed=3, read=read, method=method)
        for method in ("auto", "recompute")
    }
    cached, whole = runs["auto"], runs["recompute"]
    assert (cached.method, whole.method) == ("cache", "recompute")
    assert cached.generated == whole.generated
    assert cached.logits.shape == (1, len(ids) + 5, 37)
    assert gap(cached.logits, whole.logits) <= 1e-12
    assert cached.ids.tolist() == [ids + cached.generated[0]]
    steps = {0: [len(ids) - 1], 1: [0]}

    def put(name: str, k: int, t: int, value: Tensor) -> Tensor:
        if name != ("state" if read == "now" else "carried") or t not in steps[k]:
            return value
        return value + 0.5 if k == 0 else value * -2.0

    assert gap(whole.logits[0], step_through(lens.model, cached.ids[0].tolist(), put)) <= 1e-12
    if temperature == 0:
        assert cached.generated[0] == cached.logits[0, len(ids) - 1 : -1].argmax(-1).tolist()
    else:
        other = steer(lens, ids, edits, new_tokens=5, temperature=temperature, seed=4, read=read)
        assert other.generated != cached.generated


def test_edits_of_generated_tokens(lens: ssmlens.Lens) -> None:
    edit = StateEdit(1, [4, 12, 14], add=0.4)
    found = steer(lens, IDS, edit, new_tokens=5)
    assert found.method == "recompute"
    ids = found.ids[0].tolist()
    assert gap(found.logits[0], by_hand(lens, lambda s: s + 0.4, 1, [4, 12, 14], "now", ids)) <= 1e-12
    every = steer(lens, IDS, StateEdit(1, None, add=0.4), new_tokens=3)
    ids = every.ids[0].tolist()
    assert gap(every.logits[0], by_hand(lens, lambda s: s + 0.4, 1, list(range(14)), "now", ids)) <= 1e-12
    with pytest.raises(SsmlensError, match="cannot edit at generated tokens"):
        steer(lens, IDS, edit, new_tokens=5, method="cache")


def test_a_batch_is_its_rows(lens: ssmlens.Lens) -> None:
    class Characters:
        def encode(self, text: str) -> list[int]:
            return [ord(c) % 37 for c in text]

        def decode(self, ids: list[int]) -> str:
            return "".join(chr(65 + i) for i in ids)

    reader, texts = ssmlens.Lens(lens.model, Characters(), "characters"), ["0123456789a", "345678"]
    edit = StateEdit(0, -2, scale=-1.0)
    for new_tokens in (0, 4):
        both = steer(reader, texts, edit, new_tokens=new_tokens)
        for i, text in enumerate(texts):
            one = steer(reader, text, edit, new_tokens=new_tokens)
            length = int(one.lengths[0])
            assert int(both.lengths[i]) == length
            assert gap(both.logits[i, :length], one.logits[0]) <= 1e-12
            assert both.generated[i] == one.generated[0]
            assert both.text[i] == one.text[0] == "".join(chr(65 + i) for i in one.generated[0])
            assert both.ids[i, :length].tolist() == one.ids[0].tolist()


def test_a_limited_step_size_is_not_left_to_the_cache() -> None:
    """transformers' own single step does not limit dt, so its cache would say something else."""
    lens = ssmlens.load(checkpoints.mamba2(time_step_limit=(0.0, 0.3)), dtype=torch.float64)
    edit = StateEdit(0, 3, scale=0.5)
    found = steer(lens, IDS, edit, new_tokens=4)
    assert found.method == "recompute"
    truth = by_hand(lens, lambda s: s * 0.5, 0, [3], "now", found.ids[0].tolist())
    assert gap(found.logits[0], truth) <= 1e-12
    with pytest.raises(SsmlensError, match="does not limit dt"):
        steer(lens, IDS, edit, new_tokens=4, method="cache")


@pytest.mark.parametrize("name", ["mamba1-recall", "mamba2-recall"])
def test_moving_a_state_moves_what_a_recall_model_says(name: str) -> None:
    """With the states of another text after its pairs, the model answers from that text."""
    lens = ssmlens.load(name)
    told, other = "r 7 a 19 m 3 b 12 .", "r 4 a 25 m 8 b 11 ."
    asked = " . . r"
    length = len(lens.tokenizer.encode(told))
    assert length == len(lens.tokenizer.encode(other))
    source = lens.trace(other)
    edits = [StateEdit(k, length - 1, set=source[k].recurrence.final_state()) for k in source.mixers]

    def answer(logits: Tensor) -> str:
        return str(lens.tokenizer.decode([int(logits[0, -1].argmax())]))

    assert answer(lens.trace(told + asked).logits) == "7"
    assert answer(lens.trace(other + asked).logits) == "4"
    assert answer(steer(lens, told + asked, edits, read="next").logits) == "4"


@pytest.mark.parametrize(
    ("edit", "options", "words"),
    [
        ([], {}, "edit is empty"),
        ({"layer": 0}, {}, "names no change"),
        ({"layer": 0, "at": 3, "add": 1.0}, {}, "an edit names its layer and some of step, add"),
        ({"step": 3, "add": 1.0}, {}, "an edit names its layer"),
        ([0], {}, "an edit is a StateEdit, got int"),
        (StateEdit(0, 3), {}, "names no change"),
        (StateEdit(0, [], add=1.0), {}, "has no step"),
        (StateEdit(0, 11, add=1.0), {}, "step holds position 11"),
        (StateEdit(0, 16, add=1.0), {"new_tokens": 5}, "step holds position 16"),
        (StateEdit(0, -1, add=1.0), {"read": "next"}, "touch nothing"),
        (StateEdit(2, 3, add=1.0), {}, "layer 2 does not exist"),
        (StateEdit(0, 3, add=1.0, heads=[]), {}, "names no head"),
        (StateEdit(0, 3, add=1.0, heads=[99]), {}, "head 99 does not exist"),
        (StateEdit(0, 3, add=1.0, heads=[0.5]), {}, "head 0.5 does not exist"),  # type: ignore[list-item]
        (StateEdit(0, 3, add=1.0, heads=2), {}, "heads of an edit is a list of head indices, got 2"),  # type: ignore[arg-type]
        (StateEdit(0, 1.5, add=1.0), {}, "step holds token positions"),  # type: ignore[arg-type]
        (StateEdit(0, 3, add=torch.ones(99)), {}, r"add of an edit is .* got a tensor \(99,\)"),
        (StateEdit(0, 3, set="0"), {}, "set of an edit is a number or a tensor .* got '0'"),  # type: ignore[arg-type]
        (StateEdit(0, 3, function=lambda h: h[0]), {}, "an edit returns a state like"),
        (StateEdit(0, 3, add=1.0), {"read": "then"}, "unknown read"),
        (StateEdit(0, 3, add=1.0), {"method": "fast"}, "unknown method"),
        (StateEdit(0, 3, add=1.0), {"new_tokens": -1}, "at least 0"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(
    lens: ssmlens.Lens, edit: Any, options: dict[str, Any], words: str
) -> None:
    before = fingerprint(lens.model)
    with pytest.raises(SsmlensError, match=words) as caught:
        steer(lens, IDS, edit, **options)
    assert "\n" not in str(caught.value)
    assert_same(before, fingerprint(lens.model))


def test_errors_have_their_types(lens: ssmlens.Lens) -> None:
    with pytest.raises(LayerError):
        steer(lens, IDS, StateEdit(7, 3, add=1.0))
    with pytest.raises(LayerError):
        steer(lens, IDS, StateEdit(0, 3, add=1.0, heads=[99]))


def test_the_model_is_left_as_it_was(lens: ssmlens.Lens) -> None:
    lens.model.train()
    before = fingerprint(lens.model)
    steer(lens, IDS, StateEdit(0, 3, add=1.0), new_tokens=2)

    def fail(h: Tensor) -> Tensor:
        raise RuntimeError("the edit failed")

    with pytest.raises(RuntimeError, match="the edit failed"):
        steer(lens, IDS, StateEdit(0, 3, function=fail), new_tokens=2)
    assert_same(before, fingerprint(lens.model))
    lens.model.eval()
