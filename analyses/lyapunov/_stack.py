"""Level 1: the whole model while its text is given, all layers and convolution windows together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ssmlens.analyses._result import Result
from ssmlens.analyses.lyapunov import _benettin as benettin
from ssmlens.analyses.lyapunov._checkpoint import digest
from ssmlens.analyses.lyapunov._model import NO_CACHE, FrozenGates, Model, Prompt
from ssmlens.analyses.lyapunov._statistics import describe
from ssmlens.analyses.lyapunov._tangent import carried, load_forward_mode
from ssmlens.errors import PromptError
from ssmlens.lens import Lens

__all__ = ["stack"]

BURN_IN = 500
"""Most tokens that are discarded unless the caller says how many."""


def stack(
    lens: Lens,
    prompt: Prompt,
    k: int = 16,
    *,
    steps: int | None = None,
    discard: int | None = None,
    every: int = 10,
    window: int | None = None,
    dtype: torch.dtype = torch.float64,
    control: bool = True,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """The k largest Lyapunov exponents of the whole model while the text is given (teacher forcing).

    The state is that of all layers, recurrent states and convolution windows; the derivative includes that a changed
    state changes the gates, writes and reads of every layer above. Since no layer sees one above it, the Jacobians are
    block triangular, and in the limit the exponents are those of the layers alone: the means of their log decay, and
    -inf for the windows, which the text overwrites. The control ``frozen_gates`` is that prediction on the same
    tokens; what is left between the two is the finite text.

    Args:
        lens: of a model whose layers are all Mamba-1 or Mamba-2.
        prompt: one text or its ids.
        k: exponents, at most the numbers of the state.
        steps: measured tokens; by default the rest of the text.
        discard: tokens before; by default a quarter of the text, at most 500.
        every: tokens between two re-orthonormalisations; all of them go through a layer at once.
        window: also exponents of stretches of this many tokens, a multiple of ``every``.
        dtype: of the model and the tangents.
        control: also follow a second frame of tangents, which doubles the cost.
        seed: of the tangents.
        resume: a file that keeps the run, so that one that was stopped goes on.
        progress: called with the tokens done and the tokens there are.

    Returns:
        Value (exponent,) in nats per token, as `spectrum` returns it, with the controls ``frozen_gates`` and
        ``other_start``.

    Raises:
        PromptError: for a text that is shorter than discard and steps.
        UnsupportedModelError: for a model with other layers.
    """
    model = Model.of(lens, prompt, dtype)
    discard = min(BURN_IN, model.length // 4) if discard is None else discard
    steps = model.length - discard if steps is None else steps
    plan = benettin.Plan(k=k, discard=discard, steps=steps, every=every, seed=seed, control=control)
    if plan.discard + plan.steps > model.length:
        raise PromptError(f"{discard} discarded and {steps} measured tokens, but the text has {model.length}")
    settings = {"study": "stack", **model.settings(), "ids": digest(model.ids)}
    load_forward_mode()
    growth = benettin.run(benettin.Pushed(_advance(model)), model.like.flatten()[0], plan, settings, resume, progress)
    # Windows hold nothing but the text: as many exponents are -inf as they have entries, whatever rounding shows.
    remembered = model.settings()["state_entries"]["h"]
    growth.logs[:, remembered:] = -torch.inf
    if growth.other is not None:
        growth.other[remembered:] = -torch.inf
    frozen = FrozenGates()
    with torch.no_grad():
        ids = model.ids[:, : discard + steps]
        model.net.run(model.net.initial(), ids, logits="none", observe=frozen.chunk(discard))
    return describe(
        growth,
        plan,
        dt=1.0,
        window=window,
        units="nats/token",
        settings=settings,
        control={"frozen_gates": frozen.largest(k)},
        assumes=(
            "the text is given: what the model would do with its own output is not in these numbers",
            "these tokens' average stands for the average over all text",
            NO_CACHE,
        ),
        checked_by="union of the mean log decays, -inf for windows: tests/analyses/lyapunov/test_stack.py",
        name="lyapunov_stack",
    )


def _advance(model: Model) -> benettin.Advance:
    def advance(state: Tensor, tangents: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        vectors = model.net.embed(model.ids[:, first : first + count])

        def ahead(flat: Tensor) -> Tensor:
            return model.forward(flat[None], vectors)[0]

        with torch.no_grad():
            return carried(ahead, state, tangents)

    return advance
