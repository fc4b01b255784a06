"""States and memory: what each token does to a state, how long each head keeps, and how large the states grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from ssmlens.apps import store, wording
from ssmlens.apps.components import strip
from ssmlens.apps.frame import controls
from ssmlens.apps.frame.panel import is_dark, panel
from ssmlens.apps.frame.shown import Shown
from ssmlens.apps.frame.snippets import snippet
from ssmlens.apps.read.suits import has_recurrence as supports
from ssmlens.plotting import Caption

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["draw", "supports"]

STRIP = "state_strip"
QUANTITIES = {
    "kept_share": "share of the state that the token keeps",
    "write_norm": "norm of what the token writes",
    "state_norm": "norm of the state after the token",
}
SHORT = {"kept_share": "share kept", "write_norm": "norm written", "state_norm": "state norm"}
"""The same where there is little room: beside the strip stands what they mean."""


def draw(reading: store.Reading) -> None:
    """The page."""
    course(reading)
    left, right = st.columns(2, gap="large")
    with left:
        half_lives(reading)
    with right:
        state_norms(reading)


@panel("Token by token")
def course(reading: store.Reading) -> Shown:
    """What each token keeps and writes, in one layer or one head."""
    columns = st.columns([1, 2, 1, 2, 2], vertical_alignment="bottom")
    layer = controls.layer(reading, columns[0])
    of = columns[1].segmented_control(
        "State of", ["layer", "head"], default="layer", required=True, key="of", bind="query-params"
    )
    head = controls.head(reading, layer, columns[2], disabled=of != "head")
    quantity = columns[3].selectbox(
        "Text coloured by", list(QUANTITIES), key="quantity", bind="query-params", format_func=SHORT.__getitem__
    )
    target = controls.target(reading, columns[4])
    one = head if of == "head" else None
    table = store.state_course(reading.key, layer, one, reading.trace)
    caption = Caption.of(reading.trace, layer, "all heads together" if one is None else f"head {one}")
    strip.show(
        reading.tokens,
        table[quantity],
        title=caption.title(QUANTITIES[quantity]),
        quantity=QUANTITIES[quantity],
        signed=False,
        dark=is_dark(),
        key=STRIP,
        target=target,
        on_pick=lambda: controls.picked(STRIP),
    )

    def live() -> object:
        from ssmlens.plotting import reading_pages

        return reading_pages.state_course(table, reading.tokens, caption, target=target)

    def file() -> object:
        from ssmlens.plotting import readings

        return readings.state_course(table, reading.tokens, caption)

    pick = "" if one is None else f"\ntable = table[table['head'] == {one}].reset_index(drop=True)"
    reduced = ', reduce="pooled"' if one is None else ""
    body = (
        f"table = memory.state_norm(trace[{layer}]{reduced}).table(){pick}\n"
        f"caption = Caption.of(trace, {layer}, {caption.reduction!r})\n"
        "figure = readings.state_course(table, trace.tokens[0], caption)"
    )
    imports = ("from ssmlens.analyses import memory", "from ssmlens.plotting import Caption, readings")
    return Shown(
        name="course",
        title=caption.title("State, token by token"),
        caption=caption,
        code=snippet(reading, body, imports),
        table=lambda: table.assign(text=reading.tokens),
        live=live,
        file=file,
        explanation=wording.COURSE,
    )


@panel("Half-lives")
def half_lives(reading: store.Reading) -> Shown:
    """Half-life of every head of every layer."""
    lives = store.half_lives(reading.key, reading.trace)
    caption = Caption.of(reading.trace)

    def live() -> object:
        from ssmlens.plotting import pages

        return pages.half_life_map(lives, caption)

    def file() -> object:
        from ssmlens.plotting import half_life_map

        return half_life_map(lives, caption)

    return Shown(
        name="half_lives",
        title=caption.title("Half-life by layer and head"),
        caption=caption,
        code=snippet(
            reading,
            """
            result = memory.half_life(trace)
            slowest = result.table().groupby(["layer", "head"])[result.name].max()
            lives = {layer: slowest[layer].to_numpy() for layer in trace.mixers}
            figure = half_life_map(lives, Caption.of(trace))
            """,
            ("from ssmlens.analyses import memory", "from ssmlens.plotting import Caption, half_life_map"),
        ),
        table=lambda: store.half_life_table(reading.key, reading.trace),
        live=live,
        file=file,
        explanation=wording.HALF_LIFE,
        narrow=True,
    )


@panel("State norms")
def state_norms(reading: store.Reading) -> Shown:
    """Size of each layer's state after each token."""
    norms = store.state_norms(reading.key, reading.trace)
    caption = Caption.of(reading.trace)

    def live() -> object:
        from ssmlens.plotting import pages

        return pages.state_norms(norms, reading.tokens, caption)

    def file() -> object:
        from ssmlens.plotting import state_norms

        return state_norms(norms, reading.tokens, caption)

    def table() -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame({"token": reading.tokens, **{f"layer {k}": x for k, x in norms.items()}})

    return Shown(
        name="state_norms",
        title=caption.title("State norm over time"),
        caption=caption,
        code=snippet(
            reading,
            """
            norms = {mixer.layer: state_norms_of(mixer.recurrence)[0] for mixer in trace}
            figure = state_norms(norms, trace.tokens[0], Caption.of(trace))
            """,
            (
                "from ssmlens.plotting import Caption, state_norms",
                "from ssmlens.report.numbers import state_norms as state_norms_of",
            ),
        ),
        table=table,
        live=live,
        file=file,
        explanation=wording.STATE_NORM,
        narrow=True,
    )
