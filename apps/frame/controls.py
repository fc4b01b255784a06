"""Controls that pages share. A choice with the same key is the same choice on every page, and stands in the address."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import streamlit as st

from ssmlens.apps import wording
from ssmlens.plotting.labels import label

if TYPE_CHECKING:
    from ssmlens.apps.store import Reading

__all__ = [
    "LAST",
    "NONE",
    "head",
    "layer",
    "picked",
    "pinned",
    "position_name",
    "reset_unless",
    "source",
    "target",
    "view",
]

LAST = -1
"""The target token that follows the end of the text."""

NONE = -1
"""The source token where none is pinned."""

_TOKEN_CHARACTERS = 24


def reset_unless(key: str, valid: Sequence[Any], default: Any) -> None:
    """Give a choice that this model or text does not have its default; dropped, the control would still show it."""
    if key in st.session_state and st.session_state[key] not in valid:
        st.session_state[key] = default


def layer(reading: Reading, place: Any = st) -> int:
    """One of the traced layers. It starts in the middle: reading from afar is rarely the first layer's work."""
    layers = sorted(reading.trace.mixers)
    middle = len(layers) // 2
    reset_unless("layer", layers, layers[middle])
    chosen: int = place.selectbox("Layer", layers, middle, key="layer", bind="query-params")
    return chosen


def view(place: Any = st) -> str:
    """One head, or a reduction over heads."""
    chosen: str = place.segmented_control(
        "Show",
        wording.VIEWS,
        default="mean",
        required=True,
        key="view",
        bind="query-params",
        help="; ".join(f"{name}: {words}" for name, words in wording.VIEWS.items()),
    )
    return chosen


def head(reading: Reading, in_layer: int, place: Any = st, *, disabled: bool = False) -> int:
    """One head of that layer."""
    n_heads = reading.trace[in_layer].recurrence.n_heads
    reset_unless("head", range(n_heads), 0)
    return int(
        place.number_input(
            "Head",
            0,
            n_heads - 1,
            key="head",
            bind="query-params",
            disabled=disabled,
            help=f"This layer has {n_heads} heads."
            + (" Choose “head” under Show to see one of them." if disabled else ""),
        )
    )


def target(reading: Reading, place: Any = st) -> int:
    """The token whose row is read out, as a position from 0."""
    positions = [LAST, *range(len(reading.tokens))]
    reset_unless("target", positions, LAST)
    chosen: int = place.selectbox(
        "Target token",
        positions,
        key="target",
        bind="query-params",
        format_func=lambda t: "last token" if t == LAST else position_name(t, reading.tokens),
        help="The token that reads. A click on the map or on the text chooses it, too.",
    )
    return len(reading.tokens) - 1 if chosen == LAST else chosen


def source(reading: Reading, up_to: int, place: Any = st) -> int | None:
    """The token of a pinned pair that is read from, a position at or before the target; None where none is pinned."""
    positions = [NONE, *range(up_to + 1)]
    reset_unless("source", positions, NONE)
    chosen: int = place.selectbox(
        "Source token",
        positions,
        key="source",
        bind="query-params",
        format_func=lambda s: "none" if s == NONE else position_name(s, reading.tokens),
        help="The token that is read from. A click on the map pins target and source and opens their path.",
    )
    return None if chosen == NONE else chosen


def picked(component: str) -> None:
    """A click in that component chooses the target or the source token; give it as ``on_pick``."""
    for name in ("target", "source"):
        chosen = st.session_state[component].get(name)
        if isinstance(chosen, int):
            st.session_state[name] = chosen


def pinned(component: str) -> None:
    """A click in that map chooses the target and the source token; give it as ``on_pin``."""
    pair = st.session_state[component].get("pin")
    if pair:
        st.session_state["target"], st.session_state["source"] = (int(x) for x in pair)


def position_name(t: int, tokens: Sequence[str]) -> str:
    """A position with its token, as controls and headings call it."""
    return f"{t} “{label(tokens[t], _TOKEN_CHARACTERS)}”"
