"""Level 1: the whole model while its text is given, all layers and convolution windows together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ssmlens.analyses._result import Result
from ssmlens.analyses.lyapunov import _benettin as benettin
from ssmlens.analyses.lyapunov._checkpoint import digest
from ssmlens.analyses.lyapunov._model import NO_CACHE, FrozenGates, Model, Prompt
from ssmlens.analyses.lyapunov._statistics import BLOCKS, CONDITION, describe
from ssmlens.analyses.lyapunov._tangent import load_forward_mode
from ssmlens.analyses.lyapunov._through import through
from ssmlens.errors import PromptError
from ssmlens.lens import Lens

__all__ = ["stack"]

BURN_IN = 500
"""Most tokens that are discarded unless the caller says how many."""

LEAST, MOST = 10, 50
"""Tokens between two re-orthonormalisations unless the caller says how many. On the shipped models frames of 16
tangents have condition numbers below 8 whether it is 10, 50 or 100; beyond 50 little time is saved."""


def stack(
    lens: Lens,
    prompt: Prompt,
    k: int = 16,
    *,
    steps: int | None = None,
    discard: int | None = None,
    every: int | None = None,
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
        every: tokens between two re-orthonormalisations; all of them go through a layer at once. By default up to 50,
            as long as the exponents with frozen gates part tangents by less than a millionfold and 20 blocks of time
            are left for the intervals; 10 where some of those exponents are -inf.
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
    if discard + steps > model.length:
        raise PromptError(f"{discard} discarded and {steps} measured tokens, but the text has {model.length}")
    plan = benettin.Plan(
        k=k, discard=discard, steps=steps, every=LEAST if every is None else every, seed=seed, control=control
    )
    gates = _frozen(model, plan)
    if every is None:
        plan = replace(plan, every=_interval(gates, steps, window))
    settings = {"study": "stack", **model.settings(), "ids": digest(model.ids)}
    load_forward_mode()
    growth = benettin.run(benettin.Pushed(_advance(model)), model.like.flatten()[0], plan, settings, resume, progress)
    # Windows hold nothing but the text: as many exponents are -inf as they have entries, whatever rounding shows.
    remembered = model.settings()["state_entries"]["h"]
    growth.logs[:, remembered:] = -torch.inf
    if growth.other is not None:
        growth.other[remembered:] = -torch.inf
    return describe(
        growth,
        plan,
        dt=1.0,
        window=window,
        units="nats/token",
        settings=settings,
        control={"frozen_gates": gates},
        assumes=(
            "the text is given: what the model would do with its own output is not in these numbers",
            "these tokens' average stands for the average over all text",
            NO_CACHE,
        ),
        checked_by="union of the mean log decays, -inf for windows: tests/analyses/lyapunov/test_stack.py",
        name="lyapunov_stack",
    )


def _frozen(model: Model, plan: benettin.Plan) -> Tensor:
    """The k largest exponents with frozen gates on the measured tokens, decreasing."""
    frozen = FrozenGates()
    with torch.no_grad():
        ids = model.ids[:, : plan.discard + plan.steps]
        model.net.run(model.net.initial(), ids, logits="none", observe=frozen.chunk(plan.discard))
    return frozen.largest(plan.k)


def _interval(gates: Tensor, steps: int, window: int | None) -> int:
    """Tokens between two re-orthonormalisations for these exponents with frozen gates (k,)."""
    spread = float(gates[0] - gates[-1])
    if not math.isfinite(spread):
        parted = LEAST
    else:
        parted = MOST if spread == 0 else int(min(MOST, CONDITION / spread))
    most = max(1, min(parted, max(LEAST, steps // BLOCKS)))
    return most if window is None else max(n for n in range(1, most + 1) if window % n == 0)


def _advance(model: Model) -> benettin.Advance:
    def advance(state: Tensor, tangents: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        vectors = model.net.embed(model.ids[:, first : first + count])
        with torch.no_grad():
            after, moved = through(
                model.net, model.like.unflatten(state[None]), model.like.unflatten(tangents), vectors
            )
        return after.flatten()[0], moved.flatten()

    return advance
