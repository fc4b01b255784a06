"""Held-out prompts of the shipped models: what a comparison of methods is run on.

English models: 60 beginnings of paragraphs of Persuasion, which no model was trained on, and 60 generated texts in
which told values are asked for. Recall models: texts of their task that end at an asked key. Where the answer was told
is known for the last two.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from . import path, recall_task

__all__ = ["Question", "questions"]

_SEED = 30_000
_PAIRS = 8


@dataclass(frozen=True)
class Question:
    """One prompt: ``ids`` up to where the answer is read, the ``target`` id where the right answer is known, and
    ``source``, the positions that tell it: its tokens and the one behind them, in which the convolution may write the
    pair. ``kind`` is "prose", "recall" or "task"."""

    ids: list[int]
    target: int | None
    source: tuple[int, ...]
    kind: str


def questions(name: str, count: int = 120) -> list[Question]:
    """The first ``count`` held-out prompts of a shipped model, kinds in turn.

    Args:
        name: one of `ssmlens.zoo.names`.
        count: how many; the English models have 120.

    Raises:
        KeyError: for a name that is none of them.
        ValueError: when there are fewer.
    """
    if count < 1:
        raise ValueError(f"count is 1 or more, got {count}")
    found = _task(count) if name.endswith("-recall") else _english(name)
    if count > len(found):
        raise ValueError(f"count is 1 to {len(found)} for {name}, got {count}")
    return found[:count]


def _task(count: int) -> list[Question]:
    made = recall_task.batch(count, recall_task.TRAINING_LENGTH, _PAIRS, _SEED)
    found = []
    for i in range(count):
        k = i % made.asked.shape[1]
        asked, told = int(made.asked[i, k]), int(made.source[i, k])
        ids, target = made.ids[i, : asked + 1].tolist(), int(made.targets[i, asked])
        found.append(Question(ids, target, (told, told + 1), "task"))
    return found


def _english(name: str) -> list[Question]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path(name) / "tokenizer.json"))
    lines = (Path(__file__).parent / "passages" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prose, recall = [], []
    for line in map(json.loads, lines):
        encoded = tokenizer.encode(line["text"])
        if line["kind"] == "prose":
            prose.append(Question(encoded.ids, None, (), "prose"))
            continue
        start, stop = line["source"]
        told = [k for k, (a, z) in enumerate(encoded.offsets) if a < stop and z > start]
        target = tokenizer.encode(f"{line['text']} {line['answer']}").ids[len(encoded.ids)]
        recall.append(Question(encoded.ids, target, (*told, told[-1] + 1), "recall"))
    return [q for pair in zip(prose, recall, strict=True) for q in pair]
