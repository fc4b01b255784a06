"""The score of recall from context: an oracle gets 1, one that is a token late 0, and only first questions count."""

import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ssmlens.zoo.evaluate import KEY_VALUE_SEED, key_value_recall
from ssmlens.zoo.keyvalue import generate, sentences

TEXTS = 30


def touching(encoding, answer):
    """The tokens of a text that hold a part of an answer."""
    return [i for i, (a, b) in enumerate(encoding.offsets) if a < answer.stop and b > answer.start]


class Oracle(torch.nn.Module):
    """Knows the texts that will be asked; ``shift`` 1 names the next token, 0 the token it reads.

    known: a function of a text's answers that says which of them it may name; of the rest it names nothing right.
    cut: whether it misses the last token of every value of several tokens.
    """

    def __init__(self, tokenizer, narrative, shift=1, known=lambda answers: answers, cut=False):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))
        rng, fillers = random.Random(KEY_VALUE_SEED), sentences(narrative)
        self.best = []
        self.shortest = 100  # fewest tokens of a value
        for _ in range(TEXTS):
            made = generate(rng, fillers)
            encoding = tokenizer.encode(made.text)
            best = [0, *encoding.ids][shift : shift + len(encoding.ids)]
            named = list(known(made.answers))
            for answer in made.answers:
                places = touching(encoding, answer)
                self.shortest = min(self.shortest, len(places))
                wrong = places if answer not in named else places[1:][-1:] if cut else []
                for i in wrong:
                    best[i] = 0  # the end of a text, which no value is
            self.best.append(best)
        self.best.reverse()

    def forward(self, ids, use_cache):
        return SimpleNamespace(logits=F.one_hot(torch.tensor([self.best.pop()]), 320).float())


def firsts(answers):
    return {a.pair: a for a in reversed(answers)}.values()


def repeats(answers):
    """The questions about a pair that was asked before."""
    return [a for a in answers if a not in firsts(answers)]


def score(pack, narrative, **how):
    return key_value_recall(Oracle(pack.tokenizer, narrative, **how), pack.tokenizer, narrative, TEXTS)


def test_a_perfect_predictor_scores_one(pack, narrative):
    found = score(pack, narrative)
    assert found["accuracy"] == 1.0
    assert set(found["by_pairs"].values()) == {1.0}
    rng, fillers = random.Random(KEY_VALUE_SEED), sentences(narrative)
    texts = [generate(rng, fillers) for _ in range(TEXTS)]
    assert found["questions"] == sum(len(t.pairs) for t in texts)
    assert found["chance"] == pytest.approx(TEXTS / found["questions"])


def test_a_shifted_predictor_scores_zero(pack, narrative):
    assert score(pack, narrative, shift=0)["accuracy"] == 0.0


def test_only_first_questions_count(pack, narrative):
    assert score(pack, narrative, known=firsts)["accuracy"] == 1.0
    assert score(pack, narrative, known=repeats)["accuracy"] == 0.0


def test_half_of_the_questions_is_half(pack, narrative):
    found = score(pack, narrative, known=lambda answers: [a for a in answers if a.pair == 0])
    assert found["accuracy"] == pytest.approx(found["chance"])  # one pair of each text


def test_every_token_of_a_value_counts(pack, narrative):
    oracle = Oracle(pack.tokenizer, narrative, cut=True)
    assert oracle.shortest > 1
    assert key_value_recall(oracle, pack.tokenizer, narrative, TEXTS)["accuracy"] == 0.0
