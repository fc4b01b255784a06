"""Implicit attention: the map of one layer, and what one token reads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import streamlit as st

from ssmlens.apps import store, wording
from ssmlens.apps.components import heatmap
from ssmlens.apps.frame import controls
from ssmlens.apps.frame.panel import is_dark, panel, present
from ssmlens.apps.frame.shown import Shown
from ssmlens.apps.frame.snippets import snippet
from ssmlens.apps.read.suits import has_recurrence as supports
from ssmlens.plotting import Caption

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

__all__ = ["draw", "supports"]

MAP = "map"


def draw(reading: store.Reading) -> None:
    """The page."""
    attention(reading)


@panel()
def attention(reading: store.Reading) -> None:
    """The map of one layer, and below it the row of the target token."""
    columns = st.columns([1, 4, 1, 2], vertical_alignment="bottom")
    layer = controls.layer(reading, columns[0])
    view = controls.view(columns[1])
    head = controls.head(reading, layer, columns[2], disabled=view != "head")
    target = controls.target(reading, columns[3])
    caption = Caption.of(reading.trace, layer, f"head {head}" if view == "head" else view)
    matrix = store.attention_map(reading.key, layer, view, head, reading.trace)
    st.markdown(f"**Layer {layer}, {caption.reduction_words}**: rows read, columns are read from")
    heatmap.show(
        matrix, reading.tokens, caption, target=target, dark=is_dark(), key=MAP, on_pick=lambda: controls.picked(MAP)
    )
    present(_map(reading, matrix, caption, view, head))
    st.markdown(f"**What token {controls.position_name(target, reading.tokens)} reads**")
    present(_row(reading, matrix, caption, view, head, target))


def _map(reading: store.Reading, matrix: NDArray, caption: Caption, view: str, head: int) -> Shown:
    def live() -> object:
        from ssmlens.plotting import pages

        return pages.attention_map(matrix, reading.tokens, caption)

    def file() -> object:
        from ssmlens.plotting import attention_map

        return attention_map(matrix, reading.tokens, caption)

    return Shown(
        name="attention",
        title=caption.title(f"Implicit attention, {caption.reduction_words}"),
        caption=caption,
        code=snippet(
            reading,
            f"""
            {_matrix(caption.layer, view, head)}
            caption = Caption.of(trace, {caption.layer}, {caption.reduction!r})
            figure = attention_map(matrix, trace.tokens[0], caption)
            """,
            ("from ssmlens.plotting import Caption, attention_map",),
        ),
        table=lambda: store.map_table(matrix, reading.tokens),
        live=live,
        file=file,
        explanation=replace(wording.MAP, means=f"{wording.MAP.means} {wording.SIGNED[caption.signed]}"),
        draw=False,
    )


def _row(reading: store.Reading, matrix: NDArray, caption: Caption, view: str, head: int, target: int) -> Shown:
    row, tokens = matrix[target, : target + 1], reading.tokens[: target + 1]

    def live() -> object:
        from ssmlens.plotting import pages

        return pages.token_row(row, tokens, caption, reader=target, dark=is_dark())

    def file() -> object:
        from ssmlens.plotting import token_row

        return token_row(row, tokens, caption, reader=target)

    def table() -> pd.DataFrame:
        everything = store.map_table(matrix, reading.tokens)
        return everything[everything["t"] == target]

    return Shown(
        name="row",
        title=caption.title(f"What token {target} reads"),
        caption=caption,
        code=snippet(
            reading,
            f"""
            {_matrix(caption.layer, view, head)}
            caption = Caption.of(trace, {caption.layer}, {caption.reduction!r})
            row, tokens = matrix[{target}, : {target + 1}], trace.tokens[0][: {target + 1}]
            figure = token_row(row, tokens, caption, reader={target})
            """,
            ("from ssmlens.plotting import Caption, token_row",),
        ),
        table=table,
        live=live,
        file=file,
        explanation=wording.ROW,
        more={"target": str(target)},
    )


def _matrix(layer: int | None, view: str, head: int) -> str:
    """The call that gives the map."""
    attention = f"trace[{layer}].recurrence.attention"
    if view == "head":
        return f"matrix = {attention}.dense(heads=[{head}])[0, 0]"
    return f"matrix = {attention}.reduce({view!r})[0]"
