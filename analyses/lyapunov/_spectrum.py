"""Lyapunov exponents of any differentiable map."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmlens.analyses._result import Result
from ssmlens.analyses.lyapunov import _benettin as benettin
from ssmlens.analyses.lyapunov._checkpoint import digest
from ssmlens.analyses.lyapunov._small import SMALL, Matrices, jacobians
from ssmlens.analyses.lyapunov._statistics import describe
from ssmlens.analyses.lyapunov._tangent import Push, pushing, widest
from ssmlens.errors import SsmlensError

__all__ = ["Inputs", "drive", "settle", "spectrum", "whole"]

Inputs = Sequence[Any] | Tensor | np.ndarray | Callable[[int], Any]
"""What drives a map (x, u) -> x: a sequence, tensor or array with time first, or a function of the step."""

SETTLE = 1000
"""Most steps that are discarded unless the caller says how many."""

MOST = 512
"""Dimensions up to which all exponents are found when no k is given."""

CHECKED = "Henon, logistic, cat map, Lorenz, diagonal maps: tests/analyses/lyapunov"


def spectrum(
    map: Callable[..., Any],
    state: Any,
    steps: int,
    k: int | None = None,
    *,
    inputs: Inputs | None = None,
    discard: int | None = None,
    every: int = 1,
    dt: float = 1.0,
    window: int | None = None,
    derivative: str = "auto",
    control: bool = True,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Lyapunov exponents of a map, largest first: mean log growth of k independent small perturbations.

    Matrix-free: k tangents are pushed through the map's forward derivative and re-orthonormalised by QR (Benettin et
    al. 1980), so a state of n numbers costs k n, never n^2. -inf stands for a direction that the map removes (a shift
    register, a superstable point): one that is exactly 0, or below rounding at a tenth of the re-orthonormalisations.

    Args:
        map: ``x -> x``, or ``(x, u) -> x`` when driven; x has the shape of ``state``, which may be any.
        state: where the orbit starts; computed in float64 wherever the map takes it, else in its own dtype.
        steps: measured steps.
        k: exponents, at most the dimensions of the state; all of them by default.
        inputs: u of each step, the discarded ones first: a sequence, a tensor with time first, or a function of the
            step's number.
        discard: steps before the measurement; by default a tenth of ``steps`` but at most 1000, or what ``inputs``
            has to spare.
        every: steps between two re-orthonormalisations; with more than 32 dimensions, shift registers in series are
            only seen to vanish if it is not much shorter than all of them together.
        dt: time of one step; exponents are per unit of time.
        window: also exponents of stretches of this many steps: the value is then (window, exponent), and the whole
            orbit's exponents the column ``mean``.
        derivative: "forward" (torch's forward mode), "difference" (central differences, for maps outside torch), or
            "auto": forward where it agrees with a difference quotient.
        control: also follow a second frame of tangents, from another start and re-orthonormalised half as often.
        seed: of the tangents.
        resume: a file that keeps the run, so that one that was stopped goes on.
        progress: called with the steps done and the steps there are.

    Returns:
        Value (exponent,) in nats per unit of time, with ``standard_error``, ``low`` and ``high`` (95 %, bootstrap of
        20 blocks of time), ``vanished``: the share of re-orthonormalisations at which the direction was below
        rounding (the value is then an upper bound), and the control ``other_start``. ``settings["sum"]`` is the sum
        of the exponents.

    Raises:
        SsmlensError: for a map of another shape than its state, too few inputs, or an orbit that diverges.
    """
    if not dt > 0:
        raise SsmlensError(f"dt is above 0, got {dt}")
    steps = whole("steps", steps)
    discard = settle(steps, inputs) if discard is None else whole("discard", discard)
    at = drive(inputs, discard + steps)
    start = widest(map, state, at(0))
    if k is None and start.numel() > MOST:
        raise SsmlensError(f"the state has {start.numel()} dimensions: say how many exponents with k")
    plan = benettin.Plan(
        k=start.numel() if k is None else k,
        discard=discard,
        steps=steps,
        every=every,
        seed=seed,
        control=control,
    )
    first = [at(t) for t in range(min(3, plan.discard + plan.steps))]
    step, push, chosen = pushing(map, start, first, derivative)
    settings: dict[str, Any] = {"study": "spectrum", "derivative": chosen}
    if isinstance(inputs, Tensor):
        settings["inputs"] = digest(inputs)
    stride = _stride(step, push, chosen, start, None if inputs is None else at, first)
    growth = benettin.run(stride, start, plan, settings, resume, progress)
    return describe(
        growth,
        plan,
        dt=dt,
        window=window,
        units="nats/step" if dt == 1 else "nats/time",
        settings=settings,
        assumes=_assumes(inputs is not None, chosen),
        checked_by=CHECKED,
    )


def whole(name: str, given: Any) -> int:
    """A whole number, 1e4 too."""
    try:
        return operator.index(int(given) if isinstance(given, float) and given.is_integer() else given)
    except TypeError:
        raise SsmlensError(f"{name} is a whole number, got {given!r}") from None


def settle(steps: int, inputs: Inputs | None) -> int:
    """Steps to discard when the caller does not say."""
    wanted = min(SETTLE, steps // 10)
    return min(wanted, max(0, len(inputs) - steps)) if isinstance(inputs, Sized) else wanted


def drive(inputs: Inputs | None, steps: int) -> Callable[[int], Any]:
    """The input of a step; None for a map without one."""
    if inputs is None:
        return lambda t: None
    if callable(inputs) and not isinstance(inputs, Tensor):
        return inputs
    if len(inputs) < steps:
        raise SsmlensError(f"{steps} steps need as many inputs, got {len(inputs)}")
    held = torch.as_tensor(inputs) if isinstance(inputs, np.ndarray) else inputs
    return lambda t: held[t]


def _stride(
    step: Callable[[Tensor, Any], Tensor],
    push: Push,
    derivative: str,
    state: Tensor,
    at: Callable[[int], Any] | None,
    first: Sequence[Any],
) -> benettin.Stride:
    """By Jacobians where the state is small and the map can be vectorised, tangent by tangent otherwise."""
    if state.numel() <= SMALL and derivative == "forward":
        few = Matrices(step, jacobians(step, at is not None), at)
        try:
            few.ahead(state, 0, len(first))
        except Exception:  # whatever the map's code cannot do under vmap
            pass
        else:
            return few

    def advance(state: Tensor, tangents: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            for t in range(start, start + count):
                state, tangents = push(state, tangents, None if at is None else at(t))
        return state, tangents

    return benettin.Pushed(advance)


def _assumes(driven: bool, derivative: str) -> tuple[str, ...]:
    sentences = [
        "the orbit has settled, and its average over these steps stands for the average over all time",
        "the exponents say how infinitely small perturbations grow: finite ones, and rounding, may do otherwise",
    ]
    if driven:
        sentences.append("the inputs are the same for the perturbed orbit: exponents are conditional on this drive")
    if derivative == "difference":
        sentences.append("central differences stand for the derivative: the map's own was missing or wrong")
    return tuple(sentences)
