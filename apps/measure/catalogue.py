"""The studies that the page offers: the library's call, what can be chosen of it, its figure and its meaning."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssmlens.apps.measure import plans
from ssmlens.apps.measure.options import Choices, Flag, Number, Option, Text, Whole, Wholes
from ssmlens.apps.wording import Explanation
from ssmlens.errors import SsmlensError

if TYPE_CHECKING:
    import ssmlens
    from ssmlens.analyses._result import Result
    from ssmlens.apps.measure.jobs import Progress

__all__ = ["STRETCHES", "STUDIES", "Settings", "Study", "stretches"]

Settings = Mapping[str, Any]
"""The value of each option, by its name."""

STRETCHES = Whole(
    "stretches",
    "Stretches of the text",
    "The text is cut into this many pieces of equal length, each read as a text of its own. From two on, the figure "
    "has a 95 % interval over them.",
    1,
    1,
    64,
)
"""How many pieces of the text a study reads; the one option that is no argument of the library."""

_METRICS = {
    "loss": "loss on the text",
    "accuracy": "accuracy on the text",
    "kl": "KL from the whole state",
    "agreement": "same first token",
}
_SEED = Whole("seed", "Seed", "Of everything that is drawn at random.", 0, 0, 999_999)


@dataclass(frozen=True)
class Study:
    """One study.

    Args:
        title: what the page calls it.
        module, function: where the library has it, below `ssmlens.analyses`.
        options: what can be chosen.
        plan: what a run will do, in a sentence, from the settings and the text.
        quantity: what it measures, in words, from the settings.
        drawing: its figure, below `ssmlens.plotting.studies`, in a module of the same name.
        explanation: what its figure means.
    """

    title: str
    module: str
    function: str
    options: tuple[Option, ...]
    plan: Callable[[Settings, Text], str]
    quantity: Callable[[Settings], str]
    drawing: str
    explanation: Explanation

    def settings(self, held: Mapping[str, Any], tokens: int, layers: Sequence[int]) -> dict[str, Any]:
        """What the controls hold, as settings.

        Raises:
            SsmlensError: for what this model or text does not have, in one sentence that names the valid choices.
        """
        text = self.text(held, tokens, layers)
        return {option.name: option.read(held[option.name], text) for option in self.options}

    def text(self, held: Mapping[str, Any], tokens: int, layers: Sequence[int]) -> Text:
        """What one run reads: the text, or a stretch of it.

        Raises:
            SsmlensError: for stretches of fewer than two tokens.
        """
        count = int(held.get(STRETCHES.name, 1))
        if count > 1 and tokens // count < 2:
            raise SsmlensError(
                f"the text has {tokens} tokens, so that {STRETCHES.label.lower()} are 1 to {max(1, tokens // 2)}, "
                f"of two tokens at least; got {count}"
            )
        return Text(tokens // count, tuple(layers))

    def run(self, lens: ssmlens.Lens, ids: Sequence[int], settings: Settings, progress: Progress) -> Result:
        """Compute it."""
        import torch

        count = settings.get(STRETCHES.name, 1)
        prompt = list(ids) if count == 1 else torch.tensor(stretches(ids, count))
        found: Result = self._call(lens, prompt, **self._arguments(settings), progress=progress)
        return found

    def figure(self, result: Result) -> Any:
        """Draw it, with matplotlib."""
        return getattr(importlib.import_module(f"ssmlens.plotting.studies.{self.module}"), self.drawing)(result)

    def code(self, settings: Settings) -> str:
        """The library calls that compute and draw it."""
        given = "".join(f", {name}={value!r}" for name, value in self._arguments(settings).items())
        count, prompt, head = settings.get(STRETCHES.name, 1), "text", ""
        if count > 1:
            prompt = "rows"
            head = f"size = trace.ids.shape[1] // {count}\nrows = trace.ids[0, : {count} * size].view({count}, size)\n"
        call = f"result = {self.module}.{self.function}(lens, {prompt}{given})"
        return f"{head}{call}\nfigure = drawn.{self.drawing}(result)"

    def imports(self, settings: Settings) -> tuple[str, ...]:
        """What the code needs."""
        found = (
            f"from ssmlens.analyses import {self.module}",
            f"from ssmlens.plotting.studies import {self.module} as drawn",
        )
        return (*found, "import torch") if "dtype" in self._arguments(settings) else found

    def words(self, settings: Settings) -> str:
        """The settings that are not the defaults; empty where all are."""
        return "; ".join(filter(None, (option.told(settings[option.name]) for option in self.options)))

    @property
    def _call(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(f"ssmlens.analyses.{self.module}"), self.function)
        return found

    def _arguments(self, settings: Settings) -> dict[str, Any]:
        """The settings that are not what the library takes by itself."""
        import torch

        usual = inspect.signature(self._call).parameters
        given = {name: value for name, value in settings.items() if name in usual}
        if "dtype" in given:
            given["dtype"] = getattr(torch, given["dtype"])
        return {name: value for name, value in given.items() if value != usual[name].default}


def stretches(ids: Sequence[int], count: int) -> list[list[int]]:
    """That many pieces of equal length, in order; what is left at the end is dropped."""
    size = len(ids) // count
    return [list(ids[i * size : (i + 1) * size]) for i in range(count)]


STUDIES = {
    "memory": Study(
        "Memory",
        "memory",
        "effective_remembrance",
        (
            Wholes(
                "kept",
                "Tokens kept",
                "How many of the last tokens are read, such as 1, 8, 64 or 1-12.",
                "powers of two",
                "tokens",
            ),
            STRETCHES,
        ),
        plans.memory,
        lambda settings: "Total variation distance",
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
        (
            Whole("k", "Exponents", "How many of the largest.", 4, 1, 64),
            Wholes(
                "discard",
                "Tokens before the measurement",
                "The first tokens, on which the state settles and nothing is measured.",
                "a quarter",
                "before",
                single=True,
            ),
            Choices(
                "dtype",
                "Computed in",
                "Precision of the model and its derivatives.",
                {"float64": "float64", "float32": "float32"},
                ("float64",),
                single=True,
            ),
            _SEED,
        ),
        plans.lyapunov,
        lambda settings: "Lyapunov exponents",
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
        (
            Wholes("layer", "Layers", "Each is cut on its own, such as 0, 3 or 2-5.", "all", "layers"),
            Wholes("r_grid", "Ranks", "How many directions are kept; 0 removes the state.", "up to the full", "ranks"),
            Wholes(
                "token_cut",
                "Cut before token",
                "Tokens from this one on read the earlier ones through the cut state.",
                "the middle",
                "cuts",
                single=True,
            ),
            Choices(
                "metric",
                "Measured by",
                "On the tokens from the cut on.",
                _METRICS,
                ("loss",),
                single=True,
            ),
            Choices(
                "readings",
                "Layers above",
                "Whether they are computed anew with the cut state, or keep the gates of the untouched run.",
                {"rerun": "computed anew", "frozen": "gates frozen"},
                ("rerun", "frozen"),
            ),
            STRETCHES,
        ),
        plans.capacity,
        lambda settings: str(_METRICS[settings["metric"]][:1].upper() + _METRICS[settings["metric"]][1:]),
        "rank_floor",
        Explanation(
            means=(
                "The state before the chosen token is cut to its r largest directions, layer by layer, and the rest of "
                "the text is judged. The smallest r without harm is what this layer's state needs here."
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
        (
            Choices(
                "dtypes",
                "Formats of the state",
                "What it is rounded to after every token.",
                {
                    "bfloat16": "bfloat16",
                    "float16": "float16",
                    "float8_e4m3fn": "float8 e4m3",
                    "float8_e5m2": "float8 e5m2",
                },
                ("bfloat16", "float16"),
            ),
            Choices(
                "variants",
                "Heads rounded",
                "Slow heads are those with the longest half-lives.",
                {
                    "all": "all",
                    "slow": "slow ones",
                    "random": "as many at random",
                    "rest": "all but the slow",
                    "stochastic": "all, at random up or down",
                },
                ("all", "slow", "random", "rest", "stochastic"),
            ),
            Number("share", "Share that is slow", "Of all heads, or states, of the model.", 0.1, 0.01, 0.99),
            _SEED,
            Flag("conv", "Also the convolution's window", "The last few inputs of the short convolution."),
        ),
        plans.precision,
        lambda settings: "KL of the next-token distribution",
        "divergence",
        Explanation(
            means=(
                "The model runs with its state rounded to a short format after every token: KL of its next-token "
                "distribution from the exact one, over the text, by whose state is rounded."
            ),
            does_not=(
                "Only the state is rounded, weights and activations are not. Kernels that keep the state in float32 "
                "lose nothing of this."
            ),
        ),
    ),
}
"""By the word that stands in the address."""
