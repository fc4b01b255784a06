"""Report: the figures that were put aside, as one document."""

from __future__ import annotations

from ssmlens.apps.frame.pages import Page

__all__ = ["PAGES"]

PAGES: tuple[Page, ...] = (
    Page("report", "Report", ":material/summarize:", "ssmlens.apps.report.collection", needs="nothing"),
)
