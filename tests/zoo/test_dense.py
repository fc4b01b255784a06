"""Dense windows: every asked value was told before it, in the same passage, and exactly its tokens are marked."""

import random

import numpy as np
import pytest

from ssmlens.zoo.dense import BLOCK, asked_tokens, make_windows, passage

FILLERS = ["The captain walked to the window and looked out.", "Nobody spoke for some time after that."]


@pytest.mark.parametrize("seed", range(40))
def test_answers_are_the_told_values(seed):
    rng = random.Random(seed)
    pairs, gap = 2 + seed % 7, seed % 4
    made = passage(rng, FILLERS, pairs, gap, 0.3 * (seed % 2), 800)
    assert len(made.pairs) == len(dict(made.pairs)) == len({v for _, v in made.pairs}) == pairs
    assert made.answers
    for answer in made.answers:
        key, value = made.pairs[answer.pair]
        assert answer.source_stop < answer.start
        assert made.text[answer.start : answer.stop] == value
        assert made.text[answer.source_start : answer.source_stop] == value
        for place in (answer.start, answer.source_start):
            assert key in made.text[max(0, place - len(key) - 20) : place]
    told = max(a.source_stop for a in made.answers)
    first = min(a.start for a in made.answers)
    assert made.text[told:first].count("\n\n") == (gap + 1 if gap else 0)


def test_asking_stops_at_the_size():
    for size in (300, 900):
        made = passage(random.Random(1), FILLERS, 4, 0, 0.0, size)
        assert made.answers[-2].stop < size <= len(made.text) < size + 100


def test_asked_tokens_are_those_that_touch_an_answer(pack):
    for seed in range(10):
        made = passage(random.Random(seed), FILLERS, 5, seed % 3, 0.2, 600)
        encoding = pack.tokenizer.encode(made.text)
        touch = [any(a < x.stop and b > x.start for x in made.answers) for a, b in encoding.offsets]
        assert asked_tokens(encoding, made).tolist() == touch
        assert any(touch)


@pytest.fixture(scope="module")
def windows(pack):
    return make_windows(pack.tokenizer_json, FILLERS, BLOCK + 10, 160, seed=5)


def test_windows_start_a_passage_and_ask_what_it_told(pack, windows):
    assert windows.ids.shape == windows.asked.shape == (BLOCK + 10, 161)
    assert windows.ids.dtype == np.uint16
    assert (windows.ids[:, 0] == 0).all()
    tokenizer, checked = pack.tokenizer, 0
    for ids, asked in zip(windows.ids[::7].tolist(), windows.asked[::7].tolist()):
        for stop in (i for i in range(2, len(ids)) if asked[i - 1] and not asked[i]):
            start = max(i for i in range(stop) if not asked[i]) + 1
            opened = max(i for i in range(start) if ids[i] == 0)
            value = tokenizer.decode(ids[start:stop]).strip()
            assert value
            assert value in tokenizer.decode(ids[opened + 1 : start])
            checked += 1
    assert checked > 50


def test_windows_depend_on_the_seed_alone(pack, windows):
    again = make_windows(pack.tokenizer_json, FILLERS, BLOCK + 10, 160, seed=5, jobs=2)
    assert np.array_equal(again.ids, windows.ids)
    assert np.array_equal(again.asked, windows.asked)
    other = make_windows(pack.tokenizer_json, FILLERS, 20, 160, seed=6)
    assert not np.array_equal(other.ids, windows.ids[:20])


def test_windows_become_harder(pack, windows):
    """Prose between telling and asking grows along the windows, so that fewer tokens are asked."""
    density = windows.asked.mean(1)
    assert density[:50].mean() > 1.5 * density[-50:].mean() > 0


def test_refusals(pack):
    with pytest.raises(ValueError, match="at least one filler"):
        make_windows(pack.tokenizer_json, [], 4, 96, 0)
    with pytest.raises(ValueError, match="too short"):
        make_windows(pack.tokenizer_json, FILLERS, 4, 4, 0)
