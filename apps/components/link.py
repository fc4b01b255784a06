"""A button that copies the address of the page as it stands."""

from __future__ import annotations

import streamlit as st

from ssmlens.apps.components.map_data import parts

__all__ = ["show"]


def show() -> None:
    """Draw the button. The browser alone knows the whole address, so that it is read there."""
    st.components.v2.component("ssmlens_link", **parts("link"))(key="copy_link")
