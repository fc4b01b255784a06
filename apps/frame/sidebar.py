"""The sidebar that all pages share: the model and the text, chosen once and kept from page to page."""

from __future__ import annotations

from dataclasses import dataclass

import streamlit as st

from ssmlens import zoo
from ssmlens.apps import sources
from ssmlens.apps.components import link
from ssmlens.apps.frame import runs

__all__ = ["LINK_CHARACTERS", "LOCAL", "Asked", "show"]

LOCAL = "local folder"

LINK_CHARACTERS = 1500
"""Longest text that stands in the page's address itself; longer ones are kept under an id."""


@dataclass(frozen=True)
class Asked:
    """What the sidebar asks for.

    Args:
        name: a shipped model's name, or `LOCAL`.
        folder: the folder, for `LOCAL`.
        dtype: precision.
        text: the text to read.
    """

    name: str
    folder: str | None
    dtype: str
    text: str

    def source(self, options: sources.Options) -> sources.Source:
        """The model's files. Raises CheckpointError or KeyError when they may not or cannot be opened."""
        return sources.local(self.folder or "", options.roots) if self.name == LOCAL else sources.shipped(self.name)


def show(options: sources.Options) -> Asked:
    """Draw the inputs. Nothing here can fail on what a visitor typed, so that no error costs it."""
    asked, known = st.query_params.get("model"), [*zoo.names(), LOCAL]
    with st.sidebar:
        name = st.selectbox("Model", known, key="model", bind="query-params")
        if asked and asked not in known:
            st.warning(f"No model here is called “{asked[:80]}”. Shown is {name}.")
        folder = _folder(options) if name == LOCAL else None
        text = _text(name)
        dtype = st.selectbox(
            "Precision",
            sources.DTYPES,
            key="dtype",
            bind="query-params",
            help="float64 is slower; its reconstruction error shows how much of the other is rounding.",
        )
        link.show()
    return Asked(name, folder, dtype, text)


def _folder(options: sources.Options) -> str | None:
    folder: str | None = st.selectbox(
        "Folder",
        sources.folders(options.roots),
        index=None,
        key="folder",
        bind="query-params",
        accept_new_options=True,
        placeholder="Choose or type a folder below the model roots",
        disabled=not options.roots,
    )
    return folder


def _text(name: str) -> str:
    """The text to read. Until it is edited, it is the passage that suits the model."""
    # A folder's tokenizer may cut words into many tokens: one line of the passage fits any limit.
    passage = zoo.passage().splitlines()[0] if name == LOCAL else zoo.passage(name)
    lost = _restore()
    before = st.session_state.get("passage")
    if before != passage and "text" in st.session_state and st.session_state["text"] == before:
        # Set, not dropped: a box that keeps its key goes on showing what it held, whatever the new default is.
        st.session_state["text"] = passage
    st.session_state["passage"] = passage
    long = len(st.session_state.get("text") or "") > LINK_CHARACTERS
    text = st.text_area(
        "Text",
        passage,
        key="text",
        height=260,
        bind=None if long else "query-params",
        help="Ctrl+Enter, or a click outside the box, reads the text.",
    )
    if lost:
        st.warning("The long text of this link is no longer kept on this server: paste it again.")
    if long:
        st.query_params["run"] = runs.kept().keep(text)
        st.caption(
            f"Texts over {LINK_CHARACTERS} characters are not part of the address: it names the text, which this "
            "server keeps while it runs."
        )
    elif "run" in st.query_params and not lost:
        del st.query_params["run"]
    return text or ""


def _restore() -> bool:
    """Take a long text back from the id in the address, once a session; True when it is not kept any more."""
    if "restored" in st.session_state:
        return False
    st.session_state["restored"] = True
    name = st.query_params.get("run")
    text = None if name is None else runs.kept().find(name)
    if text is not None:
        st.session_state["text"] = text
    return name is not None and text is None
