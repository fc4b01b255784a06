"""`Shown`: what a panel shows, in every form in which it can leave the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ssmlens.apps.wording import Explanation
from ssmlens.plotting import Caption

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Shown", "facts"]


@dataclass(frozen=True)
class Shown:
    """One figure of a panel. What costs time is a function, called when somebody asks for it.

    Args:
        name: unique on its page; letters, digits and underscores. Keys of controls and names of files start with it.
        title: what the figure is called, model and layer included: ``caption.title("Half-lives")``.
        caption: model, layer, reduction, error; goes into every download.
        code: the library calls that reproduce the figure and leave it in ``figure`` or its numbers in ``table``; see
            `ssmlens.apps.frame.snippets.snippet`.
        table: the numbers as a DataFrame, for the table beside the figure, CSV and Parquet.
        live: the plotly figure, for the page and for HTML; None for a figure that has none.
        file: the matplotlib figure, for PNG and SVG; None for a figure that has none.
        explanation: what the figure means and what it does not.
        draw: False when the panel has already drawn the figure itself, as a component.
        narrow: True where the panel has only half of the page: its texts then stand below each other.
        more: further facts for the downloads, by name.
    """

    name: str
    title: str
    caption: Caption
    code: str
    table: Callable[[], pd.DataFrame]
    live: Callable[[], Any] | None = None
    file: Callable[[], Any] | None = None
    explanation: Explanation | None = None
    draw: bool = True
    narrow: bool = False
    more: dict[str, str] = field(default_factory=dict)


def facts(shown: Shown) -> dict[str, str]:
    """What every download says about its numbers, empty entries left out."""
    caption = shown.caption
    known = {
        "title": shown.title,
        "model": caption.model or "",
        "layer": "" if caption.layer is None else str(caption.layer),
        "reduction": caption.reduction_words,
        "sign": "" if caption.reduction is None else "signed" if caption.signed else "magnitude",
        "error": caption.error_words,
        **shown.more,
    }
    return {name: words for name, words in known.items() if words}
