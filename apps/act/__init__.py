"""Act: change something inside the model and see what follows."""

from __future__ import annotations

from ssmlens.apps.frame.pages import Page

__all__ = ["PAGES"]

PAGES: tuple[Page, ...] = ()
