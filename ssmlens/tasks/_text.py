"""Tasks in plain English: a passkey, needles and a phonebook, as prompts with the answers they ask for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

from ._base import Draws, need

__all__ = ["NeedleText", "PasskeyText", "PhonebookText", "TextBatch", "TextTask", "edit_distance"]

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PREFIX = "There is important information hidden in a lot of irrelevant text. Find it and memorize it."
FIRST = (
    "Ada", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jonas", "Kate", "Leo", "Maria", "Noah",
    "Olga", "Paul", "Quinn", "Rosa", "Simon", "Tessa", "Uma", "Victor", "Wanda", "Xenia", "Yusuf", "Zoe",
)  # fmt: skip
LAST = (
    "Abbott", "Baker", "Carver", "Dalton", "Ellis", "Foster", "Garner", "Holt", "Ingram", "Jarvis", "Keller", "Lowell",
    "Mercer", "Norris", "Osborn", "Porter", "Quigley", "Ramsey", "Sutton", "Turner", "Underhill", "Vaughn", "Walker",
    "Young", "Zimmer", "Ashford",
)  # fmt: skip
THINGS = (
    "anchor", "bottle", "candle", "drum", "engine", "feather", "garden", "hammer", "island", "jacket", "kettle",
    "ladder", "mirror", "needle", "orchard", "pillow", "quarry", "ribbon", "saddle", "table", "umbrella", "violin",
    "window", "yard", "zipper", "basket", "carpet", "desert", "forest", "glacier", "harbor", "lantern",
)  # fmt: skip


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements of characters that turn a into b (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@dataclass(frozen=True)
class TextBatch:
    """Prompts and what they ask for.

    Args:
        prompts: texts that end right before the answer.
        answers: the answer to each.
        facts: more about each prompt, by name; (b,) or (b, k) arrays. ``source`` has the character at which the
            answer is told.
    """

    prompts: list[str]
    answers: list[str]
    facts: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)


class TextTask(ABC):
    """A task in plain text: a frozen dataclass of its settings; ``batch(n, seed)`` draws n prompts."""

    name: ClassVar[str]

    @abstractmethod
    def batch(self, n: int, seed: int = 0) -> TextBatch:
        """Draw n prompts; the same arguments give the same ones on any machine."""

    @abstractmethod
    def oracle(self, prompt: str) -> str:
        """The answer, found in the prompt alone."""

    @property
    @abstractmethod
    def baselines(self) -> dict[str, float]:
        """Expected ``score`` of each simple predictor, in closed form."""

    @abstractmethod
    def guess(self, batch: TextBatch, name: str, seed: int = 0) -> list[str]:
        """What the simple predictor ``name`` answers."""

    @property
    def chance(self) -> float:
        """The best of the baselines."""
        return max(self.baselines.values())

    @property
    def settings(self) -> dict[str, Any]:
        """The task's name and every setting."""
        return {"task": self.name, **asdict(self)}  # type: ignore[call-overload]

    @staticmethod
    def score(replies: Sequence[str], batch: TextBatch) -> float:
        """Share of replies that contain the answer, in [0, 1]; what published passkey scores count."""
        return float(np.mean([answer in reply for reply, answer in zip(replies, batch.answers, strict=True)]))

    @staticmethod
    def distance(replies: Sequence[str], batch: TextBatch) -> float:
        """Mean edit distance of the replies from the answers, in characters: how fuzzy the memory is."""
        return float(np.mean([edit_distance(r, a) for r, a in zip(replies, batch.answers, strict=True)]))

    def _known(self, name: str) -> None:
        need(name in self.baselines, f"{self.name} has no baseline {name!r}: they are {', '.join(self.baselines)}")


def _number(digits: np.ndarray) -> str:
    return "".join(map(str, digits))


