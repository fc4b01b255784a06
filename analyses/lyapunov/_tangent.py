"""Tangents pushed through any map, without ever forming its Jacobian.

A map is ``x -> x`` or, driven, ``(x, u) -> x``. Its derivative comes from torch's forward mode, all tangents through
one evaluation (``vmap`` of ``jvp``). Where a map leaves torch (NumPy inside, ``torch.tensor([...])`` of its parts) the
forward derivative would be missing or silently zero: it is held against a difference quotient first, and central
differences take over where the two disagree.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmlens.errors import SsmlensError, brief

__all__ = [
    "DERIVATIVES",
    "Push",
    "as_state",
    "carried",
    "load_forward_mode",
    "plain_step",
    "pushing",
    "slope",
    "widest",
]

DERIVATIVES = ("auto", "forward", "difference")
"""How a map is differentiated; "auto" is forward mode wherever it proves right."""

AGREE = 1e-4
"""Largest relative distance of a forward derivative and a difference quotient that are both right."""

TRIALS = 3
"""States of the orbit at which the two are compared: one may sit on a discontinuity."""

Push = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]
"""(state, tangents (k, *state), input or None) to the next state and tangents."""


def as_state(state: Any) -> Tensor:
    """A state as a floating tensor without gradients: floats stay what they are, everything else becomes float64."""
    x = state.detach() if isinstance(state, Tensor) else torch.as_tensor(np.asarray(state))
    x = x if x.is_floating_point() else x.to(torch.float64)
    if not x.numel():
        raise SsmlensError("the state is empty: a map needs at least one number")
    if not bool(x.isfinite().all()):
        raise SsmlensError("the state holds NaN or infinite numbers")
    return x.clone()


@torch.no_grad()
def widest(function: Callable[..., Any], state: Any, u: Any) -> Tensor:
    """A state in float64 where the map takes it, and as it was given where it does not (a float32 network, say)."""
    x = as_state(state)
    if x.dtype == torch.float64:
        return x
    try:
        plain_step(function, x.double(), u)
    except SsmlensError:
        raise
    except Exception:
        return x
    return x.double()


@torch.no_grad()
def pushing(
    function: Callable[..., Any], state: Tensor, inputs: Sequence[Any], derivative: str
) -> tuple[Callable[[Tensor, Any], Tensor], Push, str]:
    """The map (x, u) -> x with its result as a tensor, how to push tangents through it, and the derivative chosen.

    Args:
        function: the map.
        state: where its orbit starts.
        inputs: the first inputs of a driven map, [None] * n otherwise.
        derivative: one of `DERIVATIVES`.
    """
    if derivative not in DERIVATIVES:
        raise ValueError(f"unknown derivative {derivative!r}: choose one of {', '.join(DERIVATIVES)}")
    step = plain_step(function, state, inputs[0])
    if derivative == "difference":
        return step, _differences(step), derivative
    load_forward_mode()
    for push in (_together(step), _one_by_one(step)):
        try:
            right = _is_right(push, step, state, inputs)
        except Exception as error:
            if derivative == "forward":
                failure = error
            continue
        if right or derivative == "forward":
            return step, push, "forward"
        break
    if derivative == "forward":
        raise SsmlensError(f"the map has no forward derivative: {brief(failure)}") from failure
    return step, _differences(step), "difference"


def plain_step(function: Callable[..., Any], state: Tensor, first: Any) -> Callable[[Tensor, Any], Tensor]:
    """The map with its result as a tensor like the state; refused when it is not of the state's shape."""

    def step(x: Tensor, u: Any) -> Tensor:
        y = function(x) if u is None else function(x, u)
        if isinstance(y, list | tuple) and any(isinstance(part, Tensor) for part in y):
            y = torch.stack([torch.as_tensor(part, dtype=x.dtype, device=x.device) for part in y])
        elif not isinstance(y, Tensor):
            y = torch.as_tensor(np.asarray(y))
        return y.to(dtype=x.dtype, device=x.device)

    y = step(state, first)
    if y.shape != state.shape:
        raise SsmlensError(f"the map turns a state {tuple(state.shape)} into {tuple(y.shape)}: both have one shape")
    return step


def carried(function: Callable[[Tensor], Tensor], x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """function(x), and its derivative along each of the tangents (k, *x.shape), all through one evaluation."""
    dims: Any = (None, 0)  # the value is the same for all
    pair: Any = torch.func.vmap(lambda v: slope(function, x, v), out_dims=dims, randomness="same")(tangents)
    return pair[0], pair[1]


def slope(function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """function(x), and its derivative along v."""
    pair: Any = torch.func.jvp(function, (x,), (v,))
    return pair[0], pair[1]


def _together(step: Callable[[Tensor, Any], Tensor]) -> Push:
    return lambda x, tangents, u: carried(lambda at: step(at, u), x, tangents)


def _one_by_one(step: Callable[[Tensor, Any], Tensor]) -> Push:
    """For maps whose Python code looks at numbers, which vmap forbids."""

    def push(x: Tensor, tangents: Tensor, u: Any) -> tuple[Tensor, Tensor]:
        pairs = [slope(lambda at: step(at, u), x, v) for v in tangents]
        return pairs[0][0], torch.stack([moved for _, moved in pairs])

    return push


def _differences(step: Callable[[Tensor, Any], Tensor]) -> Push:
    def push(x: Tensor, tangents: Tensor, u: Any) -> tuple[Tensor, Tensor]:
        return step(x, u), torch.stack([_quotient(step, x, v, u) for v in tangents])

    return push


def _quotient(step: Callable[[Tensor, Any], Tensor], x: Tensor, v: Tensor, u: Any) -> Tensor:
    """Central difference quotient along v, with the step that balances rounding and curvature."""
    norm = v.norm()
    if not norm > 0:
        return torch.zeros_like(v)
    size = torch.finfo(x.dtype).eps ** (1 / 3) * max(1.0, float(x.norm()) / x.numel() ** 0.5) / norm
    return (step(x + size * v, u) - step(x - size * v, u)) / (2 * size)


def _is_right(push: Push, step: Callable[[Tensor, Any], Tensor], x: Tensor, inputs: Sequence[Any]) -> bool:
    """Whether the push agrees with difference quotients at one of the first states."""
    generator = torch.Generator().manual_seed(0)
    limit = AGREE if x.dtype == torch.float64 else 0.05
    for u in list(inputs)[:TRIALS]:
        v = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        y, moved = push(x, v[None], u)
        quotient = _quotient(step, x, v, u)
        if float((moved[0] - quotient).norm()) <= limit * (float(quotient.norm()) + limit * float(v.norm())):
            return True
        x = y
    return False


def load_forward_mode() -> None:
    """torch compiles its forward-mode rules with torch.jit when they are first used, and warns about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")
