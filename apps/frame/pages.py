"""Which pages there are: every group of the navigation is a package whose ``PAGES`` lists its pages in order."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Literal

__all__ = ["GROUPS", "Page", "groups"]


@dataclass(frozen=True)
class Page:
    """One page of the navigation.

    Args:
        path: its last part in the address; lower case, no spaces, never changed later, because links rest on it.
        title: its name in the navigation and its heading.
        icon: a Material symbol such as ":material/home:".
        module: module that draws it, imported when the page is opened. It has ``draw`` and, where some models cannot
            be shown, ``supports(lens) -> str | None``: the reason, a clause that follows "because", or None.
        needs: what ``draw`` is called with: "text" with a `ssmlens.apps.store.Reading` (model and traced text),
            "model" with a `ssmlens.apps.store.Opened` (the model alone), "nothing" without arguments.
    """

    path: str
    title: str
    icon: str
    module: str
    needs: Literal["text", "model", "nothing"] = "text"


GROUPS = {
    "Read": "ssmlens.apps.read",
    "Act": "ssmlens.apps.act",
    "Measure": "ssmlens.apps.measure",
    "Compare": "ssmlens.apps.compare",
    "Report": "ssmlens.apps.report",
}
"""Heading in the navigation to the package of its pages."""


def groups() -> dict[str, tuple[Page, ...]]:
    """Heading to pages, headings without a page left out. The very first page is the one that opens."""
    found = {heading: importlib.import_module(package).PAGES for heading, package in GROUPS.items()}
    return {heading: pages for heading, pages in found.items() if pages}
