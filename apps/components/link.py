"""A button that copies the address of the page as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st

__all__ = ["show"]

_FOLDER = Path(__file__).parent


def show() -> None:
    """Draw the button. The browser alone knows the whole address, so that it is read there."""
    _component()(key="copy_link")


def _component() -> Any:
    parts = {part: (_FOLDER / f"link.{part}").read_text("utf-8") for part in ("html", "css", "js")}
    return st.components.v2.component("ssmlens_link", **parts)
