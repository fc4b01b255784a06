"""Report: what was put aside on the other pages, as one document and its numbers."""

from __future__ import annotations

import streamlit as st

from ssmlens.apps.frame import collected
from ssmlens.apps.frame.panel import panel
from ssmlens.apps.report import bundle

__all__ = ["draw"]

TITLE = "What the model does"
EMPTY = (
    "Nothing is in the report yet. “Add to report” below a figure of any page puts it here, with its numbers, its "
    "explanation and the code that reproduces it. Figures stay until this browser tab is closed or reloaded."
)


def draw() -> None:
    """The page."""
    report()


@panel()
def report() -> None:
    """The figures in order, and the two files that can be made of them."""
    items = collected.items()
    if not items:
        st.info(EMPTY, icon=":material/info:")
        return
    title = st.text_input("Title", TITLE, key="report_title", bind="query-params") or TITLE
    notes = st.text_area(
        "Notes",
        key="report_notes",
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
    for i, item in enumerate(items):
        _entry(i, item)


def _entry(index: int, item: collected.Item) -> None:
    """One figure: its title, how to take it out, and what it holds."""
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
            st.markdown(f"**Figure {index + 1}**")
            st.button(
                f"Remove figure {index + 1}",
                key=f"report_remove_{index}",
                icon=":material/close:",
                type="tertiary",
                on_click=collected.remove,
                args=(index,),
            )
        st.text(item.title)
        st.caption(f"{len(item.table)} lines of numbers, added {item.added}")
        with st.expander("Numbers and code", icon=":material/code:"):
            st.dataframe(item.table, hide_index=True, key=f"report_rows_{index}")
            st.code(item.code, language="python")
