"""Compare: two models or two texts side by side."""

from __future__ import annotations

from ssmlens.apps.frame.pages import Page

__all__ = ["PAGES"]

PAGES: tuple[Page, ...] = (Page("compare", "Side by side", ":material/compare:", "ssmlens.apps.compare.sides"),)
