"""Report: what was put aside on the other pages, as one document and its numbers."""

from __future__ import annotations

import streamlit as st

from ssmlens.apps.frame import collected
from ssmlens.apps.frame.panel import draw_plotly, panel
from ssmlens.apps.report import bundle

__all__ = ["draw"]

NOTES_CHARACTERS = 2000
"""Longest notes: they stand in the address."""

PICTURE_WIDTH = 600
"""Of a picture on the page, in pixels."""

TITLE = "What the model does"
EMPTY = (
    "Nothing is in the report yet. “Add to report” below a figure of any page puts it here, with its numbers, its "
    "explanation and the code that reproduces it."
)
LOST = "The report of this link is no longer kept on this server."
KEPT = (
    "The address of the page names the report as it stands: a reload or its link brings back the figures. The server "
    "keeps them while it runs and has room; download what has to last."
)


def draw() -> None:
    """The page."""
    report()


@panel()
def report() -> None:
    """The figures in order, and the two files that can be made of them."""
    items = collected.items()
    if collected.lost():
        st.warning(LOST)
    if not items:
        st.info(EMPTY, icon=":material/info:")
        return
    title = st.text_input("Title", TITLE, key="report_title", bind="query-params") or TITLE
    notes = st.text_area(
        "Notes",
        key="report_notes",
        max_chars=NOTES_CHARACTERS,
        bind="query-params",
        help="Stand below the title. An empty line begins a paragraph.",
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        st.download_button(
            "HTML",
            lambda: bundle.page(title, notes, items).encode("utf-8"),
            file_name=f"{bundle.stem(title)}.html",
            mime="text/html",
            key="report_html",
            icon=":material/download:",
            on_click="ignore",
            help="One page that loads nothing: figures, explanations, numbers and code.",
        )
        st.download_button(
            "Data (zip)",
            lambda: bundle.data_zip(items),
            file_name=f"{bundle.stem(title)}.zip",
            mime="application/zip",
            key="report_zip",
            icon=":material/download:",
            on_click="ignore",
            help="For each figure its table, what it is about, its code and its picture.",
        )
        st.button("Remove all", key="report_clear", icon=":material/delete:", type="tertiary", on_click=collected.clear)
    st.caption(KEPT)
    for i, item in enumerate(items):
        _entry(i, item)


def _entry(index: int, item: collected.Item) -> None:
    """One figure: its title, how to move it or take it out, its picture, and what it holds."""
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"**Figure {index + 1}**", width="stretch")
            if index:
                st.button(
                    f"Move figure {index + 1} up",
                    key=f"report_up_{index}",
                    icon=":material/arrow_upward:",
                    type="tertiary",
                    on_click=collected.move_up,
                    args=(index,),
                )
            st.button(
                f"Remove figure {index + 1}",
                key=f"report_remove_{index}",
                icon=":material/close:",
                type="tertiary",
                on_click=collected.remove,
                args=(index,),
            )
        st.text(item.title)
        _picture(index, item)
        st.caption(
            f"{len(item.table)} lines of numbers, added {item.added.replace('T', ' ').removesuffix('+00:00')} UTC"
        )
        with st.expander("Numbers and code", icon=":material/code:"):
            st.dataframe(item.table, hide_index=True, key=f"report_rows_{index}")
            st.code(item.code, language="python")


def _picture(index: int, item: collected.Item) -> None:
    """The figure as it stands in the report; small where it is a picture."""
    if item.svg is not None:
        st.image(item.svg, width=PICTURE_WIDTH, alt=item.title)
    elif item.plotly is not None:
        import plotly.io

        draw_plotly(plotly.io.from_json(item.plotly), f"report_figure_{index}")
