"""A closed form that a study is held to: what is computed, what is known, and how far apart they may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Check", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """One check, done.

    Args:
        name: of the check.
        measured: what our code found; the worst entry where it found several.
        exact: what is known.
        error: distance of the two, as ``measure`` says.
        tolerance: largest error that passes.
    """

    name: str
    measured: float
    exact: float
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN never is."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Check:
    """A known answer and the function that finds it anew.

    Args:
        name: short and unique, such as "lyapunov: Henon map".
        law: the closed form or identity, in one line.
        run: without arguments; returns (measured, exact), floats, of which infinities of one sign are equal.
        tolerance: largest |measured - exact|, over max(1, |exact|) where ``relative``.
        relative: whether the tolerance is relative where the exact value is above 1.
        source: where the number or the law comes from, where it is not elementary.
    """

    name: str
    law: str
    run: Callable[[], tuple[float, float]]
    tolerance: float
    relative: bool = False
    source: str = ""

    def __call__(self) -> Outcome:
        measured, exact = (float(x) for x in self.run())
        error = 0.0 if measured == exact else abs(measured - exact)
        if self.relative and error and abs(exact) > 1:
            error /= abs(exact)
        return Outcome(self.name, measured, exact, error, self.tolerance)
