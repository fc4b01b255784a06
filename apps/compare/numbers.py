"""What the page that compares keeps, and how two readings are put side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from ssmlens.apps import store
from ssmlens.report.numbers import predictions

if TYPE_CHECKING:
    import pandas as pd

    import ssmlens

__all__ = ["MOST", "chances", "side_by_side"]

MOST = 8
"""Likeliest tokens of each side."""

MAX_CHANCES = 16


@st.cache_data(max_entries=MAX_CHANCES, show_spinner=False)
def chances(key: store.Key, position: int, _trace: ssmlens.Trace, _lens: ssmlens.Lens) -> dict[str, float]:
    """Text of every next token to its probability, likeliest first; of tokens that read the same the likeliest."""
    found: dict[str, float] = {}
    for each in predictions(_trace, decode=store.decoder(_lens), most=_lens.vocab_size, position=position):
        found.setdefault(each.text, each.probability)
    return found


def side_by_side(left: dict[str, float], right: dict[str, float]) -> pd.DataFrame:
    """The likeliest tokens of either side, matched by their text; NaN where a model has no such token."""
    import pandas as pd

    names = list(dict.fromkeys([*list(left)[:MOST], *list(right)[:MOST]]))
    nan = float("nan")
    return pd.DataFrame(
        [{"token": name, "before": left.get(name, nan), "after": right.get(name, nan)} for name in names]
    )
