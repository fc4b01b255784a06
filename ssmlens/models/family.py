"""What a family of scans has to say about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ssmlens.recurrence import Recurrence

__all__ = ["Family", "Lowered", "Rebuild", "finite_rate", "own_copy"]


@dataclass(frozen=True)
class Lowered:
    """One scan call, read as a recurrence.

    Args:
        recurrence: what the call computes.
        gate: (b, t, d_inner) gate before its activation, when the scan function itself applies it.
    """

    recurrence: Recurrence
    gate: Tensor | None = None


class Rebuild(Protocol):
    """Recomputes a mixer's output from its input, its weights and the scan's output."""

    def __call__(self, y: Tensor, gate: Tensor, parameters: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
        """From y (b, t, h, p) with the skip and gate (b, t, d_inner) to the mixer's output (b, t, d)."""
        ...


class Front(Protocol):
    """Recomputes what the mixer does before its scan."""

    def __call__(
        self, hidden: Tensor, parameters: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """From the mixer's input (b, t, d) to value (b, t, h, p) and gate (b, t, d_inner)."""
        ...


class Lower(Protocol):
    def __call__(self, arguments: Mapping[str, Any], lengths: Tensor | None) -> Lowered: ...


class Replace(Protocol):
    def __call__(
        self, arguments: Mapping[str, Any], lowered: Lowered, y: Tensor, final: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]: ...


class Prefix(Protocol):
    def __call__(self, arguments: Mapping[str, Any], length: int) -> dict[str, Any]: ...


class Describe(Protocol):
    def __call__(self, mixer: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]: ...


@dataclass(frozen=True)
class Family:
    """How to read and rebuild the mixers that call one scan function.

    Args:
        name: "mamba1", "mamba2".
        scan: name of the scan function in the modeling module.
        lower: scan arguments to a recurrence.
        replace: our y (b, t, h, p) and final state in the form that the scan function returns.
        prefix: the arguments of the same call on the first tokens only.
        describe: the weights around the scan, by reference, and the sizes that go with them.
        front: mixer input to value and gate.
        rebuild: scan output and gate to mixer output.
    """

    name: str
    scan: str
    lower: Lower
    replace: Replace
    prefix: Prefix
    describe: Describe
    front: Front
    rebuild: Rebuild


def own_copy(weight: Tensor | None) -> Tensor | None:
    """A weight that a recurrence keeps: without the model's gradients, and not changed by training on."""
    return None if weight is None else weight.detach().clone()


def finite_rate(A: Tensor) -> Tensor:
    """The decay rate, finite where -exp(A_log) overflows: it forgets as fast, and times dt = 0 it is no NaN."""
    return A.clamp(min=torch.finfo(A.dtype).min)
