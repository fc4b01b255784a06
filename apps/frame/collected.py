"""Figures that a visitor has put aside for the report; they live in the visitor's own session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import streamlit as st

from ssmlens.apps.frame import downloads
from ssmlens.apps.frame.shown import Shown, facts

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MOST", "Item", "add", "clear", "items", "remove"]

MOST = 40
"""Most figures that one session puts aside."""

_KEY = "collected"


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
    st.session_state[_KEY] = (*there, item)
    return f"Added: the report now has {len(there) + 1} {'figure' if not there else 'figures'}."


def remove(index: int) -> None:
    """Take one out again."""
    st.session_state[_KEY] = tuple(each for i, each in enumerate(items()) if i != index)


def clear() -> None:
    """Take all out."""
    st.session_state[_KEY] = ()


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
