"""The frame around every panel: its own fragment, its error boundary, and what can be done with its figure."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec

import streamlit as st

from ssmlens.apps import wording
from ssmlens.apps.frame import collected, downloads
from ssmlens.apps.frame.shown import Shown
from ssmlens.errors import SsmlensError

__all__ = ["boundary", "draw_plotly", "explain", "is_dark", "panel", "present"]

_log = logging.getLogger(__name__)

P = ParamSpec("P")

_INK = {"light": "#444444", "dark": "#cccccc"}
"""Of numbers and names along axes: Streamlit's own grey has a contrast of 3.7, and 4.5 is the least."""

_PICTURE_SCALE = 0.65
"""Pixels of the page for one of a picture, where there is room."""


def panel(title: str = "") -> Callable[[Callable[P, Shown | None]], Callable[P, None]]:
    """Make a function that draws one panel.

    The function draws its controls and returns a `Shown`, which is presented below them, or None when it has drawn
    everything itself. It becomes a fragment: its controls rerun it alone. Whatever it raises is a message in its place;
    the other panels and everything typed stay.

    Args:
        title: heading of the panel; none where the function writes its own.
    """

    def framed(draw: Callable[P, Shown | None]) -> Callable[P, None]:
        @functools.wraps(draw)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
            if title:
                st.subheader(title, anchor=False)
            with boundary(title or draw.__name__):
                shown = draw(*args, **kwargs)
                if shown is not None:
                    present(shown)

        return st.fragment(guarded)

    return framed


@contextmanager
def boundary(what: str) -> Iterator[None]:
    """Turn whatever is raised inside into a message; streamlit's own control flow passes."""
    try:
        yield
    except (SsmlensError, FileNotFoundError) as error:
        st.error(wording.sentence(error))
    except Exception as error:
        # The whole story goes to the server's log.
        _log.exception("%s failed", what)
        st.error(f"{what} failed with {type(error).__name__}: {error}")


def is_dark() -> bool:
    """True when the visitor's page is dark."""
    return st.context.theme.type == "dark"


def present(shown: Shown) -> None:
    """Draw a figure, what it means, and what can be done with it."""
    only_table = shown.draw and shown.live is None and shown.file is None
    if only_table:
        _rows(shown)
    elif shown.draw:
        _draw(shown)
    if shown.explanation is not None:
        explain(shown.explanation, 1 if shown.narrow else 2)
    with st.container(horizontal=True, vertical_alignment="center"):
        as_table = only_table or st.toggle("Table", key=f"{shown.name}_table", help="The same numbers as a table.")
        with st.popover("Download", icon=":material/download:", type="tertiary"):
            for kind, make in downloads.ways(shown).items():
                st.download_button(
                    kind,
                    make,
                    file_name=downloads.file_name(shown, kind),
                    mime=downloads.FORMATS[kind][1],
                    key=f"{shown.name}_{kind}",
                    on_click="ignore",
                    width="stretch",
                )
        if st.button("Add to report", key=f"{shown.name}_add", icon=":material/add:", type="tertiary"):
            st.toast(collected.add(shown))
    with st.expander("Show the code", icon=":material/code:"):
        st.code(shown.code, language="python")
    if as_table and not only_table:
        _rows(shown)


def explain(text: wording.Explanation, columns: int = 2) -> None:
    """The two texts beside a figure."""
    places = st.columns(columns, gap="large")
    places[0].caption(f"**What it means.** {text.means}")
    places[-1].caption(f"**What it does not.** {text.does_not}")


def _rows(shown: Shown) -> None:
    st.dataframe(shown.table(), hide_index=True, key=f"{shown.name}_rows")


def _draw(shown: Shown) -> None:
    if shown.live is not None:
        draw_plotly(shown.live(), shown.name)
    elif shown.file is not None:
        note = shown.caption.note()
        picture = downloads.picture(shown, ".png", is_dark())
        # The width in pixels stands there in every PNG. Drawn for paper, its letters would be huge on a wide page.
        width = int.from_bytes(picture[16:20], "big") * _PICTURE_SCALE
        st.image(picture, alt=f"{shown.title}. {note}", width=round(width))


def draw_plotly(figure: Any, key: str) -> None:
    """A plotly figure whose title the page already says, with its note as text below, where it can wrap."""
    about = figure.layout.meta or {}
    figure.update_layout(title=None, margin={"t": 10})
    ink = _INK["dark" if is_dark() else "light"]
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(tickfont={"color": ink}, title={"font": {"color": ink}})
    if figure.layout.yaxis.type == "log":
        # It would otherwise label every digit.
        figure.update_yaxes(nticks=6)
    words = ". ".join(filter(None, (about.get("title"), about.get("note"))))
    st.plotly_chart(figure, key=key, alt=words or key)
    if about.get("note"):
        st.caption(about["note"])
