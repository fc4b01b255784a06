"""Implicit attention: the map of one layer, and what one token reads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import streamlit as st

from ssmlens.apps import store, wording
from ssmlens.apps.components import heatmap
from ssmlens.apps.frame import controls
from ssmlens.apps.frame.panel import boundary, is_dark, panel, present
from ssmlens.apps.frame.shown import Shown
from ssmlens.apps.frame.snippets import snippet
from ssmlens.apps.read.suits import has_recurrence as supports
from ssmlens.plotting import Caption

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from ssmlens.attribution import PairPath

__all__ = ["draw", "supports"]

MAP = "map"


def draw(reading: store.Reading) -> None:
    """The page."""
    attention(reading)


@panel()
def attention(reading: store.Reading) -> None:
    """The map of one layer; below it the path of the pinned pair, and the row of the target token."""
    columns = st.columns([1, 4, 1], vertical_alignment="bottom")
    layer = controls.layer(reading, columns[0])
    view = controls.view(columns[1])
    head = controls.head(reading, layer, columns[2], disabled=view != "head")
    left, right = st.columns(2)
    target = controls.target(reading, left)
    source = controls.source(reading, target, right)
    caption = Caption.of(reading.trace, layer, f"head {head}" if view == "head" else view)
    matrix = store.attention_map(reading.key, layer, view, head, reading.trace)
    st.markdown(f"**Layer {layer}, {caption.reduction_words}**: rows read, columns are read from")
    heatmap.show(
        matrix,
        reading.tokens,
        caption,
        target=target,
        source=source,
        dark=is_dark(),
        key=MAP,
        on_pick=lambda: controls.picked(MAP),
        on_pin=lambda: controls.pinned(MAP),
    )
    path = None
    with boundary("The path"):
        path = _path_numbers(reading, layer, target, source)
    present(_map(reading, matrix, caption, view, head))
    if path is not None:
        st.markdown(f"**The path by heads: what is left of token {source} at token {target}, and how it is read**")
        present(_path(reading, path))
    st.markdown(f"**What token {controls.position_name(target, reading.tokens)} reads**")
    present(_row(reading, matrix, caption, view, head, target))


def _path_numbers(reading: store.Reading, layer: int, target: int, source: int | None) -> PairPath | None:
    """What the pinned source adds to the target, in four numbers; None where nothing is pinned."""
    if source is None:
        st.caption("A click on a cell pins its pair of tokens and opens the path between them.")
        return None
    path = store.pair(reading.key, layer, target, source, reading.trace)
    names = [controls.position_name(t, reading.tokens) for t in (source, target)]
    st.markdown(f"**Path from token {names[0]} to token {names[1]}, {target - source} back, in layer {layer}**")
    low, middle, high = path.decay_range
    cells = st.columns(4)
    cells[0].metric(
        "Contribution", f"{path.norm:.3g}", help="Length of the vector that the source adds to this layer's output."
    )
    cells[1].metric(
        "Share of the output", f"{path.share:.3%}", help="Its part of the output at the target, along that output."
    )
    cells[2].metric(
        "Left after decay, at most",
        f"{high:.3g}",
        help="Product of the decays between the two, in the state that keeps longest. The median over all heads and "
        f"states is {middle:.3g}, the smallest {low:.3g}.",
    )
    cells[3].metric(
        "Through the convolution",
        f"{path.conv_share:.1%}",
        help="Part of the contribution that the convolution carried into later steps before it was written.",
    )
    return path


def _path(reading: store.Reading, path: PairPath) -> Shown:
    caption = Caption.of(reading.trace, path.layer)

    def live() -> object:
        from ssmlens.plotting import reading_pages

        return reading_pages.pair_path(path, caption)

    def file() -> object:
        from ssmlens.plotting import readings

        return readings.pair_path(path, caption)

    return Shown(
        name="path",
        title=caption.title(f"From token {path.source} to token {path.target}"),
        caption=caption,
        code=snippet(
            reading,
            f"""
            path = pair_path(trace[{path.layer}], {path.target}, {path.source})
            print(path.norm, path.share, path.decay_range, path.conv_share)
            figure = readings.pair_path(path, Caption.of(trace, {path.layer}))
            """,
            ("from ssmlens.attribution import pair_path", "from ssmlens.plotting import Caption, readings"),
        ),
        table=path.table,
        live=live,
        file=file,
        explanation=wording.PAIR,
        more={"target": str(path.target), "source": str(path.source)},
    )


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