@dataclass(frozen=True)
class PasskeyText(TextTask):
    """The passkey task in English: filler blocks, one block with the passkey, and the question.

    The layout of Mohtashami and Jaggi 2023 (arXiv:2305.16300) as Stuffed Mamba uses it. A passkey of 5 digits is at
    most log2(100,000) = 16.6 bits: finding it shows reach, not capacity.

    Args:
        blocks: filler blocks of 19 words.
        digits: of the passkey.
        depth: share of the blocks before it, in [0, 1]; spread evenly over the rows of a batch when None.
    """

    name: ClassVar[str] = "passkey_text"
    blocks: int = 20
    digits: int = 5
    depth: float | None = None

    def __post_init__(self) -> None:
        need(self.blocks >= 0 and self.digits >= 1, "there are 0 or more blocks and at least 1 digit")
        need(self.depth is None or 0 <= self.depth <= 1, f"depth is a share from 0 to 1, got {self.depth}")

    @property
    def baselines(self) -> dict[str, float]:
        """``uniform``: any number of so many digits."""
        return {"uniform": 0.1**self.digits}

    def batch(self, n: int, seed: int = 0) -> TextBatch:
        """Facts: ``depth`` (b,) share of the blocks before the passkey, ``source`` (b,) its first character."""
        keys = Draws(seed).integers(0, 10, n, self.digits)
        depth = (np.arange(n) + 0.5) / n if self.depth is None else np.full(n, self.depth)
        prompts, source = [], []
        for key, share in zip(keys, depth):
            before = round(share * self.blocks)
            front = " ".join([PREFIX, *[FILLER] * before, "The passkey is "])
            told = f"{_number(key)}. Remember it. {_number(key)} is the passkey."
            rest = " ".join([*[FILLER] * (self.blocks - before), "What is the passkey? The passkey is"])
            prompts.append(f"{front}{told} {rest}")
            source.append(len(front))
        return TextBatch(prompts, [_number(key) for key in keys], {"depth": depth, "source": np.array(source)})

    def oracle(self, prompt: str) -> str:
        return prompt.split("The passkey is ")[1].split(".")[0]

    def guess(self, batch: TextBatch, name: str, seed: int = 0) -> list[str]:
        self._known(name)
        return [_number(key) for key in Draws(seed).integers(0, 10, len(batch), self.digits)]


@dataclass(frozen=True)
class NeedleText(TextTask):
    """Needles in English filler: numbers told for things, one of which is asked (the "multi-key" task of RULER).

    Args:
        blocks: filler blocks of 19 words.
        keys: things with a number.
        digits: of a number; all numbers of a prompt are different.
        question_first: whether the question also stands before the text.
    """

    name: ClassVar[str] = "needle_text"
    blocks: int = 20
    keys: int = 4
    digits: int = 4
    question_first: bool = False

    def __post_init__(self) -> None:
        need(self.blocks >= 0, f"there are 0 or more blocks, got {self.blocks}")
        need(2 <= self.digits <= 9, f"a number has 2 to 9 digits, got {self.digits}")
        need(1 <= self.keys <= len(THINGS), f"keys are 1 to {len(THINGS)}, got {self.keys}")

    @property
    def baselines(self) -> dict[str, float]:
        """``told``: the number of any thing."""
        return {"told": 1 / self.keys}

    def batch(self, n: int, seed: int = 0) -> TextBatch:
        """Facts: ``source`` (b,) first character of the told answer, ``key`` (b,) which needle is asked."""
        draws = Draws(seed)
        things = draws.order(n, len(THINGS))[:, : self.keys]
        size = 10**self.digits // self.keys  # each number from a range of its own, so that no two are equal
        numbers = draws.integers(0, size, n, self.keys) + size * draws.order(n, self.keys)
        places = np.sort(draws.integers(0, self.blocks + 1, n, self.keys), 1)
        asked = draws.integers(0, self.keys, n)
        prompts, answers, source = [], [], []
        for row in range(n):
            told = [f"{x:0{self.digits}d}" for x in numbers[row]]
            question = f"What is the number of the {THINGS[things[row, asked[row]]]}?"
            text = question if self.question_first else PREFIX
            for i, number in enumerate(told):
                gap = places[row, i] - (places[row, i - 1] if i else 0)
                text += f" {FILLER}" * gap + f" The number of the {THINGS[things[row, i]]} is "
                if i == asked[row]:
                    source.append(len(text))
                text += f"{number}."
            text += f" {FILLER}" * (self.blocks - places[row, -1]) + f" {question} The number is"
            prompts.append(text)
            answers.append(told[asked[row]])
        return TextBatch(prompts, answers, {"source": np.array(source), "key": asked})

    def _told(self, prompt: str) -> dict[str, str]:
        parts = prompt.split("The number of the ")[1:]
        return {part.split(" is ")[0]: part.split(" is ")[1].split(".")[0] for part in parts}

    def oracle(self, prompt: str) -> str:
        asked = prompt.rsplit("What is the number of the ", 1)[1].split("?")[0]
        return self._told(prompt)[asked]

    def guess(self, batch: TextBatch, name: str, seed: int = 0) -> list[str]:
        self._known(name)
        which = Draws(seed).integers(0, self.keys, len(batch))
        return [list(self._told(p).values())[i] for p, i in zip(batch.prompts, which)]


