"""The recurrence of `inputs`: outputs, final state and states at chosen times.

Which implementation runs is an argument with a visible default. ``"naive"`` is the loop of `naive`;
``"chunked"`` (PyTorch, CPU and GPU) is what ``"auto"`` chooses. All agree within the tolerances of the
tests and differentiate with respect to every floating input.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch import Tensor

from . import chunked, naive
from .inputs import ScanInputs

__all__ = ["IMPLS", "run", "states"]

IMPLS = ("auto", "naive", "chunked")


def run(inputs: ScanInputs, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Outputs ``y[t] = h[t] @ read[t]`` and the state after the last token.

    Args:
        inputs: the recurrence; any floating dtype.
        impl: one of `IMPLS`.

    Returns:
        y (b, t, h, p) and the final state (b, h, p, n), both in ``inputs.dtype`` (float64 for float64
        inputs, else float32); with t = 0 the final state is the initial one.

    Raises:
        ValueError: unknown ``impl``.
    """
    return (naive if _known(impl) == "naive" else chunked).run(inputs)


def states(inputs: ScanInputs, at: Iterable[int] | Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """The state after each chosen token.

    Args:
        inputs: the recurrence.
        at: token positions in any order, repeats allowed, negative ones counted from the end; None
            means all of them, which holds b * t * h * p * n numbers.
        impl: one of `IMPLS`.

    Returns:
        (b, len(at) or t, h, p, n) in ``inputs.dtype``; the state after step t contains token t.

    Raises:
        ValueError: unknown ``impl``, or a position outside the sequence.
    """
    kernel = naive if _known(impl) == "naive" else chunked
    return kernel.states(inputs, None if at is None else _positions(at, inputs.length))


def _known(impl: str) -> str:
    if impl not in IMPLS:
        raise ValueError(f"impl is one of {', '.join(IMPLS)}, got {impl!r}")
    return impl


def _positions(at: Iterable[int] | Tensor, length: int) -> list[int]:
    if isinstance(at, Tensor):
        at = at.tolist()
    try:
        positions = [operator.index(i) for i in at]
    except TypeError:
        raise ValueError(f"at is a sequence of token positions (integers), got {at!r}") from None
    for i in positions:
        if not -length <= i < length:
            raise ValueError(f"at holds position {i}, but the sequence has {length} tokens (0 to {length - 1})")
    return [i % length for i in positions]
