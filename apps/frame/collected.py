"""Figures that a visitor has put aside for the report, and the ids under which the server keeps them.

They live in the visitor's own session. Every change also gives them a new id, which stands in the address: the server
keeps what the id stood for, and nobody can change it later. So a reload, or whoever opens a copied link, starts with
the figures as they were then, and two visitors never change each other's.
"""

from __future__ import annotations

import functools
import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import streamlit as st

from ssmlens.apps.frame import downloads
from ssmlens.apps.frame.shown import Shown, facts

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ADDRESS", "MOST", "Item", "Reports", "add", "clear", "follow", "items", "kept", "lost", "move_up", "remove"]

MOST = 40
"""Most figures of a report."""

MAX_FIGURE_BYTES = 128_000_000
MAX_REPORTS = 1024
MAX_BYTES = 512_000_000

ADDRESS = "report"
"""Where the id stands in the address."""

_KEY, _NAME, _LOST, _FOLLOWED = "collected", "report_id", "report_lost", "report_followed"


@dataclass(frozen=True)
class Item:
    """One figure, independent of the page, the model and the trace that it came from.

    Args:
        title: what it is called.
        facts: model, layer, reduction, sign, error and more, in words.
        code: library calls that reproduce it.
        table: its numbers.
        plotly: the interactive figure as plotly's JSON; None where there is none.
        svg: the picture as an SVG document; None where there is none.
        means, does_not: the explanation beside it; empty where there is none.
        added: when it was put aside, ISO 8601 in UTC.
    """

    title: str
    facts: Mapping[str, str]
    code: str
    table: pd.DataFrame
    plotly: str | None
    svg: str | None
    means: str
    does_not: str
    added: str

    @functools.cached_property
    def size(self) -> int:
        """Bytes that it takes, about."""
        texts = sum(len(text or "") for text in (self.plotly, self.svg, self.code))
        return texts + int(self.table.memory_usage().sum())


class Reports:
    """Collections of figures by id, the longest unused dropped first. Figures that several hold are kept once.

    Args:
        most: collections that are kept.
        size: bytes that their figures may take together.
    """

    def __init__(self, most: int = MAX_REPORTS, size: int = MAX_BYTES) -> None:
        self._found: OrderedDict[str, tuple[Item, ...]] = OrderedDict()
        self._lock = threading.Lock()
        self._most, self._size = most, size

    def keep(self, collected: tuple[Item, ...]) -> str:
        """Keep these figures; returns an id that cannot be guessed."""
        name = secrets.token_urlsafe(12)
        with self._lock:
            self._found[name] = collected
            # The newest one always stays, however large.
            while len(self._found) > 1 and (len(self._found) > self._most or self._taken() > self._size):
                self._found.popitem(last=False)
        return name

    def find(self, name: str) -> tuple[Item, ...] | None:
        """The figures of this id, None when they are not kept (any more)."""
        with self._lock:
            if name in self._found:
                self._found.move_to_end(name)
            return self._found.get(name)

    def _taken(self) -> int:
        alone = {id(item): item for collected in self._found.values() for item in collected}
        return sum(item.size for item in alone.values())


@st.cache_resource(show_spinner=False)
def kept() -> Reports:
    """The collections of this server, for as long as it runs."""
    return Reports()


def follow() -> None:
    """On every run: name the figures in the address; at the first one of a session, take those that it names."""
    state = st.session_state
    if _FOLLOWED not in state:
        state[_FOLLOWED] = True
        name = st.query_params.get(ADDRESS)
        found = None if name is None else kept().find(name)
        if found is not None:
            state[_KEY], state[_NAME] = found, name
        state[_LOST] = name is not None and found is None
    _name_in_address()


def lost() -> bool:
    """True when the address named figures that are not kept any more."""
    return bool(st.session_state.get(_LOST))


def items() -> tuple[Item, ...]:
    """What was put aside, in that order."""
    return tuple(st.session_state.get(_KEY, ()))


def add(shown: Shown) -> str:
    """Put a figure aside, once; returns what to tell the visitor."""
    item = _item(shown)
    there = items()
    if any(each.title == item.title and each.facts == item.facts and each.code == item.code for each in there):
        return "This figure is in the report already."
    if len(there) >= MOST:
        return f"The report holds {MOST} figures, its most: remove one first."
    if item.size > MAX_FIGURE_BYTES:
        return (
            f"This figure has {item.size / 1e6:.0f} MB of numbers, and one in the report at most "
            f"{MAX_FIGURE_BYTES / 1e6:.0f} MB: download it instead."
        )
    _hold((*there, item))
    return f"Added: the report now has {len(there) + 1} {'figure' if not there else 'figures'}."


def remove(index: int) -> None:
    """Take one out again."""
    _hold(tuple(each for i, each in enumerate(items()) if i != index))


def move_up(index: int) -> None:
    """Exchange one with the one before it."""
    there = list(items())
    there[index - 1 : index + 1] = reversed(there[index - 1 : index + 1])
    _hold(tuple(there))


def clear() -> None:
    """Take all out."""
    _hold(())


def _hold(collected: tuple[Item, ...]) -> None:
    st.session_state[_KEY] = collected
    st.session_state[_NAME] = kept().keep(collected) if collected else None
    st.session_state[_LOST] = False
    _name_in_address()


def _name_in_address() -> None:
    name = st.session_state.get(_NAME)
    if name is None:
        st.query_params.pop(ADDRESS, None)
    elif st.query_params.get(ADDRESS) != name:
        st.query_params[ADDRESS] = name


def _item(shown: Shown) -> Item:
    return Item(
        title=shown.title,
        facts=facts(shown),
        code=shown.code,
        table=shown.table(),
        plotly=None if shown.live is None else shown.live().to_json(),
        svg=None if shown.file is None else downloads.picture(shown, ".svg").decode("utf-8"),
        means="" if shown.explanation is None else shown.explanation.means,
        does_not="" if shown.explanation is None else shown.explanation.does_not,
        added=datetime.now(UTC).isoformat(timespec="seconds"),
    )
