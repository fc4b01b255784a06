"""Act: change something inside the model and see what follows."""

from __future__ import annotations

from ssmlens.apps.frame.pages import Page

__all__ = ["PAGES"]

PAGES: tuple[Page, ...] = (
    Page("knockout", "Knockout", ":material/block:", "ssmlens.apps.act.knockout"),
    Page("patch", "Patch", ":material/healing:", "ssmlens.apps.act.patch"),
    Page("steer", "Steer", ":material/tune:", "ssmlens.apps.act.steer"),
)
