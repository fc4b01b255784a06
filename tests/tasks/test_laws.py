"""Laws of every task on tokens or numbers: shapes, determinism, oracles, and baselines at their closed forms."""

from __future__ import annotations

import hashlib
import math
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from ssmlens import tasks
from ssmlens.errors import SsmlensError
from ssmlens.tasks import checks

VARIANTS = {
    "mqar": [
        {},
        {"length": 32, "pairs": 8, "fillers": "random"},
        {"length": 96, "pairs": 8, "passes": 2},
        {"pairs": 1},
    ],
    "phonebook_tokens": [{}, {"question_first": True}, {"entries": 1, "digits": 1}, {"entries": 64}],
    "passkey": [{}, {"length": 11}, {"depth": 0.0}, {"depth": 1.0, "length": 40}, {"digits": 1, "length": 3}],
    "needles": [{}, {"keys": 3, "per_key": 2, "asked": 2}, {"keys": 1}, {"keys": 32, "length": 256}, {"length": 14}],
    "variables": [{}, {"chains": 1, "hops": 0}, {"chains": 4, "hops": 3}],
    "frequent_word": [{}, {"kinds": 2, "often": 2, "rarely": 1}],
    "copy": [{}, {"count": 1}, {"count": 40, "symbols": 2}],
    "selective_copy": [{}, {"stretch": 8, "count": 8}],
    "induction": [{}, {"length": 4}],
    "parity": [{}, {"length": 1}],
    "group_word": [{}, {"group": "A5"}, {"group": "Z7", "length": 33}, {"group": "S4"}],
    "newlines": [{}, {"length": 2, "token": 255}],
    "outliers": [{}, {"share": 0.0}, {"share": 1.0}, {"patterns": 3, "examples": 7}],
    "lorenz": [{"length": 30}, {"length": 5, "every": 1, "burn": 0}],
    "mackey_glass": [{"length": 30}, {"length": 5, "tau": 30, "burn": 10}],
    "narma": [{"length": 30}, {"length": 5, "order": 2, "burn": 0}],
}
CASES = [(name, settings) for name, many in VARIANTS.items() for settings in many]
ANSWERED = [case for case in CASES if case[0] not in ("lorenz", "mackey_glass", "narma")]
TOKENS = [case for case in CASES if case[0] not in ("outliers", "lorenz", "mackey_glass", "narma")]
# Expected scores are shares over asked places, of which there are at least this many.
ANSWERS = 4_000


def digest(batch):
    """Of inputs and targets, the same on any machine."""
    content = b"".join(x.contiguous().numpy().tobytes() for x in (batch.ids, batch.targets))
    return hashlib.sha256(content).hexdigest()[:16]


def test_every_task_is_here():
    texts = {name for name in tasks.names() if isinstance(tasks.make(name), tasks.TextTask)}
    assert set(VARIANTS) | texts == set(tasks.names())


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_same_arguments_same_batch(name, settings):
    task = tasks.make(name, **settings)
    first, again, other = task.batch(6, 3), tasks.make(name, **settings).batch(6, 3), task.batch(6, 4)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.targets, again.targets)
    assert {k: v.tolist() for k, v in first.facts.items()} == {k: v.tolist() for k, v in again.facts.items()}
    constant = name == "newlines" or (name == "outliers" and settings.get("examples") == 0)
    assert constant or not torch.equal(first.ids, other.ids) or not torch.equal(first.targets, other.targets)


