"""States and memory: how long each head keeps, and how large the state grows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from ssmlens.apps import store, wording
from ssmlens.apps.frame.panel import panel
from ssmlens.apps.frame.shown import Shown
from ssmlens.apps.frame.snippets import snippet
from ssmlens.apps.read.suits import has_recurrence as supports
from ssmlens.plotting import Caption

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["draw", "supports"]


def draw(reading: store.Reading) -> None:
    """The page."""
    left, right = st.columns(2, gap="large")
    with left:
        half_lives(reading)
    with right:
        state_norms(reading)


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
