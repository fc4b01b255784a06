"""Windows full of questions about told values: what the recall stage of the English models reads.

A key-value text of :mod:`ssmlens.zoo.keyvalue` asks each key once, and a window cut anywhere often misses the
telling. Here every window starts with the first token of a passage, and what follows the telling is one
question after another, so that a window holds tens of recalls instead of a few. Windows are ordered: prose
between telling and asking, and the number of pairs, grow along them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np

from .keyvalue import STYLES, Answer, KeyValueText, distinct, generate

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

__all__ = ["Windows", "asked_tokens", "make_windows", "passage"]

BLOCK = 250  # windows made with one random state, so that the number of processes changes nothing


@dataclass(frozen=True)
class Windows:
    """ids (windows, tokens) uint16, and asked (windows, tokens) bool: tokens of a value told before."""

    ids: np.ndarray
    asked: np.ndarray


def passage(
    rng: random.Random, fillers: Sequence[str], pairs: int, gap: int, interruption: float, size: int
) -> KeyValueText:
    """One text: pairs are told, prose follows, then keys are asked at random until the text is long enough.

    Args:
        rng: the source of every choice.
        fillers: paragraphs to put in between.
        pairs: how many pairs.
        gap: paragraphs between the telling and the first question; 0 continues the line.
        interruption: chance of a paragraph before each later question.
        size: characters after which nothing more is asked.

    Returns:
        the text, its pairs and every repeated value, each with the place where it was told.
    """
    style = rng.choice(STYLES)
    keys, values = distinct(rng, style.key, pairs), distinct(rng, style.value, pairs)
    forms = style.ask if rng.random() < 0.4 else (rng.choice(style.ask),)
    pieces: list[str] = []
    length = 0

    def put(piece: str) -> int:
        nonlocal length
        pieces.append(piece)
        length += len(piece)
        return length - len(piece)

    def prose(paragraphs: int) -> str:
        lines = "".join(f"\n\n{rng.choice(fillers)}" for _ in range(paragraphs))
        return f"{lines}\n\n" if paragraphs else style.separator

    source: list[tuple[int, int]] = []
    for i, (key, value) in enumerate(zip(keys, values)):
        put((style.separator if i else "") + style.tell[0].format(key))
        source.append((put(value), length))
        put(style.tell[1])
    put(prose(gap))
    answers: list[Answer] = []
    while length < size:
        i = rng.randrange(pairs)
        before, after = rng.choice(forms)
        put(before.format(keys[i]))
        answers.append(Answer(put(values[i]), length, *source[i], i))
        put(after + prose(int(rng.random() < interruption)))
    return KeyValueText("".join(pieces), tuple(zip(keys, values)), tuple(answers))


def _draw(rng: random.Random, fillers: Sequence[str], difficulty: float, size: int) -> KeyValueText:
    """A text of a difficulty in [0, 1]: mostly without prose at 0; at 1 mostly like those that are measured."""
    pairs = rng.randint(2, 3 + round(5 * min(1.0, 2 * difficulty)))
    if rng.random() > 0.1 + 0.8 * difficulty:
        return passage(rng, fillers, pairs, 0, 0.0, size)
    if rng.random() < 0.5:
        return generate(rng, fillers, pairs)
    return passage(rng, fillers, pairs, rng.randint(0, 1 + round(3 * difficulty)), rng.choice((0.0, 0.1, 0.3)), size)


def asked_tokens(encoding: Encoding, text: KeyValueText) -> np.ndarray:
    """Which tokens of an encoded text hold a part of a repeated value, bool (tokens,)."""
    starts, stops = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    asked = np.zeros(len(starts), dtype=bool)
    for answer in text.answers:
        asked[np.searchsorted(stops, answer.start, "right") : np.searchsorted(starts, answer.stop, "left")] = True
    return asked


def _window(
    rng: random.Random, tokenizer: Tokenizer, fillers: Sequence[str], difficulty: float, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """One window: whole passages, each after the end-of-text token, the last one cut at the window's end."""
    ids, asked = [], []
    room = tokens
    while room > 0:
        text = _draw(rng, fillers, difficulty, 4 * room)
        encoding = tokenizer.encode(text.text)
        ids.append(np.array([0, *encoding.ids], dtype=np.uint16))
        asked.append(np.append(False, asked_tokens(encoding, text)))
        room -= len(ids[-1])
    return np.concatenate(ids)[:tokens], np.concatenate(asked)[:tokens]


_SHARED: tuple[Tokenizer, list[str]]


def _share(tokenizer_json: str, fillers: list[str]) -> None:
    from tokenizers import Tokenizer

    global _SHARED
    _SHARED = Tokenizer.from_str(tokenizer_json), fillers


def _block(task: tuple[int, int, list[float], int]) -> tuple[np.ndarray, np.ndarray]:
    seed, number, difficulties, tokens = task
    rng = random.Random(f"{seed}/{number}")
    made = [_window(rng, *_SHARED, difficulty, tokens) for difficulty in difficulties]
    return np.stack([ids for ids, _ in made]), np.stack([asked for _, asked in made])


def make_windows(tokenizer_json: str, fillers: list[str], count: int, length: int, seed: int, jobs: int = 1) -> Windows:
    """Windows in order of difficulty.

    Args:
        tokenizer_json: the tokenizer.
        fillers: paragraphs to put between telling and asking.
        count: windows.
        length: tokens of a window, not counting the one to predict.
        seed: equal seeds give equal windows, whatever ``jobs`` is.
        jobs: processes.

    Returns:
        count windows of length + 1 tokens.

    Raises:
        ValueError: when there is no filler, or the windows are too short to ask anything.
    """
    if not fillers:
        raise ValueError("the recall stage needs at least one filler paragraph")
    difficulties = np.linspace(0, 1, count).tolist()
    tasks = [(seed, i, difficulties[i : i + BLOCK], length + 1) for i in range(0, count, BLOCK)]
    if jobs == 1:
        _share(tokenizer_json, fillers)
        made = [_block(task) for task in tasks]
    else:
        with ProcessPoolExecutor(jobs, get_context("spawn"), _share, (tokenizer_json, fillers)) as pool:
            made = list(pool.map(_block, tasks))
    windows = Windows(np.concatenate([ids for ids, _ in made]), np.concatenate([asked for _, asked in made]))
    if not windows.asked.any():
        raise ValueError(f"windows of {length} tokens are too short to tell values and ask for them")
    return windows
