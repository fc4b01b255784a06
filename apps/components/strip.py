"""The token strip: running text coloured by scores, in which a click chooses the target or the source."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import streamlit as st

from ssmlens.apps.components.map_data import parts, running
from ssmlens.plotting import palette, symmetric_limits
from ssmlens.plotting.labels import label

__all__ = ["Pick", "show"]

Pick = Literal["target", "source"]

_HOVER_CHARACTERS = 24


def show(
    tokens: Sequence[str],
    scores: Any,
    *,
    title: str,
    quantity: str,
    dark: bool,
    key: str,
    signed: bool = True,
    target: int | None = None,
    source: int | None = None,
    last: int | None = None,
    details: Sequence[str] | None = None,
    picks: Sequence[Pick] = ("target",),
    on_pick: Callable[[], None] | None = None,
) -> None:
    """Draw a text.

    Args:
        tokens: one text per position.
        scores: (t,) one number per token; the colour ends at the largest magnitude, NaN has none.
        title: what the strip shows, for screen readers and tests.
        quantity: what a score is, with its unit.
        dark: draw for a dark page.
        key: where the state of the component lives.
        signed: whether negative scores mean something; those are also underlined.
        target: the token with a full frame.
        source: the token with a dashed frame.
        last: tokens after it play no part and are faint; None where all do.
        details: a sentence for each token, read out after its score.
        picks: what a click may choose; the visitor switches where there are two. Empty makes a strip to read only.
        on_pick: called after a choice; ``st.session_state[key]["target"]`` or ``["source"]`` is the token, the other
            one None.
    """
    values = np.asarray(scores, dtype=np.float32)
    if len(values) != len(tokens):
        raise ValueError(f"{len(values)} scores for {len(tokens)} tokens: give one score per token")
    does = " A click or Enter chooses it." if picks else ""
    st.components.v2.component("ssmlens_strip", **parts("strip"))(
        data={
            "title": title,
            "alt": f"{title}. {len(tokens)} tokens; arrow keys move along them.{does}",
            "hint": f"Point at a token, or use the arrow keys on the text, to read its score.{does}",
            "scores": base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii"),
            "text": [running(token) for token in tokens],
            "names": [label(token, _HOVER_CHARACTERS) for token in tokens],
            "spaced": not any(c.isspace() for token in tokens for c in token),
            "quantity": quantity,
            "limit": symmetric_limits(values, 1.0).value,
            "signed": signed,
            "shades": palette.TEXT_SHADE,
            "dark": dark,
            "target": target,
            "source": source,
            "last": last,
            "details": None if details is None else list(details),
            "picks": list(picks),
        },
        key=key,
        **{f"on_{pick}_change": on_pick or _nothing for pick in picks},
    )


def _nothing() -> None:
    """What follows a click that nobody listens to."""
