"""Measure: studies of a model that take a while."""

from __future__ import annotations

from ssmlens.apps.frame.pages import Page

__all__ = ["PAGES"]

PAGES: tuple[Page, ...] = (Page("measure", "Studies", ":material/science:", "ssmlens.apps.measure.studies"),)
