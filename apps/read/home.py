"""Home: what the model says next and where it comes from, how far figures can be trusted, and what the model is."""

from __future__ import annotations

import streamlit as st

from ssmlens import zoo
from ssmlens.apps import store, wording
from ssmlens.apps.components import strip
from ssmlens.apps.frame import controls
from ssmlens.apps.frame.panel import is_dark, panel
from ssmlens.apps.frame.shown import Shown
from ssmlens.apps.frame.snippets import snippet
from ssmlens.apps.read.suits import attributable
from ssmlens.plotting import Caption
from ssmlens.plotting.labels import visible

__all__ = ["draw"]

STRIP = "home_strip"


def draw(reading: store.Reading) -> None:
    """The page."""
    st.caption(wording.HOME)
    where(reading)
    trust(reading)
    name = reading.opened.source.name
    if name in zoo.names():
        with st.expander("Model card", icon=":material/description:"):
            # The front matter is for machines.
            st.markdown(zoo.card(name).removeprefix("---\n").partition("---\n")[2] or zoo.card(name))
            st.download_button(
                "Markdown",
                lambda: zoo.card(name).encode("utf-8"),
                file_name=f"{name}.md",
                mime="text/markdown",
                key="card_markdown",
                icon=":material/download:",
                on_click="ignore",
                help="The card as a file.",
            )


@panel("What comes next, and where it comes from")
def where(reading: store.Reading) -> Shown | None:
    """The next token, the exact decomposition of its logit, and what is left without the strongest token."""
    likely = store.candidates(reading.key, -1, reading.trace, reading.lens)
    first = likely[0]
    st.markdown(
        f"After this text the model says {_quoted(first.text)} with probability **{first.probability:.1%}**"
        + (f", before {_quoted(likely[1].text)} with {likely[1].probability:.1%}." if len(likely) > 1 else ".")
    )
    reason = attributable(reading.lens)
    if reason:
        st.info(f"Where that comes from cannot be told for this model: {reason}.")
        return None
    found = store.attribution(reading.key, "decompose", None, len(reading.tokens) - 1, reading.lens)
    strongest = found.strongest()
    _origin(reading, found.table().set_index("position").loc[strongest], strongest, first)
    strip.show(
        reading.tokens,
        found.scores[0, : len(reading.tokens)].float().numpy(),
        title=f"Where the logit of “{visible(first.text)}” comes from",
        quantity="part of the logit",
        dark=is_dark(),
        key=STRIP,
        target=len(reading.tokens) - 1,
        source=strongest,
        picks=(),
    )
    caption = Caption.of(reading.trace)

    def live() -> object:
        from ssmlens.plotting import pages

        return pages.attribution(found, first.text)

    def file() -> object:
        from ssmlens.plotting import scored_text

        return scored_text(found, first.text)

    return Shown(
        name="where",
        title=caption.title(f"Where the logit of “{visible(first.text)}” comes from"),
        caption=caption,
        code=snippet(
            reading,
            f"""
            found = decompose(lens, text)
            figure = scored_text(found, {first.text!r})
            """,
            ("from ssmlens.attribution import decompose", "from ssmlens.plotting import scored_text"),
        ),
        table=found.table,
        live=live,
        file=file,
        explanation=wording.WHERE,
        draw=False,
    )


def _origin(reading: store.Reading, line: object, strongest: int, first: store.Prediction) -> None:
    """The strongest token in a sentence, and the prediction when it is taken out of the text."""
    back = len(reading.tokens) - 1 - strongest
    words = (
        f"In the exact decomposition of that logit, token {controls.position_name(strongest, reading.tokens)}, {back} "
        f"back, holds the largest part: {line['score']:+.3g}, which is {line['share']:.0%} of the logit."  # type: ignore[index]
    )
    left = store.without(reading.key, strongest, first.id, reading.lens)
    if left is not None:
        words += f" With that token taken out of the text, {_quoted(first.text)} keeps {left:.1%}."
    st.markdown(words)


def _quoted(token: str) -> str:
    """A token inside Markdown, none of its characters read as markup."""
    ticks = "`" * (token.count("`") + 1)
    return f"{ticks} {visible(token)} {ticks}" if "`" in token else f"`{visible(token)}`"


@panel("How far the figures can be trusted")
def trust(reading: store.Reading) -> Shown:
    """Every mixer rebuilt and compared with the model's own numbers."""
    caption = Caption.of(reading.trace)
    errors = reading.trace.reconstruction_error

    def live() -> object:
        from ssmlens.plotting import reading_pages

        return reading_pages.layer_errors(errors, caption)

    def file() -> object:
        from ssmlens.plotting import readings

        return readings.layer_errors(errors, caption)

    return Shown(
        name="verify",
        title=caption.title("Reconstruction error of every layer"),
        caption=caption,
        code=snippet(
            reading,
            """
            figure = readings.layer_errors(trace.reconstruction_error, Caption.of(trace))
            """,
            ("from ssmlens.plotting import Caption, readings",),
        ),
        table=lambda: store.verify_table(reading.trace),
        live=live,
        file=file,
        explanation=wording.ERROR,
    )
