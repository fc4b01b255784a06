"""Tasks in plain English: prompts end before their answer, which they tell, and scores count what they say."""

from __future__ import annotations

import hashlib
import math

import pytest

from ssmlens import tasks

CASES = [
    ("passkey_text", {}), ("passkey_text", {"blocks": 0, "digits": 3}), ("passkey_text", {"depth": 1.0}),
    ("needle_text", {}), ("needle_text", {"blocks": 0, "keys": 1}),
    ("needle_text", {"question_first": True, "keys": 32}), ("phonebook_text", {}), ("phonebook_text", {"entries": 3}),
    ("phonebook_text", {"question_first": True, "entries": 99}),
]  # fmt: skip

GOLDEN = {
    "passkey_text": "eae63fd22bc34840",
    "needle_text": "de2bbd66ae6c33fa",
    "phonebook_text": "876313b98b28d050",
}


@pytest.mark.parametrize("name", ["passkey_text", "needle_text", "phonebook_text"])
def test_prompts_are_those_of_any_machine(name):
    batch = tasks.make(name).batch(4, 11)
    again = tasks.make(name).batch(4, 11)
    assert batch.prompts == again.prompts
    assert batch.prompts != tasks.make(name).batch(4, 12).prompts
    content = "\0".join([*batch.prompts, *batch.answers]).encode()
    assert hashlib.sha256(content).hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_prompt_tells_the_answer_and_asks_for_it(name, settings):
    task = tasks.make(name, **settings)
    batch = task.batch(30, 1)
    assert len(batch) == len(batch.prompts) == len(batch.answers) == 30
    for prompt, answer, source in zip(batch.prompts, batch.answers, batch.facts["source"]):
        assert prompt[source : source + len(answer)] == answer
        assert not prompt.endswith((" ", answer))
        assert task.oracle(prompt) == answer
    assert task.score(batch.answers, batch) == 1.0
    assert task.distance(batch.answers, batch) == 0.0
    assert task.score(["no idea"] * 30, batch) == 0.0


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_baselines_reach_their_closed_forms(name, settings):
    task = tasks.make(name, **settings)
    batch = task.batch(300, 2)
    for guess, expected in task.baselines.items():
        margin = 4 * math.sqrt(expected * (1 - expected) / 300)
        assert task.score(task.guess(batch, guess, 3), batch) == pytest.approx(expected, abs=margin + 1e-12)


def test_passkey_depths_are_spread_and_hold():
    batch = tasks.PasskeyText(blocks=100).batch(10, 0)
    assert batch.facts["depth"].tolist() == pytest.approx([(i + 0.5) / 10 for i in range(10)])
    for prompt, depth, source in zip(batch.prompts, batch.facts["depth"], batch.facts["source"]):
        assert source / len(prompt) == pytest.approx(depth, abs=0.02)
        assert prompt.count("The grass is green.") == 100


def test_the_same_question_may_stand_first():
    plain, first = tasks.PhonebookText(), tasks.PhonebookText(question_first=True)
    for a, b in zip(plain.batch(3, 5).prompts, first.batch(3, 5).prompts):
        assert b == f"Look up {a.splitlines()[-1].rstrip(':')}.\n\n{a}"


@pytest.mark.parametrize(
    ("a", "b", "steps"),
    [("", "", 0), ("kitten", "sitting", 3), ("555-1234", "555-1243", 2), ("", "abc", 3), ("flaw", "lawn", 2)],
)
def test_edit_distance(a, b, steps):
    assert tasks.edit_distance(a, b) == tasks.edit_distance(b, a) == steps


def test_replies_may_say_more_but_distance_counts_it():
    batch = tasks.PasskeyText(digits=2).batch(2, 0)
    replies = [f"It is {answer}." for answer in batch.answers]
    assert tasks.PasskeyText.score(replies, batch) == 1.0
    assert tasks.PasskeyText.distance(replies, batch) == 7.0
    with pytest.raises(ValueError):
        tasks.PasskeyText.score(replies[:1], batch)
