"""Decomposition and attribution: how the logit of one next token is shared out over the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from ssmlens.apps import store, wording
from ssmlens.apps.components import strip
from ssmlens.apps.frame import controls
from ssmlens.apps.frame.panel import is_dark, panel, present
from ssmlens.apps.frame.shown import Shown
from ssmlens.apps.frame.snippets import snippet
from ssmlens.apps.read.suits import attributable as supports
from ssmlens.attribution import METHODS
from ssmlens.plotting import Caption
from ssmlens.plotting.labels import visible

if TYPE_CHECKING:
    from ssmlens.attribution import Attribution

__all__ = ["draw", "supports"]

STRIP = "attribution_strip"
TOP = "the likeliest token"


def draw(reading: store.Reading) -> None:
    """The page."""
    attribution(reading)


@panel()
def attribution(reading: store.Reading) -> None:
    """The text coloured by scores, and the waterfall to the logit."""
    columns = st.columns([2, 2, 2], vertical_alignment="bottom")
    method = columns[0].selectbox(
        "Method",
        list(METHODS),
        key="method",
        bind="query-params",
        help="decompose and relevance take one pass forward and one back; integrated_gradients, smoothgrad, "
        "gradient_shap and occlusion take many.",
    )
    position = controls.target(reading, columns[1])
    explained, text = _explained(reading, position, columns[2])
    with st.spinner(f"Asking {method} ..."):
        found = store.attribution(reading.key, method, explained, position, reading.lens)
    call = _call(method, position, explained)
    where = controls.position_name(position, reading.tokens)
    st.markdown(f"**The logit of “{visible(text)}” after token {where}, by {method}**")
    strip.show(
        reading.tokens,
        found.scores[0, : len(reading.tokens)].float().numpy(),
        title=f"Scores by {method}",
        quantity=f"score by {method}",
        dark=is_dark(),
        key=STRIP,
        target=position,
        last=position,
        on_pick=lambda: controls.picked(STRIP),
    )
    present(_text(reading, found, text, call))
    st.subheader("From 0 to the logit", anchor=False)
    present(_waterfall(reading, found, text, call))


def _explained(
    reading: store.Reading, position: int, place: st.delta_generator.DeltaGenerator
) -> tuple[int | str | None, str]:
    """The token whose logit is explained: what the library is asked for, and its text."""
    likely = store.candidates(reading.key, position, reading.trace, reading.lens)
    names: dict[str, int] = {}
    for each in likely:
        names.setdefault(each.text, each.id)
    chosen = place.selectbox(
        "Explained token",
        [TOP, *names],
        key="explained",
        bind="query-params",
        accept_new_options=True,
        format_func=lambda text: text if text == TOP else visible(text),
        help="One of the likeliest next tokens, or any text that is one token.",
    )
    if chosen in (None, TOP):
        return None, likely[0].text
    return names.get(chosen, chosen), chosen


def _call(method: str, position: int, explained: int | str | None) -> str:
    target = "" if explained is None else f", target={explained!r}"
    return f"attribute(lens, text, {method!r}{target}, position={position})"


def _text(reading: store.Reading, found: Attribution, text: str, call: str) -> Shown:
    caption = Caption.of(reading.trace)

    def file() -> object:
        from ssmlens.plotting import scored_text

        return scored_text(found, text)

    return Shown(
        name="scores",
        title=caption.title(f"{found.method}: scores of the tokens"),
        caption=caption,
        code=snippet(
            reading,
            f"""
            found = {call}
            figure = scored_text(found, {text!r})
            """,
            ("from ssmlens.attribution import attribute", "from ssmlens.plotting import scored_text"),
        ),
        table=found.table,
        file=file,
        explanation=wording.ATTRIBUTION,
        draw=False,
        more={"method": found.method, "explained": text, "sum": _sum(found)},
    )


def _waterfall(reading: store.Reading, found: Attribution, text: str, call: str) -> Shown:
    caption = Caption.of(reading.trace)

    def live() -> object:
        from ssmlens.plotting import pages

        return pages.attribution(found, text)

    def file() -> object:
        from ssmlens.plotting import attribution

        return attribution(found, text)

    return Shown(
        name="waterfall",
        title=caption.title(f"{found.method}: from 0 to the logit"),
        caption=caption,
        code=snippet(
            reading,
            f"""
            found = {call}
            figure = attribution(found, {text!r})
            """,
            ("from ssmlens.attribution import attribute", "from ssmlens.plotting import attribution"),
        ),
        table=found.table,
        live=live,
        file=file,
        more={"method": found.method, "explained": text, "sum": _sum(found)},
    )


def _sum(found: Attribution) -> str:
    error = float(found.completeness_error[0])
    return "this method promises no sum" if error != error else f"completeness error {error:.1e}"