@dataclass(frozen=True)
class PhonebookText(TextTask):
    """A phonebook in English: lines of a name and a number, two solved examples, and one name to be looked up.

    Source: Jelassi et al. 2024 (arXiv:2402.01032); Waleffe et al. 2024 (arXiv:2406.07887), who also ask first
    ("reversed"). ``distance`` tells a fuzzy memory from none.

    Args:
        entries: lines.
        question_first: whether the examples and the question stand before the list too.
    """

    name: ClassVar[str] = "phonebook_text"
    entries: int = 10
    question_first: bool = False

    def __post_init__(self) -> None:
        most = len(FIRST) * len(LAST)
        need(3 <= self.entries <= most, f"entries are 3 to {most} (two are the examples), got {self.entries}")

    @property
    def baselines(self) -> dict[str, float]:
        """``told``: the number of any line that is no example."""
        return {"told": 1 / (self.entries - 2)}

    def batch(self, n: int, seed: int = 0) -> TextBatch:
        """Facts: ``source`` (b,) first character of the told answer, ``entry`` (b,) its line."""
        draws = Draws(seed)
        people = draws.order(n, len(FIRST) * len(LAST))[:, : self.entries]
        # The first three digits differ between the lines of a prompt, so no two numbers are equal.
        area = draws.order(n, 900)[:, : self.entries] + 100
        rest = draws.integers(0, 10_000, n, self.entries)
        asked = draws.order(n, self.entries)[:, :3]
        prompts, answers, source = [], [], []
        for row in range(n):
            names = [f"{FIRST[i // len(LAST)]} {LAST[i % len(LAST)]}" for i in people[row]]
            numbers = [f"{a}-{r:04d}" for a, r in zip(area[row], rest[row])]
            lines = [f"{name}: {number}\n" for name, number in zip(names, numbers)]
            one, two, last = asked[row]
            shots = f"\n{lines[one]}{lines[two]}{names[last]}:"
            text = f"Look up {names[last]}.\n\n" if self.question_first else ""
            source.append(len(text) + sum(map(len, lines[:last])) + len(names[last]) + 2)
            prompts.append(text + "".join(lines) + shots)
            answers.append(numbers[last])
        return TextBatch(prompts, answers, {"source": np.array(source), "entry": asked[:, 2]})

    def _told(self, prompt: str) -> dict[str, str]:
        return dict(line.split(": ") for line in prompt.split("\n") if ": " in line)

    def oracle(self, prompt: str) -> str:
        return self._told(prompt)[prompt.rsplit("\n", 1)[1].rstrip(":")]

    def guess(self, batch: TextBatch, name: str, seed: int = 0) -> list[str]:
        self._known(name)
        which = Draws(seed).integers(0, self.entries - 2, len(batch))
        replies = []
        for prompt, i in zip(batch.prompts, which):
            examples = set(prompt.rsplit("\n\n", 1)[1].split("\n")[:2])
            rest = [number for name, number in self._told(prompt).items() if f"{name}: {number}" not in examples]
            replies.append(rest[i])
        return replies
