"""Read: what one model does with one text."""

from __future__ import annotations

from ssmlens.apps.frame.pages import Page

__all__ = ["PAGES"]

PAGES: tuple[Page, ...] = (
    Page("home", "Home", ":material/home:", "ssmlens.apps.read.home"),
    Page("tokens", "Tokens and lens", ":material/layers:", "ssmlens.apps.read.tokens"),
    Page("attention", "Implicit attention", ":material/grid_on:", "ssmlens.apps.read.attention"),
    Page("states", "States and memory", ":material/memory:", "ssmlens.apps.read.states"),
    Page("attribution", "Decomposition and attribution", ":material/waterfall_chart:", "ssmlens.apps.read.attribution"),
)
