"""What can be chosen of a study: a control each, bound to the address, and read into an argument of the library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import streamlit as st

from ssmlens.errors import SsmlensError

__all__ = ["Choices", "Flag", "Number", "Option", "Text", "Whole", "Wholes", "draw", "listed", "shortened"]

COLUMNS = 3
"""Controls side by side."""


@dataclass(frozen=True)
class Text:
    """What options depend on.

    Args:
        tokens: length of the text, or of each stretch of it that a study reads.
        layers: indices of the layers that have a recurrence.
    """

    tokens: int
    layers: tuple[int, ...]


class Option(Protocol):
    """One argument of a study.

    Attributes:
        name: the argument.
        label: what the control says.
    """

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...

    def control(self, key: str) -> Any:
        """Draw the control; returns what it holds."""

    def read(self, held: Any, text: Text) -> Any:
        """The argument. Raises SsmlensError, in one sentence that names the valid choices."""

    def told(self, value: Any) -> str:
        """The argument in words; empty where it is the default."""


@dataclass(frozen=True)
class Whole:
    """A whole number from ``least`` to ``most``."""

    name: str
    label: str
    help: str
    default: int
    least: int
    most: int

    def control(self, key: str) -> Any:
        """The control."""
        return st.number_input(
            self.label, self.least, self.most, self.default, key=key, bind="query-params", help=self.help
        )

    def read(self, held: Any, text: Text) -> int:
        """The number."""
        return int(held)

    def told(self, value: Any) -> str:
        """The number, with the label."""
        return "" if value == self.default else f"{self.label}: {value}"


@dataclass(frozen=True)
class Number:
    """A number from ``least`` to ``most``."""

    name: str
    label: str
    help: str
    default: float
    least: float
    most: float

    def control(self, key: str) -> Any:
        """The control."""
        return st.number_input(
            self.label,
            self.least,
            self.most,
            self.default,
            step=self.least,
            format="%g",
            key=key,
            bind="query-params",
            help=self.help,
        )

    def read(self, held: Any, text: Text) -> float:
        """The number."""
        return float(held)

    def told(self, value: Any) -> str:
        """The number, with the label."""
        return "" if value == self.default else f"{self.label}: {value:g}"


@dataclass(frozen=True)
class Wholes:
    """Whole numbers as they are typed: "1, 4, 16" or "0-3"; one alone where ``single``. Nothing typed means None.

    Args:
        within: what they lie in: "layers"; "tokens", 1 to the length; "cuts", 1 to one less; "before", 0 to one less;
            or "ranks", from 0.
        empty: what it means when nothing is typed.
    """

    name: str
    label: str
    help: str
    empty: str
    within: str
    single: bool = False

    def control(self, key: str) -> Any:
        """The control."""
        return st.text_input(self.label, placeholder=self.empty, key=key, bind="query-params", help=self.help)

    def read(self, held: Any, text: Text) -> int | tuple[int, ...] | None:
        """The number, or all of them in order."""
        if not str(held).strip():
            return None
        valid = self._valid(text)
        choose = f"{self.label} takes {'one of' if self.single else 'numbers of'} {_span(valid)}"
        choose += ", or nothing for " + self.empty
        found = sorted(set(_numbers(str(held), choose)))
        wrong = [x for x in found if x not in valid]
        if wrong:
            raise SsmlensError(f"{choose}; {wrong[0]} is not among them")
        if self.single and len(found) != 1:
            raise SsmlensError(f"{choose}; got {listed(found)}")
        return found[0] if self.single else tuple(found)

    def told(self, value: Any) -> str:
        """The numbers, with the label."""
        return "" if value is None else f"{self.label}: {shortened([value] if self.single else value)}"

    def _valid(self, text: Text) -> Sequence[int]:
        if self.within == "layers":
            return text.layers
        return {
            "tokens": range(1, text.tokens + 1),
            "cuts": range(1, text.tokens),
            "before": range(text.tokens),
            "ranks": range(_MOST_RANKS),
        }[self.within]


@dataclass(frozen=True)
class Choices:
    """Some of a few words, at least one.

    Args:
        words: what may be chosen, and how the control calls it.
        default: what is chosen at first.
        single: True where it is one word; the argument is then the word alone.
    """

    name: str
    label: str
    help: str
    words: Mapping[str, str]
    default: tuple[str, ...]
    single: bool = False

    def control(self, key: str) -> Any:
        """The control."""
        options = list(self.words)
        if self.single:
            return st.selectbox(
                self.label,
                options,
                options.index(self.default[0]),
                format_func=self.words.__getitem__,
                key=key,
                bind="query-params",
                help=self.help,
            )
        return st.pills(
            self.label,
            options,
            selection_mode="multi",
            default=list(self.default),
            format_func=self.words.__getitem__,
            key=key,
            bind="query-params",
            help=self.help,
        )

    def read(self, held: Any, text: Text) -> str | tuple[str, ...]:
        """The word, or all of them in the order of the library."""
        if self.single:
            return str(held)
        if not held:
            raise SsmlensError(f"{self.label} takes at least one of {', '.join(self.words.values())}")
        return tuple(word for word in self.words if word in held)

    def told(self, value: Any) -> str:
        """The words, with the label."""
        chosen = (value,) if self.single else value
        return "" if chosen == self.default else f"{self.label}: {', '.join(self.words[word] for word in chosen)}"


@dataclass(frozen=True)
class Flag:
    """Yes or no."""

    name: str
    label: str
    help: str
    default: bool = False

    def control(self, key: str) -> Any:
        """The control."""
        return st.toggle(self.label, self.default, key=key, bind="query-params", help=self.help)

    def read(self, held: Any, text: Text) -> bool:
        """True or False."""
        return bool(held)

    def told(self, value: Any) -> str:
        """The label, with yes or no."""
        return "" if value == self.default else f"{self.label}: {'yes' if value else 'no'}"


def draw(options: Sequence[Option], prefix: str) -> dict[str, Any]:
    """Draw the controls; returns what each holds, by the name of the option.

    Args:
        options: what to draw.
        prefix: begins the key of each control, so that two studies may have an option of the same name.
    """
    held = {}
    # Several words side by side need the whole width.
    wide = [option for option in options if isinstance(option, Choices) and not option.single]
    narrow = [option for option in options if option not in wide]
    for start in range(0, len(narrow), COLUMNS):
        row = narrow[start : start + COLUMNS]
        for place, option in zip(st.columns(COLUMNS, vertical_alignment="bottom"), row):
            with place:
                held[option.name] = option.control(f"{prefix}_{option.name}")
    for option in wide:
        held[option.name] = option.control(f"{prefix}_{option.name}")
    return held


def listed(numbers: Sequence[int]) -> str:
    """Numbers in words: "1, 2 and 4"."""
    words = [str(x) for x in numbers]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def shortened(numbers: Sequence[int], most: int = 8) -> str:
    """Numbers in words, those in the middle left out where there are many."""
    if len(numbers) <= most:
        return listed(numbers)
    return f"{', '.join(map(str, numbers[:3]))}, ..., {numbers[-1]}"


_MOST_RANKS = 4097


def _span(valid: Sequence[int]) -> str:
    """What may be typed, in words."""
    if not valid:
        return "none"
    whole = list(valid) == list(range(valid[0], valid[-1] + 1))
    return f"{valid[0]} to {valid[-1]}" if whole and len(valid) > 1 else listed(list(valid))


def _numbers(typed: str, choose: str) -> list[int]:
    found: list[int] = []
    for word in re.split(r"[\s,;]+", typed.strip(" ,;")):
        parts = re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", word)
        if parts is None:
            raise SsmlensError(f"{choose}; “{word}” is no whole number")
        first, last = int(parts[1]), int(parts[2] or parts[1])
        if last - first > _MOST_RANKS:
            raise SsmlensError(f"{choose}; “{word}” spans too many numbers")
        found += range(first, last + 1)
    return found
