"""The canvas map: one ES module, handed to the browser from the files beside this one; no build step, no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from ssmlens.apps.components.map_data import MOST_CELLS, Window, map_data, parts
from ssmlens.plotting import Caption

__all__ = ["show"]


def show(
    matrix: NDArray[np.float32],
    tokens: Sequence[str],
    caption: Caption,
    *,
    target: int,
    source: int | None = None,
    dark: bool,
    key: str,
    on_pick: Callable[[], None] | None = None,
    on_pin: Callable[[], None] | None = None,
    most: int = MOST_CELLS,
    group: str | None = None,
    like: NDArray[np.float32] | None = None,
) -> None:
    """Draw one causal map, rows read from columns.

    Args:
        matrix: (t, s), units of y per value; entries above the diagonal are not drawn.
        tokens: one text per position.
        caption: model, layer, reduction and error; decides whether the colours are signed.
        target: the row that is framed.
        source: the column of the pinned pair, None where none is pinned.
        dark: draw for a dark page.
        key: where the state of the component lives.
        on_pick: called after a click on the text; ``st.session_state[key]["target"]`` is the token.
        on_pin: called after a click on the map; ``st.session_state[key]["pin"]`` is [target, source]. Without it the
            map offers no click.
        most: cells per side beyond which the map is pooled; zooming in then asks for the exact ones.
        group: maps of one group share their cursor: pointing at a pair in one lights it in all, without a rerun.
        like: another map whose colours this one takes.
    """
    kept = f"{key}_window"
    whole = (len(matrix), caption.layer, caption.reduction, caption.model)
    asked, of = st.session_state.get(kept, (None, whole))
    window: Window | None = asked if of == whole else None

    def zoomed() -> None:
        found = st.session_state[key].get("window")
        if found:
            t, s, size = (int(x) for x in found)
            inside = t >= 0 and s >= 0 and size > 0 and max(t, s) + size <= len(matrix)
            st.session_state[kept] = ((t, s, size) if inside else None, whole)

    data = map_data(
        matrix,
        tokens,
        caption,
        target=target,
        source=source,
        dark=dark,
        window=window,
        most=most,
        group=group,
        like=like,
        pins=on_pin is not None,
    )
    _component()(
        data=data,
        key=key,
        on_target_change=on_pick or _nothing,
        on_pin_change=on_pin or _nothing,
        on_window_change=zoomed,
    )


def _nothing() -> None:
    """What follows a click that nobody listens to."""


def _component() -> Any:
    # Registered by name at each run: Streamlit keeps one definition, and a test may start with an empty registry.
    return st.components.v2.component("ssmlens_heatmap", **parts("heatmap"))
