"""The Kneser-Ney baseline against hand arithmetic, against a dictionary version, and as a distribution."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from ssmlens.zoo.corpus import synthetic_text
from ssmlens.zoo.data import build
from ssmlens.zoo.ngram import KneserNey, baseline, discounts


def slow(tokens, vocabulary, order):
    """The same model, written with dictionaries and no packing."""
    counts = {order: Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))}
    for k in range(order - 1, 0, -1):
        counts[k] = Counter(gram[1:] for gram in counts[k + 1])
    d = {k: (0.0, *discounts(np.array(list(c.values())))) for k, c in counts.items()}
    after = {k: defaultdict(dict) for k in counts}
    for k, c in counts.items():
        for gram, n in c.items():
            after[k][gram[:-1]][gram[-1]] = n

    def probability(context, token):
        p = 1 / vocabulary
        for k in range(1, order + 1):
            seen = after[k].get(tuple(context[len(context) - k + 1 :]))
            if seen is None:
                break
            n, total = seen.get(token, 0), sum(seen.values())
            left = sum(d[k][min(m, 3)] for m in seen.values())
            p = (max(n - d[k][min(n, 3)], 0) + left * p) / total
        return p

    return probability


def test_bigram_by_hand():
    # a b a b a c: bigrams ab 2, ba 2, ac 1. Discounts fall back to .5, 1, 1.5.
    # Continuation counts: b 1 (after a), a 1 (after b), c 1 (after a); of 3, each discounted by .5.
    model = KneserNey(np.array([0, 1, 0, 1, 0, 2]), vocabulary=3, order=2)
    unigram = (1 - 0.5) / 3 + (1.5 / 3) / 3  # = 1/3 for each token
    p = model.probability(np.array([[0], [0], [0], [1]]), np.array([1, 2, 0, 0]))
    left = (1 + 0.5) / 3  # after a: D2 for ab, D1 for ac, of 3
    expected = [(2 - 1) / 3 + left * unigram, (1 - 0.5) / 3 + left * unigram, left * unigram, 1 / 2 + 1 / 2 * unigram]
    assert p == pytest.approx(expected, rel=1e-6)  # counts are stored in float32


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_dictionary_version_and_sums_to_one(order):
    rng = np.random.default_rng(0)
    tokens = rng.choice(6, p=[0.4, 0.25, 0.15, 0.1, 0.05, 0.05], size=3000)
    model, reference = KneserNey(tokens, 7, order), slow(tokens.tolist(), 7, order)
    contexts = rng.integers(0, 7, (40, order - 1))  # token 6 was never seen
    every = np.stack([model.probability(contexts, np.full(40, w)) for w in range(7)], 1)
    assert every.sum(1) == pytest.approx(np.ones(40), rel=1e-5)
    assert every.min() > 0
    expected = [[reference(c.tolist(), w) for w in range(7)] for c in contexts]
    assert every == pytest.approx(np.array(expected), rel=1e-5)


def test_discounts_are_chen_and_goodmans():
    counts = np.repeat([1, 2, 3, 4], [40, 20, 10, 5])
    y = 40 / (40 + 2 * 20)
    assert discounts(counts) == pytest.approx((1 - 2 * y * 20 / 40, 2 - 3 * y * 10 / 20, 3 - 4 * y * 5 / 10))
    assert discounts(np.array([1, 1, 5])) == (0.5, 1.0, 1.5)


def test_bits_per_byte_of_a_uniform_model():
    model = KneserNey(np.arange(8).repeat(1), vocabulary=8, order=1)
    # one occurrence of each token: a uniform model, 3 bits a token; 4 tokens after the first, 12 bytes
    assert model.bits_per_byte([np.array([0, 1, 2, 3, 4])], n_bytes=12) == pytest.approx(1.0, rel=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="64 bits"):
        KneserNey(np.zeros(10, int), 2**20, 5)
    with pytest.raises(ValueError, match="fewer than the order"):
        KneserNey(np.zeros(3, int), 4, 5)


def test_baseline_scores_every_group(tmp_path):
    pack = build(synthetic_text(tmp_path / "text"), 320, key_value_tokens=500)
    result = baseline(pack)
    scores = result["bits_per_byte"]
    assert set(scores) == {"Persuasion", "Macbeth", "addresses", "countries", "all"}
    sizes = {g: sum(h.n_bytes for h in pack.held_out if h.group == g) for g in scores if g != "all"}
    mean = sum(scores[g] * n for g, n in sizes.items()) / sum(sizes.values())
    assert scores["all"] == pytest.approx(mean)
    assert result["training_tokens"] == sum(n for name, n in pack.meta["tokens"].items() if name != "keyvalue")
