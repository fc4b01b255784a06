"""Home: what the model is, and how far the figures can be trusted."""

from __future__ import annotations

import streamlit as st

from ssmlens import zoo
from ssmlens.apps import wording
from ssmlens.apps.store import Reading

__all__ = ["draw"]


def draw(reading: Reading) -> None:
    """The page."""
    st.subheader("How far the figures can be trusted", anchor=False)
    st.caption(wording.ERROR)
    name = reading.opened.source.name
    if name in zoo.names():
        with st.expander("Model card", icon=":material/description:"):
            st.markdown(zoo.card(name))