# Written once, from this code; a machine, a numpy or a change of the generators that gives other batches shows here.
GOLDEN = {
    "mqar": "30aa43a533a22d6c",
    "phonebook_tokens": "656e1255119ac701",
    "passkey": "7f024bd4a51a87c1",
    "needles": "ca416eaa04eed70d",
    "variables": "b3517fc838483d9c",
    "frequent_word": "6d3cb6b0a93b623b",
    "copy": "20d720a5f11aec0e",
    "selective_copy": "e96067b72f93dcfc",
    "induction": "0f0c3fd9b38480c9",
    "parity": "5156627aaf313a6b",
    "group_word": "ece3ce303979c837",
    "newlines": "ce7c69c77cfb5877",
    "outliers": "6b187fdce68ac2a3",
    "lorenz": "b5203aec5360c0a1",
    "mackey_glass": "b2157fb296a81ecf",
    "narma": "fc38996e146a774f",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_batches_are_those_of_any_machine(name):
    assert digest(tasks.make(name).batch(5, 11)) == GOLDEN[name]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_shapes_and_ranges(name, settings):
    task = tasks.make(name, **settings)
    batch = task.batch(7, 1)
    ids, targets, mask = batch
    assert len(batch) == len(ids) == 7
    assert mask.dtype == torch.bool
    assert mask.shape == ids.shape[:2]
    assert mask.any(1).all()
    if isinstance(task, tasks.TokenTask):
        assert ids.dtype == targets.dtype == torch.int64
        assert ids.shape == targets.shape == (7, task.length)
        assert 0 <= int(ids.min()) <= int(ids.max()) < task.n_tokens == len(task.words()) == len(set(task.words()))
        assert torch.equal(mask, targets != tasks.IGNORE)
        assert set(targets[mask].tolist()) <= set(task.answers)
    else:
        assert ids.dtype == targets.dtype == torch.float64
        assert torch.isfinite(ids).all()
        assert torch.isfinite(targets).all()


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_oracle_answers_from_the_inputs(name, settings):
    task = tasks.make(name, **settings)
    batch = task.batch(50, 2)
    found = task.oracle(batch)
    if isinstance(task, tasks.Forecast):
        assert task.score(found, batch) < 1e-20
    else:
        assert task.score(found, batch) == 1.0
    if isinstance(task, tasks.TokenTask):
        assert torch.equal(found, batch.targets)
        assert task.whole(found, batch) == 1.0


@pytest.mark.parametrize(("name", "settings"), TOKENS)
def test_the_source_tells_the_answer(name, settings):
    task = tasks.make(name, **settings)
    batch = task.batch(20, 5)
    if "source" not in batch.facts:
        assert name in ("frequent_word", "parity", "group_word", "newlines")  # no single token tells it
        return
    source = batch.facts["source"]
    told = batch.ids.gather(1, source)
    answers = torch.stack([row[asked] for row, asked in zip(batch.targets, batch.mask)])
    if name == "mqar":  # told in the order of the pairs, asked in another
        answers = batch.targets.gather(1, batch.facts["asked"])
    assert torch.equal(told.sort(1).values, answers.sort(1).values) if name == "needles" else torch.equal(told, answers)
    assert bool((source.max(1).values < batch.mask.long().argmax(1) + batch.mask.sum(1)).all())


@pytest.mark.parametrize(("name", "settings"), ANSWERED)
def test_baselines_reach_their_closed_forms(name, settings):
    task = tasks.make(name, **settings)
    one = task.batch(1, 0)
    rows = max(400, ANSWERS // int(one.mask.sum()))
    batch = task.batch(rows, 21)
    for guess, expected in task.baselines.items():
        found = task.score(task.guess(batch, guess, 22), batch)
        # Rows are independent but answers of a row may not be: the error is that of independent rows.
        margin = 4 * math.sqrt(expected * (1 - expected) / rows)
        assert found == pytest.approx(expected, abs=margin + 1e-12), guess
    assert task.chance == max(task.baselines.values())


@pytest.mark.parametrize("name", ["lorenz", "mackey_glass", "narma"])
def test_the_mean_has_a_relative_error_of_one(name):
    task = tasks.make(name, length=40)
    batch = task.batch(10, 0)
    assert task.score(task.guess(batch, "mean"), batch) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", tasks.names())
def test_frozen_with_settings(name):
    task = tasks.make(name)
    assert task.settings["task"] == name
    assert set(task.settings) - {"task"} == {field.name for field in fields(task)}
    with pytest.raises(FrozenInstanceError):
        setattr(task, fields(task)[0].name, 1)
    assert hash(task) == hash(tasks.make(name))
    with pytest.raises(SsmlensError, match="no baseline 'luck'"):
        task.guess(task.batch(1), "luck")


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.name)
def test_checks(check):
    outcome = check()
    assert outcome.passed, outcome


def test_a_random_predictor_of_logits_scores_as_its_largest():
    task = tasks.Copy(4, 3)
    batch = task.batch(5, 0)
    logits = torch.nn.functional.one_hot(batch.targets.clamp(min=0), 4).double()
    assert task.score(logits, batch) == task.whole(logits, batch) == 1.0
    wrong = batch.targets.clone()
    wrong[0, -1] = 1 + wrong[0, -1] % 3
    assert task.score(wrong, batch) == pytest.approx(19 / 20)
    assert task.whole(wrong, batch) == pytest.approx(4 / 5)


REFUSED = [
    ("mqar", {"length": 31}), ("mqar", {"pairs": 17}), ("mqar", {"pairs": 0}), ("mqar", {"fillers": "noise"}),
    ("mqar", {"vocabulary": 63}), ("phonebook_tokens", {"entries": 65}), ("passkey", {"length": 10}),
    ("passkey", {"depth": 1.5}), ("needles", {"asked": 5}), ("needles", {"length": 13}), ("variables", {"hops": 40}),
    ("frequent_word", {"rarely": 8}), ("copy", {"count": 0}), ("selective_copy", {"count": 65}),
    ("induction", {"length": 3}), ("parity", {"group": "S3"}), ("group_word", {"group": "B2"}),
    ("group_word", {"group": "S6"}), ("newlines", {"token": 256}), ("outliers", {"share": 2.0}),
    ("lorenz", {"dt": 0.1}), ("mackey_glass", {"tau": 0}), ("narma", {"order": 20}), ("passkey_text", {"digits": 0}),
    ("needle_text", {"keys": 33}), ("phonebook_text", {"entries": 2}), ("mqar", {"size": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), REFUSED)
def test_settings_that_do_not_fit_are_refused_in_a_sentence(name, settings):
    with pytest.raises(SsmlensError) as error:
        tasks.make(name, **settings)
    assert "\n" not in str(error.value)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(SsmlensError, match="mqar, phonebook_tokens"):
        tasks.make("mqra")
    with pytest.raises(SsmlensError, match="lorenz, mackey_glass, narma"):
        tasks.forecast("henon")
    with pytest.raises(SsmlensError, match="0 or larger"):
        tasks.MQAR().batch(1, -1)


def test_short_names_are_the_same_classes():
    assert (tasks.mqar, tasks.passkey, tasks.niah) == (tasks.MQAR, tasks.Passkey, tasks.Needles)
    assert tasks.forecast("lorenz", length=3) == tasks.Lorenz(length=3)
