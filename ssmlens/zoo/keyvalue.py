"""Generated lines whose answer stands earlier in the same text, so that recall from context can be learnt and seen.

"The code of the red box is K7. ... (other text) ... The code of the red box is K7." Values are drawn at
random, so nothing but the earlier line can predict the second one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["STYLES", "Answer", "KeyValueText", "Style", "distinct", "generate", "sentences"]

# ruff: noqa: SIM905 -- word lists read better as text

ADJECTIVES = (
    "red blue green white black brown grey golden silver old new small large round square narrow broken "
    "heavy quiet distant northern southern eastern western first second third last upper lower"
).split()
THINGS = (
    "box door gate chest key ship boat tower bridge house garden cabin lantern drawer cellar barrel letter "
    "map room coach table mill inn stable wall harbour island field well clock"
).split()
ROLES = "captain keeper master owner guard cook doctor clerk pilot steward teacher servant".split()
NAMES = (
    "Anna Arthur Alice Andrew Charles Clara Daniel Edward Eleanor Elizabeth Emma Fanny Frank Frederick George "
    "Harriet Helen Henry Isabella James Jane John Julia Louisa Lucy Margaret Maria Mary Michael Oliver Peter "
    "Philip Rachel Richard Robert Samuel Sarah Simon Sophia Susan Thomas Walter William"
).split()
GOODS = "salt wheat wool iron rope oil paper coal timber cotton sugar wine cloth silk copper glass".split()
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


@dataclass(frozen=True)
class Answer:
    """One value asked again: character ranges [start, stop) of the repeat and of its source, and the pair."""

    start: int
    stop: int
    source_start: int
    source_stop: int
    pair: int


@dataclass(frozen=True)
class KeyValueText:
    """A text with its pairs (key, value) and every place where a value is asked again."""

    text: str
    pairs: tuple[tuple[str, str], ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Style:
    """How a pair is told and asked: each template is text before the value and text after it."""

    key: Callable[[random.Random], str]
    value: Callable[[random.Random], str]
    tell: tuple[str, str]
    ask: tuple[tuple[str, str], ...]
    separator: str


def _thing(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(THINGS)}"


def _code(rng: random.Random) -> str:
    return rng.choice(LETTERS) + str(rng.randint(1, 99))


def _amount(rng: random.Random) -> str:
    return str(rng.randint(10, 999))


def _name(rng: random.Random) -> str:
    return rng.choice(NAMES)


def _office(rng: random.Random) -> str:
    return f"{rng.choice(ROLES)} of the {_thing(rng)}"


STYLES = (
    Style(
        _thing,
        _code,
        ("The code of the {} is ", "."),
        (
            ("The code of the {} is ", "."),
            ("Question: What is the code of the {}? Answer: ", "."),
        ),
        " ",
    ),
    Style(
        _office,
        _name,
        ("The {} is called ", "."),
        (("The {} is called ", "."), ("Question: What is the {} called? Answer: ", ".")),
        " ",
    ),
    Style(_name, _amount, ("{}: ", ""), (("{}: ", ""),), "\n"),
    Style(
        lambda rng: rng.choice(GOODS),
        _amount,
        ("The price of {} is ", "."),
        (("The price of {} is ", "."), ("Question: What is the price of {}? Answer: ", ".")),
        " ",
    ),
    Style(_name, _code, ("{} has the ticket ", "."), (("{} has the ticket ", "."),), " "),
)


def distinct(rng: random.Random, draw: Callable[[random.Random], str], count: int) -> list[str]:
    """``count`` different words that ``draw`` makes, in the order drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(rng)] = None
    return list(found)


def sentences(document: str, shortest: int = 40, longest: int = 240) -> list[str]:
    """The paragraphs of a document that are short enough to stand between a line and its question.

    Args:
        document: text whose paragraphs are separated by two newlines.
        shortest: fewest characters.
        longest: most characters.
    """
    lines = (" ".join(p.split()) for p in document.split("\n\n"))
    return [line for line in lines if shortest <= len(line) <= longest]


def generate(rng: random.Random, fillers: Sequence[str], pairs: int | None = None) -> KeyValueText:
    """One text: pairs are told, other text follows, and every pair is asked again in another order.

    Args:
        rng: the source of every choice; equal states give equal texts.
        fillers: paragraphs to put in between (at least one).
        pairs: how many pairs; 2 to 8 when None.

    Returns:
        the text, its pairs and where each value is repeated.

    Raises:
        ValueError: when there is no filler or ``pairs`` is outside 1 to 12.
    """
    if not fillers:
        raise ValueError("generate() needs at least one filler paragraph")
    count = rng.randint(2, 8) if pairs is None else pairs
    if not 1 <= count <= 12:
        raise ValueError(f"pairs is 1 to 12, got {count}")
    style = rng.choice(STYLES)
    keys, values = distinct(rng, style.key, count), distinct(rng, style.value, count)
    pieces: list[str] = []
    source: list[tuple[int, int]] = []
    answers: list[Answer] = []

    def put(piece: str) -> int:
        start = sum(map(len, pieces))
        pieces.append(piece)
        return start

    def fill(lines: int) -> None:
        for _ in range(lines):
            put(f"\n\n{rng.choice(fillers)}")
        put("\n\n")

    spread = rng.random() < 0.3  # sometimes other text also stands between the pairs
    for i, (key, value) in enumerate(zip(keys, values)):
        put(style.tell[0].format(key))
        start = put(value)
        source.append((start, start + len(value)))
        last = i + 1 == count
        interrupted = spread and not last and rng.random() < 0.5
        put(style.tell[1] + ("" if last or interrupted else style.separator))
        if interrupted:
            fill(1)
    fill(rng.choice((0, 1, 1, 2, 3)))
    order = [i for _ in range(rng.choice((1, 1, 2))) for i in rng.sample(range(count), count)]
    ask = rng.choice(style.ask)
    for j, i in enumerate(order):
        put(ask[0].format(keys[i]))
        start = put(values[i])
        answers.append(Answer(start, start + len(values[i]), *source[i], i))
        put(ask[1] + (style.separator if j + 1 < len(order) else ""))
    return KeyValueText("".join(pieces), tuple(zip(keys, values)), tuple(answers))
