"""Why a page cannot show a model, in the words that follow "because"; None where it can."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssmlens.lens import Lens

__all__ = ["attributable", "has_recurrence"]


def has_recurrence(lens: Lens) -> str | None:
    """A page of states or maps needs at least one layer with a recurrence."""
    if any(layer.kind == "ssm" for layer in lens.layers):
        return None
    return f"none of its {len(lens.layers)} layers has a recurrence that ssmlens knows"


def attributable(lens: Lens) -> str | None:
    """Attribution recomputes the whole model, so that it has to know every layer."""
    others = [layer.index for layer in lens.layers if layer.kind != "ssm"]
    if not others:
        return None
    listed = ", ".join(map(str, others[:8])) + (", ..." if len(others) > 8 else "")
    return f"its layers {listed} are of another kind than the recurrences that attribution recomputes"
