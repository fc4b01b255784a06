"""The implicit attention of the recall models points at the pair that answers, where the truth is known."""

import json
from types import SimpleNamespace

import pytest
import torch

import ssmlens
from ssmlens import zoo
from ssmlens.zoo import recall_task
from ssmlens.zoo.pointing import AFTER, CHOICE_SEED, asked_rows, choose_heads, measure, pointed, share
from ssmlens.zoo.recipes import make_model, recipe

SEED = 60_000  # none of those that heads were chosen or card numbers measured with
RECALL = ("mamba1-recall", "mamba2-recall")


def log(name):
    return json.loads((zoo.path(name) / "training.json").read_text(encoding="utf-8"))["attention"]


@pytest.fixture(scope="module", params=RECALL)
def model(request):
    return SimpleNamespace(name=request.param, lens=ssmlens.load(request.param), log=log(request.param))


def rows_of(lens, layer, heads, made):
    """Rows of asked keys (b, h, k, s) on a batch of the task."""
    return asked_rows(lens.trace(made.ids, layers=[layer])[layer].recurrence.attention.dense(heads), made)


@pytest.mark.parametrize("pairs", recall_task.TRAINING_PAIRS)
def test_attention_points_at_the_right_pair(model, pairs):
    # Measured: 100.0 % for both models at every load; a single chosen head of Mamba-1 at 96 % or more.
    made = recall_task.batch(40, recall_task.TRAINING_LENGTH, pairs, SEED + pairs)
    rows = rows_of(model.lens, model.log["layer"], model.log["heads"], made)
    together = rows.mean(1)
    right = pointed(together, made.source).double().mean()
    assert right >= 0.98
    assert share(rows, made).min() >= 0.9
    # It is the token right after the value that was read: there the convolution has seen key and value.
    assert (together.argmax(-1) == made.source + 1).double().mean() >= 0.98

    # Controls: the pair that another key of the text asks for, and the pair told last.
    other = made.source.roll(1, dims=1)
    assert pointed(together, other).double().mean() <= 0.02
    last = made.source[:, -1:].expand_as(made.source)
    assert float(pointed(together, last).double().mean()) == pytest.approx(1 / pairs, abs=0.02)


def test_the_attention_follows_the_question(model):
    """The same pairs with another key at the end: the last row moves to the pair of that key."""
    told = "c 7 a 19 k 3 r 24 m 0"
    words = told.split()
    for place, (key, value) in enumerate(zip(words[::2], words[1::2])):
        trace = model.lens.trace(f"{told} . . . . {key}")
        row = trace[model.log["layer"]].recurrence.attention.reduce("mean", model.log["heads"])[0, -1]
        assert int(row[1:].argmax()) + 1 == 2 * place + 2
        assert model.lens.tokenizer.decode([int(trace.logits[0, -1].argmax())]) == value


def test_the_size_over_all_heads_does_not_show_it(model):
    """What the sign and the choice of heads are for: mean_abs over all heads lies elsewhere for most keys."""
    made = recall_task.batch(40, recall_task.TRAINING_LENGTH, 16, SEED)
    attention = model.lens.trace(made.ids, layers=[1])[1].recurrence.attention
    assert share(asked_rows(attention.reduce("mean_abs")[:, None], made), made) <= 0.6


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_an_untrained_model_points_nowhere(family):
    """The head that is chosen as best of an untrained model is no better than chance on fresh sequences."""
    plan = recipe(f"{family}-recall")
    torch.manual_seed(3)
    lens = ssmlens.load(make_model(plan.family, plan.config).eval())
    layer, heads = choose_heads(lens, sequences=8)
    assert len(heads) == 1
    made = recall_task.batch(40, recall_task.TRAINING_LENGTH, 16, SEED + 1)
    assert share(rows_of(lens, layer, heads, made), made) <= 0.12


def test_the_cards_numbers_come_back():
    """The heads of the card are those that the choice finds, and its shares those that are measured."""
    found = measure(zoo.path("mamba2-recall"))
    logged = log("mamba2-recall")
    assert found["by_pairs"] == [{k: pytest.approx(v, abs=0.01) for k, v in row.items()} for row in logged["by_pairs"]]
    assert {k: found[k] for k in ("layer", "heads", "of")} == {k: logged[k] for k in ("layer", "heads", "of")}


def test_pointing_by_hand():
    made = recall_task.batch(1, 8, 2, CHOICE_SEED)
    asked, source = made.asked[0], made.source[0]
    assert source.tolist() == [1, 3]
    attention = torch.zeros(1, 3, 8, 8)
    attention[:, :, :, 0] = 5.0  # the first token is no candidate
    for head, offset in enumerate((0, AFTER, AFTER + 1)):
        for t, s in zip(asked.tolist(), source.tolist()):
            attention[0, head, t, s + offset] = 1.0
            attention[0, head, t, t + 1 :] = 9.0  # nor is anything after the asking one
    assert share(asked_rows(attention, made), made).tolist() == [1.0, 1.0, 0.0]
    rows = asked_rows(attention, made)
    assert pointed(rows, source.flip(0)).sum(-1)[0].tolist() == [0, 0, 1]  # one past a pair is the next pair's value
