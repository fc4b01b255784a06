"""The studies that the page offers: the library's call of each, its figure, and what it means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssmlens.apps.wording import Explanation

if TYPE_CHECKING:
    import ssmlens
    from ssmlens.analyses._result import Result
    from ssmlens.apps.measure.jobs import Progress

__all__ = ["STUDIES", "Study"]


@dataclass(frozen=True)
class Study:
    """One study.

    Args:
        title: what the page calls it.
        module, function: where the library has it, below `ssmlens.analyses`.
        options: its arguments besides model and text.
        drawing: its figure, below `ssmlens.plotting.studies`, in a module of the same name.
        explanation: what its figure means.
    """

    title: str
    module: str
    function: str
    options: dict[str, Any]
    drawing: str
    explanation: Explanation

    def run(self, lens: ssmlens.Lens, ids: Sequence[int], progress: Progress) -> Result:
        """Compute it."""
        import importlib

        call: Callable[..., Result] = getattr(importlib.import_module(f"ssmlens.analyses.{self.module}"), self.function)
        return call(lens, list(ids), **self.options, progress=progress)

    def figure(self, result: Result) -> Any:
        """Draw it, with matplotlib."""
        import importlib

        return getattr(importlib.import_module(f"ssmlens.plotting.studies.{self.module}"), self.drawing)(result)

    @property
    def code(self) -> str:
        """The library calls that compute and draw it."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"result = {self.module}.{self.function}(lens, text{options})\nfigure = drawn.{self.drawing}(result)"

    @property
    def imports(self) -> tuple[str, str]:
        """What the code needs."""
        return (
            f"from ssmlens.analyses import {self.module}",
            f"from ssmlens.plotting.studies import {self.module} as drawn",
        )


STUDIES = {
    "memory": Study(
        "Memory",
        "memory",
        "effective_remembrance",
        {},
        "remembrance",
        Explanation(
            means=(
                "How far the prediction after the text moves when only its last k tokens are read: total variation "
                "distance, 0 where the past makes no difference. Where the curve reaches 0, the rest is forgotten."
            ),
            does_not=(
                "It is one prediction on one text. What is forgotten for the next token may still be needed later."
            ),
        ),
    ),
    "lyapunov": Study(
        "Lyapunov",
        "lyapunov",
        "stack",
        {"k": 4},
        "stack",
        Explanation(
            means=(
                "The largest rates, in nats per token, at which a small change of the whole state grows or dies while "
                "the text is read; beside them the rates of the frozen gates. Below 0 the model forgets the change."
            ),
            does_not=(
                "A text is finite, and the rates are its averages: a change may grow for a while before it dies. Text "
                "that the model writes itself is another system."
            ),
        ),
    ),
    "capacity": Study(
        "Capacity",
        "capacity",
        "rank_floor",
        {},
        "rank_floor",
        Explanation(
            means=(
                "The state in the middle of the text is cut to its r largest directions, layer by layer, and the loss "
                "on the rest is measured. The smallest r without harm is what this layer's state needs here."
            ),
            does_not=(
                "A state that needs few directions on this text may need more on another, and harm that other layers "
                "make up for is not seen."
            ),
        ),
    ),
    "precision": Study(
        "Precision",
        "precision",
        "divergence",
        {"dtypes": ("bfloat16", "float16")},
        "divergence",
        Explanation(
            means=(
                "The model runs with its state rounded to a short format after every token: KL of its next-token "
                "distribution from the exact one, over the text, by whose state is rounded."
            ),
            does_not=(
                "Only the state is rounded. Kernels that keep it in float32 lose nothing of this, and weights in a "
                "short format are another question."
            ),
        ),
    ),
}
"""By the word that stands in the address."""
