"""What every figure says about its numbers: model, layer, reduction, sign, reconstruction error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["UNSIGNED", "Caption"]

UNSIGNED = ("mean_abs", "max_abs", "norm")
"""Reductions that drop the sign of the implicit attention."""

_WORDS = {
    "mean": "mean over heads (signed)",
    "sum": "sum over heads (signed)",
    "mean_abs": "mean magnitude over heads",
    "max_abs": "largest magnitude over heads",
    "norm": "root of the sum of squares over heads",
}


@dataclass(frozen=True)
class Caption:
    """Provenance printed on a figure.

    Args:
        model: name of the model.
        layer: index of the layer, None when the figure shows several.
        reduction: name of the reduction over heads, or words such as "head 3".
        error: measured reconstruction error, the largest one where several layers are shown.
        tolerance: what the error is judged by.
    """

    model: str | None = None
    layer: int | None = None
    reduction: str | None = None
    error: float | None = None
    tolerance: float | None = None

    @classmethod
    def of(cls, trace: Any, layer: int | None = None, reduction: str | None = None) -> Caption:
        """The caption of a figure about one layer of a trace, or about all of them."""
        errors = trace.reconstruction_error
        worst = errors[layer] if layer is not None else max(errors.values(), default=None)
        model = trace.settings.get("model")
        return cls(None if model is None else str(model), layer, reduction, worst, trace.tolerance)

    @property
    def signed(self) -> bool:
        """True where negative values mean something; unknown reductions count as signed."""
        return self.reduction not in UNSIGNED

    @property
    def reduction_words(self) -> str:
        """The reduction in words, empty when there is none."""
        if self.reduction is None:
            return ""
        return _WORDS.get(self.reduction, self.reduction)

    def title(self, what: str) -> str:
        """``what`` with the model and layer it is about."""
        where = [self.model] if self.model else []
        where += [f"layer {self.layer}"] if self.layer is not None else []
        return f"{what}: {', '.join(where)}" if where else what

    def note(self, *more: str) -> str:
        """The line below a figure: reduction, error against tolerance, and ``more`` rules."""
        parts = [self.reduction_words, self.error_words, *more]
        return "; ".join(part for part in parts if part)

    @property
    def error_words(self) -> str:
        """The reconstruction error in words, empty when it is not known."""
        if self.error is None:
            return ""
        words = f"reconstruction error {self.error:.1e}"
        if self.tolerance is not None:
            verdict = "within" if self.error <= self.tolerance else "ABOVE"
            words += f" ({verdict} tolerance {self.tolerance:.0e})"
        return words
