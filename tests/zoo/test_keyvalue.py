"""Every asked value really stands earlier in the text, and nowhere else can it be read off."""

import random

import pytest

from ssmlens.zoo.keyvalue import generate, sentences

FILLERS = ["The captain walked to the window and looked out.", "Nobody spoke for some time after that."]


@pytest.mark.parametrize("seed", range(60))
def test_answers_are_recoverable_from_their_source(seed):
    made = generate(random.Random(seed), FILLERS)
    keys, values = zip(*made.pairs)
    assert len(set(keys)) == len(keys)
    assert len(set(values)) == len(values)
    assert {a.pair for a in made.answers} == set(range(len(made.pairs)))
    for answer in made.answers:
        key, value = made.pairs[answer.pair]
        assert answer.source_stop < answer.start
        assert made.text[answer.start : answer.stop] == value
        assert made.text[answer.source_start : answer.source_stop] == value
        for place in (answer.start, answer.source_start):  # the key stands right before both
            assert key in made.text[max(0, place - len(key) - 20) : place]


def test_equal_seeds_give_equal_texts():
    texts = [[generate(random.Random(s), FILLERS) for s in range(5)] for _ in range(2)]
    assert texts[0] == texts[1]
    assert len({made.text for made in texts[0]}) == 5


def test_values_cannot_be_guessed_from_the_key():
    values = set()
    for seed in range(300):
        values |= {v for k, v in generate(random.Random(seed), FILLERS).pairs if k == "Anna"}
    assert len(values) > 10


def test_number_of_pairs_and_its_limits():
    assert len(generate(random.Random(0), FILLERS, pairs=5).pairs) == 5
    with pytest.raises(ValueError, match="1 to 12"):
        generate(random.Random(0), FILLERS, pairs=13)
    with pytest.raises(ValueError, match="filler"):
        generate(random.Random(0), [])


def test_sentences_keep_short_paragraphs_on_one_line():
    document = f"Too short.\n\n{'A line that is long enough,'}\nbroken in two by the printer.\n\n{'x' * 500}"
    assert sentences(document) == ["A line that is long enough, broken in two by the printer."]
