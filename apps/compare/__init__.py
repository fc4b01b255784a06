"""Compare: two models or two prompts side by side."""

from __future__ import annotations

from ssmlens.apps.frame.pages import Page

__all__ = ["PAGES"]

PAGES: tuple[Page, ...] = ()
