"""Tokens and lens: what each layer's stream already says of the next token, at every position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from ssmlens.apps import store, wording
from ssmlens.apps.components import strip
from ssmlens.apps.frame import controls
from ssmlens.apps.frame.panel import is_dark, panel, present
from ssmlens.apps.frame.shown import Shown
from ssmlens.apps.frame.snippets import snippet
from ssmlens.plotting import Caption
from ssmlens.plotting.labels import visible

if TYPE_CHECKING:
    import pandas as pd

    from ssmlens.lens import Lens

__all__ = ["draw", "supports"]

STRIP = "lens_strip"
COLOURS = {"probability": "probability of the top token", "kl": "KL to the final prediction"}
SHORT = {"probability": "top probability", "kl": "KL to the end"}
"""The same where there is little room: beside the strip stands what they mean."""


def supports(lens: Lens) -> str | None:
    """The lens needs to know what leads from the stream to the logits."""
    return None if lens.has_head else "its final norm and unembedding are not where ssmlens finds them"


def draw(reading: store.Reading) -> None:
    """The page."""
    tokens(reading)


@panel()
def tokens(reading: store.Reading) -> None:
    """The text by one layer, the map of all layers, and the target position from layer to layer."""
    columns = st.columns([2, 2, 2, 2], vertical_alignment="bottom")
    name = columns[0].segmented_control(
        "Lens", list(store.LENSES), default="logit lens", required=True, key="lens", bind="query-params"
    )
    streams = list(range(len(reading.trace.layers) + 1))
    controls.reset_unless("stream", streams, streams[-1])
    stream = columns[1].selectbox(
        "Stream entering layer",
        streams,
        len(streams) - 1,
        key="stream",
        bind="query-params",
        format_func=lambda k: "the end" if k == streams[-1] else str(k),
    )
    colour = columns[2].selectbox(
        "Colour", list(COLOURS), key="lens_colour", bind="query-params", format_func=SHORT.__getitem__
    )
    target = controls.target(reading, columns[3])
    table = store.lens_table(reading.key, name, reading.trace, reading.lens)
    here = table[table["layer"] == stream]
    st.markdown(f"**The text, by what the stream {_entering(stream, streams)} says of the token that follows each**")
    strip.show(
        reading.tokens,
        here[colour],
        title=f"{name.capitalize()}, stream {_entering(stream, streams)}",
        quantity=COLOURS[colour],
        signed=False,
        dark=is_dark(),
        key=STRIP,
        target=target,
        details=[f"Top next token: “{visible(str(top))}”" for top in here["top"]],
        on_pick=lambda: controls.picked(STRIP),
    )
    st.subheader("Every layer and position", anchor=False)
    present(_map(reading, name, table, colour, target))
    st.subheader(f"After token {controls.position_name(target, reading.tokens)}, layer by layer", anchor=False)
    present(_follow(reading, name, target))


def _entering(stream: int, streams: list[int]) -> str:
    return "after the last layer" if stream == streams[-1] else f"entering layer {stream}"


def _map(reading: store.Reading, name: str, table: pd.DataFrame, colour: str, target: int) -> Shown:
    caption = Caption.of(reading.trace)
    title = name.capitalize()

    def live() -> object:
        from ssmlens.plotting import reading_pages

        return reading_pages.lens_map(table, caption, colour=colour, name=title, target=target, dark=is_dark())

    def file() -> object:
        from ssmlens.plotting import readings

        return readings.lens_map(table, caption, colour=colour, name=title)

    call = name.replace(" ", "_")
    return Shown(
        name="lens_map",
        title=caption.title(title),
        caption=caption,
        code=snippet(
            reading,
            f"""
            table = {call}(trace).table(decode=lens.tokenizer.decode)
            figure = readings.lens_map(table, Caption.of(trace), colour={colour!r}, name={title!r})
            """,
            (f"from ssmlens.interventions import {call}", "from ssmlens.plotting import Caption, readings"),
        ),
        table=lambda: table,
        live=live,
        file=file,
        explanation=wording.LENS if name == "logit lens" else wording.TUNED,
        more={"colour": COLOURS[colour]},
    )


def _follow(reading: store.Reading, name: str, target: int) -> Shown:
    caption = Caption.of(reading.trace)
    title = f"{name.capitalize()} after token {target}"
    found = store.lens_reading(reading.key, name, reading.trace)
    table = found.follow(target, decode=store.decoder(reading.lens))

    def live() -> object:
        from ssmlens.plotting import reading_pages

        return reading_pages.lens_path(table, caption, name=title)

    def file() -> object:
        from ssmlens.plotting import readings

        return readings.lens_path(table, caption, name=title)

    call = name.replace(" ", "_")
    return Shown(
        name="follow",
        title=caption.title(title),
        caption=caption,
        code=snippet(
            reading,
            f"""
            table = {call}(trace).follow({target}, decode=lens.tokenizer.decode)
            figure = readings.lens_path(table, Caption.of(trace), name={title!r})
            """,
            (f"from ssmlens.interventions import {call}", "from ssmlens.plotting import Caption, readings"),
        ),
        table=lambda: table,
        live=live,
        file=file,
        explanation=wording.FOLLOW,
        more={"target": str(target)},
    )
