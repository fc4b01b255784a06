"""One page from its inputs to its panels: open the model, ask whether the page suits it, read the text, draw."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

import streamlit as st

from ssmlens.apps import sources, wording
from ssmlens.apps.frame import collected, garbage
from ssmlens.apps.frame.pages import Page
from ssmlens.apps.frame.panel import boundary
from ssmlens.apps.frame.sidebar import Asked
from ssmlens.errors import SsmlensError

if TYPE_CHECKING:
    from ssmlens.apps.store import Opened, Reading

__all__ = ["show"]

_log = logging.getLogger(__name__)


def show(page: Page, asked: Asked, options: sources.Options) -> None:
    """Draw one page. Whatever fails is a message on it."""
    collected.follow()
    st.header(page.title, anchor=False)
    with garbage.settled(), boundary(page.title):
        if page.needs == "nothing":
            importlib.import_module(page.module).draw()
            return
        opened = _open(asked, options)
        if opened is None:
            return
        module = importlib.import_module(page.module)
        reason = module.supports(opened.lens) if hasattr(module, "supports") else None
        if reason:
            st.info(f"This page cannot show {opened.lens.name} because {reason}.", icon=":material/info:")
            return
        if page.needs == "model":
            module.draw(opened)
            return
        reading = _read(opened, asked, options)
        if reading is not None:
            error_badge(reading)
            module.draw(reading)


def error_badge(reading: Reading) -> None:
    """The largest reconstruction error as a number, judged by the tolerance; each layer's own in a popover."""
    trace = reading.trace
    errors = trace.reconstruction_error
    settings = trace.settings
    with st.container(horizontal=True, vertical_alignment="center"):
        if errors:
            # A NaN compares false with everything: it must never look like a small error.
            good = all(error <= trace.tolerance for error in errors.values())
            worst = max(errors.values(), key=lambda error: (error != error, error))
            verdict = "within" if good else "ABOVE"
            words = f"Reconstruction error {worst:.1e}, {verdict} tolerance {trace.tolerance:.0e}"
            icon = ":material/check:" if good else ":material/warning:"
            st.badge(words, icon=icon, color="green" if good else "red")
        st.badge(f"{reading.opened.lens.name}", color="gray")
        st.badge(f"{len(reading.tokens)} tokens", color="gray")
        st.badge(f"{settings['dtype']} on {settings['device']}", color="gray")
    if errors and not good:
        st.error("The figures below do not describe this model well enough to be relied on.")


def _open(asked: Asked, options: sources.Options) -> Opened | None:
    """The model, or None after saying in one sentence why there is none."""
    try:
        source = asked.source(options)
    except (SsmlensError, FileNotFoundError) as error:
        st.error(wording.sentence(error))
        return None
    try:
        with st.spinner(f"Opening {source.name} ..."):
            # torch and transformers take seconds to import: the inputs are on the page by then.
            from ssmlens.apps import store

            return store.opened(source, asked.dtype)
    except (SsmlensError, FileNotFoundError) as error:
        words = wording.sentence(error)
    except Exception as error:
        _log.exception("opening failed")
        words = f"Opening the model failed with {type(error).__name__}: {error}"
    # Where on its disk a server keeps its models is nobody's business.
    words = words.replace(str(source.path), f"“{source.name}”")
    st.error(words)
    return None


def _read(opened: Opened, asked: Asked, options: sources.Options) -> Reading | None:
    """The traced text, or None after saying in one sentence why there is none."""
    from ssmlens.apps import store

    try:
        with st.spinner(f"Reading the text with {opened.lens.name} ..."):
            return store.read(opened, asked.text, options.max_tokens)
    except SsmlensError as error:
        st.error(wording.sentence(error))
    except Exception as error:
        _log.exception("reading failed")
        st.error(f"Reading failed with {type(error).__name__}: {error}")
    return None
