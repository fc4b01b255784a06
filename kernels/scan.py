"""The recurrence of `inputs`: outputs, final state and states at chosen times.

Which implementation runs is an argument with a visible default. ``"naive"`` is the loop of `naive`, ``"chunked"``
PyTorch on any device, ``"triton"`` the kernels of `fused` on a GPU (or in Triton's interpreter). ``"auto"`` chooses
Triton for CUDA tensors narrower than float64, and the chunked path elsewhere. All agree within the tolerances of the
tests and differentiate with respect to every floating input.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from . import chunked, naive
from .backend import IMPLS, resolve
from .inputs import ScanInputs
from .statistics import Statistics, blocks

__all__ = ["IMPLS", "PRECISIONS", "Statistics", "run", "states", "statistics", "stream_statistics"]

PRECISIONS = ("float32", "bfloat16")


def run(inputs: ScanInputs, *, impl: str = "auto", precision: str = "float32") -> tuple[Tensor, Tensor]:
    """Outputs ``y[t] = h[t] @ read[t]`` and the state after the last token.

    Args:
        inputs: the recurrence; any floating dtype.
        impl: one of `IMPLS`.
        precision: of the matrix products inside a chunk, one of `PRECISIONS`; "bfloat16" (relative error about 1e-2)
            serves Triton's matrix units, everything else computes at least in float32 whatever is asked.

    Returns:
        y (b, t, h, p) and the final state (b, h, p, n), both in ``inputs.dtype`` (float64 for float64
        inputs, else float32); with t = 0 the final state is the initial one.

    Raises:
        ValueError: unknown ``impl`` or ``precision``, or "triton" where it cannot run.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, got {precision!r}")
    chosen = resolve(impl, inputs, precision)
    if chosen == "triton":
        from .fused import dispatch

        return dispatch.run(inputs, precision)
    return (naive if chosen == "naive" else chunked).run(inputs)


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
        ValueError: unknown ``impl``, "triton" where it cannot run, or a position outside the sequence.
    """
    chosen = resolve(impl, inputs, work="states")
    positions = None if at is None else _positions(at, inputs.length)
    if chosen == "triton":
        from .fused import dispatch

        return dispatch.states(inputs, positions)
    return (naive if chosen == "naive" else chunked).states(inputs, positions)


def statistics(inputs: ScanInputs, *, impl: str = "auto") -> Statistics:
    """Norms of the state at every token, without holding the states; no gradients.

    Args:
        inputs: the recurrence.
        impl: one of `IMPLS`.

    Returns:
        `Statistics`: ``norm`` and ``kept``, (b, t, h) each in ``inputs.dtype``.

    Raises:
        ValueError: unknown ``impl``, or "triton" where it cannot run.
    """
    shape = inputs.value.shape[:3]
    whole = Statistics(*(torch.empty(shape, dtype=inputs.dtype, device=inputs.value.device) for _ in range(2)))
    for stretch, part in stream_statistics(inputs, impl=impl):
        for out, found in zip(whole, part, strict=True):
            out[:, stretch] = found
    return whole


def stream_statistics(inputs: ScanInputs, *, impl: str = "auto") -> Iterator[tuple[slice, Statistics]]:
    """The same in stretches of time, (positions, `Statistics` of these tokens), for sequences of any length.

    Beyond the inputs only one stretch is held: at most 2 ** 25 numbers on a GPU, of states or of sums of their squares.
    """
    return blocks(inputs, resolve(impl, inputs, work="norms"))


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
