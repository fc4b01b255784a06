"""What a model carries from token to token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LayerState", "State"]


@dataclass(frozen=True, eq=False)
class LayerState:
    """What one layer carries.

    Args:
        h: (b, h, p, n) recurrent state, in the compute dtype (float64, or else float32).
        conv: (b, c, k - 1) last inputs of the convolution of width k, oldest first, in the weights' dtype.
    """

    h: Tensor
    conv: Tensor


@dataclass(frozen=True, eq=False)
class State:
    """What the whole model carries from one token to the next.

    Args:
        layers: one entry per layer, the first layer first.
    """

    layers: tuple[LayerState, ...]

    @property
    def batch(self) -> int:
        return self.layers[0].h.shape[0]

    @property
    def size(self) -> int:
        """Numbers per row."""
        return sum(x[0].numel() for layer in self.layers for x in (layer.h, layer.conv))

    @property
    def parts(self) -> tuple[tuple[int, str, slice], ...]:
        """(layer, "h" or "conv", where it lies in `flatten`), in order."""
        found, start = [], 0
        for k, layer in enumerate(self.layers):
            for name, x in (("h", layer.h), ("conv", layer.conv)):
                count = x[0].numel()
                found.append((k, name, slice(start, start + count)))
                start += count
        return tuple(found)

    def flatten(self) -> Tensor:
        """(b, size): layer after layer, each h and then its window."""
        return torch.cat([x.flatten(1) for layer in self.layers for x in (layer.h, layer.conv)], dim=1)

    def unflatten(self, flat: Tensor) -> State:
        """The state of the numbers (b, size), with this state's shapes; any batch, the dtype of ``flat``."""
        if flat.ndim != 2 or flat.shape[1] != self.size:
            raise ValueError(f"a flat state is (b, {self.size}), got {tuple(flat.shape)}")
        pieces = iter(flat.split([s.stop - s.start for _, _, s in self.parts], dim=1))
        return State(
            tuple(
                LayerState(
                    next(pieces).reshape(len(flat), *layer.h.shape[1:]),
                    next(pieces).reshape(len(flat), *layer.conv.shape[1:]),
                )
                for layer in self.layers
            )
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """Every tensor passed through ``function``: detach, clone, a rounding, a choice of rows..."""
        return State(tuple(LayerState(function(x.h), function(x.conv)) for x in self.layers))
