"""The page of ``ssmlens app``: a model, a text, and what each layer remembers of it.

Started as ``streamlit run dashboard.py -- [--models DIR]... [--max-tokens N]``.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from ssmlens import zoo
from ssmlens.apps import sources, wording
from ssmlens.errors import SsmlensError

if TYPE_CHECKING:
    from ssmlens.apps.store import Reading

ICON = Path(__file__).with_name("icon.svg")
LOCAL = "local folder"
# Longest text that goes into the page's address. (Streamlit would print a string that stands here on the page.)
LINK_CHARACTERS = 1500

_log = logging.getLogger(__name__)


def main() -> None:
    """Draw the page once. Every input comes first, so that an error below never costs what was typed."""
    st.set_page_config(page_title="ssmlens", page_icon=str(ICON), layout="wide")
    st.header("What does this model remember?", anchor=False)
    try:
        options = sources.parse(sys.argv[1:])
    except ValueError as error:
        st.error(wording.sentence(error))
        return
    name, folder, dtype = _choose_model(options)
    text = _ask_text(name)
    reading = _read(name, folder, dtype, text, options)
    if reading is None:
        return
    from ssmlens.apps import panels

    panels.error_badge(reading)
    panels.attention(reading, st.context.theme.type == "dark")
    left, right = st.columns(2, gap="large")
    with left:
        panels.half_lives(reading)
    with right:
        panels.state_norms(reading)


def _choose_model(options: sources.Options) -> tuple[str, str | None, str]:
    """A shipped model or a folder, and the dtype."""
    columns = st.columns([3, 2, 3], vertical_alignment="bottom")
    name = columns[0].selectbox("Model", [*zoo.names(), LOCAL], key="model", bind="query-params")
    dtype = columns[1].selectbox(
        "Precision",
        sources.DTYPES,
        key="dtype",
        bind="query-params",
        help="float64 is slower; its reconstruction error shows how much of the other is rounding.",
    )
    if name != LOCAL:
        with columns[2].popover("Model card", type="tertiary"):
            st.markdown(zoo.card(name))
        return name, None, dtype
    folder = columns[2].selectbox(
        "Folder",
        sources.folders(options.roots),
        index=None,
        key="folder",
        bind="query-params",
        accept_new_options=True,
        placeholder="Choose or type a folder below the model roots",
        disabled=not options.roots,
    )
    return name, folder, dtype


def _ask_text(name: str) -> str:
    """The text to read. Until it is edited, it is the passage that suits the model."""
    # A folder's tokenizer may cut words into many tokens: one line of the passage fits any limit.
    passage = zoo.passage().splitlines()[0] if name == LOCAL else zoo.passage(name)
    if "text" in st.session_state and st.session_state["text"] == st.session_state.get("passage"):
        # Set, not dropped: a box that keeps its key goes on showing what it held, whatever the new default is.
        st.session_state["text"] = passage
    st.session_state["passage"] = passage
    long = len(st.session_state.get("text") or "") > LINK_CHARACTERS
    text = st.text_area(
        "Text",
        passage,
        key="text",
        height=170,
        bind=None if long else "query-params",
        help="Ctrl+Enter, or a click outside the box, reads the text.",
    )
    if long:
        st.caption(f"Texts over {LINK_CHARACTERS} characters are not part of the page's address.")
    return text or ""


def _read(name: str, folder: str | None, dtype: str, text: str, options: sources.Options) -> Reading | None:
    """The traced text, or None after saying in one sentence why there is none."""
    try:
        source = sources.local(folder or "", options.roots) if name == LOCAL else sources.shipped(name)
        with st.spinner(f"Reading the text with {source.name} ..."):
            # torch and transformers take seconds to import: the inputs are on the page by then.
            from ssmlens.apps import store

            return store.read(source, dtype, text, options.max_tokens)
    except (SsmlensError, FileNotFoundError) as error:
        st.error(wording.sentence(error))
    except Exception as error:
        # The page stays usable whatever a model's files do; the whole story goes to the server's log.
        _log.exception("reading failed")
        st.error(f"Reading failed with {type(error).__name__}: {error}")
    return None


if __name__ == "__main__":
    main()
