"""What one forward pass left behind: tokens, logits, residual stream, and each mixer's recurrence.

A trace is light: it holds the factorised scan inputs and the mixers' inputs and outputs. States, matrices and
everything of size t x t are computed from it on demand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssmlens.errors import LayerError, ReconstructionError, SsmlensError
from ssmlens.models import FAMILIES, Family
from ssmlens.recurrence import Recurrence

__all__ = ["TOLERANCE", "LayerInfo", "MixerTrace", "Trace", "gap", "ratio", "relative_error"]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest reconstruction error that `Trace.check` accepts, by the model's dtype. The half-precision entries are four
units in the last place: the model rounds its own intermediate results, the rebuilt mixer does not."""


def relative_error(ours: Tensor, theirs: Tensor, real: Tensor | None = None) -> float:
    """Largest absolute difference over the largest absolute value of ``theirs``; 0 for two zeros, NaN if any is NaN.

    Args:
        ours, theirs: (b, t, ...) of the same shape.
        real: (b, t) bool; only these positions count.
    """
    return ratio(*gap(ours, theirs, real).tolist())


def gap(ours: Tensor, theirs: Tensor, real: Tensor | None = None) -> Tensor:
    """What `relative_error` divides, (2,) in float64, where the numbers are: nothing is read back from the device."""
    a, b = ours.double(), theirs.double()
    if a.numel() == 0:
        return a.new_zeros(2)
    difference = a - b
    if real is not None:
        counted = real.view(*real.shape, *[1] * (a.ndim - 2))
        difference, b = difference.where(counted, 0.0), b.where(counted, 0.0)
    return torch.stack([difference.abs().max(), b.abs().max()])


def ratio(difference: float, scale: float) -> float:
    """One over the other as `relative_error` has it."""
    return difference if difference == 0 else difference / scale if scale else float("inf")


@dataclass(frozen=True)
class LayerInfo:
    """One layer of the model.

    Args:
        index: position among the layers, from 0.
        kind: "ssm".
        family: "mamba1", "mamba2".
        path: the mixer's module name in the model.
    """

    index: int
    kind: str
    family: str | None
    path: str


@dataclass(frozen=True, eq=False)
class MixerTrace:
    """One mixer's pass: its recurrence, and what stands around it.

    Args:
        layer: index of the layer.
        family: "mamba1", "mamba2".
        recurrence: the recurrence that the scan computed.
        input: (b, t, d) the mixer's input, after the block's norm.
        output: (b, t, d) the model's own output of the mixer.
        parameters: the mixer's weights by name, by reference. Empty in a trace saved without weights.
        config: sizes and constants that go with the weights.
        reconstruction_error: largest relative error of the mixer rebuilt from the recurrence and the weights against
            the model's own numbers; see `Lens.trace` for what was compared.
    """

    layer: int
    family: str
    recurrence: Recurrence
    input: Tensor
    output: Tensor
    parameters: Mapping[str, Tensor] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    reconstruction_error: float = float("nan")
    stored_gate: Tensor | None = field(default=None, repr=False)

    @cached_property
    def gate(self) -> Float[Tensor, "b t e"]:
        """The gate z before its activation, (b, t, d_inner)."""
        if self.stored_gate is not None:
            return self.stored_gate
        return self._family.front(self.input, self._weights, self.config)[1]

    def front(self) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b t e"]]:
        """The scan's value (b, t, h, p) and the gate (b, t, d_inner), recomputed from the mixer's input and weights."""
        return self._family.front(self.input, self._weights, self.config)

    def rebuild(self, y: Float[Tensor, "b t h p"] | None = None) -> Float[Tensor, "b t d"]:
        """The mixer's output (b, t, d), recomputed from y (b, t, h, p), by default the recurrence's own output."""
        y = self.recurrence.run() if y is None else y
        return self._family.rebuild(y, self.gate, self._weights, self.config)

    @property
    def _family(self) -> Family:
        return next(f for f in FAMILIES.values() if f.name == self.family)

    @property
    def _weights(self) -> Mapping[str, Tensor]:
        if not self.parameters:
            raise SsmlensError(
                f"layer {self.layer} of this trace has no weights: save it with trace.save(path, weights=True)"
            )
        return self.parameters

    def __repr__(self) -> str:
        return (
            f"MixerTrace(layer={self.layer}, family={self.family!r}, {self.recurrence!r}, "
            f"reconstruction_error={self.reconstruction_error:.1e})"
        )


@dataclass(frozen=True, eq=False)
class Trace:
    """One forward pass of a model over a batch of prompts.

    Args:
        ids: (b, t) token ids, padded on the right.
        tokens: the text of each token, one list per row, padding left out.
        logits: (b, t, v).
        lengths: (b,) number of real tokens per row.
        layers: one descriptor per model layer.
        mixers: layer index to MixerTrace, for the layers that were asked for.
        residuals: residual stream entering each layer, and after the last; all (b, t, d).
        settings: model name, dtype, device, scan mode and versions.
        head: what leads from the last residual to the logits, by reference: "norm.weight", "norm.eps",
            "unembedding.weight" and, where there is one, "unembedding.bias". Empty in a trace saved without weights.
    """

    ids: Int[Tensor, "b t"]
    tokens: list[list[str]]
    logits: Float[Tensor, "b t v"]
    lengths: Int[Tensor, " b"]
    layers: tuple[LayerInfo, ...]
    mixers: Mapping[int, MixerTrace]
    residuals: tuple[Tensor, ...] = field(repr=False)
    settings: Mapping[str, Any]
    head: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def residual(self, k: int) -> Float[Tensor, "b t d"]:
        """Residual stream entering layer k, (b, t, d); k = number of layers gives the one after the last layer."""
        if not isinstance(k, Integral) or not 0 <= k < len(self.residuals):
            raise LayerError(f"residual({k!r}) does not exist: choose 0 to {len(self.residuals) - 1}")
        return self.residuals[int(k)]

    @property
    def reconstruction_error(self) -> dict[int, float]:
        """Layer to largest relative error of the rebuilt mixer."""
        return {k: m.reconstruction_error for k, m in self.mixers.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        dtype: torch.dtype = getattr(torch, self.settings["dtype"])
        return dtype

    @property
    def tolerance(self) -> float:
        """Largest reconstruction error that is accepted for the model's dtype."""
        return TOLERANCE[self.dtype]

    def check(self, tolerance: float | None = None) -> Trace:
        """This trace, when every layer was rebuilt within the tolerance.

        Raises:
            ReconstructionError: naming the worst layer, when one was not; a NaN counts as not.
        """
        limit = self.tolerance if tolerance is None else tolerance
        wrong = {k: e for k, e in self.reconstruction_error.items() if not e <= limit}
        if wrong:
            worst = max(wrong, key=lambda k: wrong[k] if wrong[k] == wrong[k] else float("inf"))
            raise ReconstructionError(
                f"layer {worst} was rebuilt with relative error {wrong[worst]:.1e}, above the tolerance {limit:.0e} "
                f"for {self.settings['dtype']}: nothing computed from this trace would describe the model"
            )
        return self

    def __getitem__(self, layer: int) -> MixerTrace:
        if layer in self.mixers:
            return self.mixers[layer]
        there = ", ".join(map(str, self.mixers)) or "none"
        if not isinstance(layer, Integral) or not 0 <= layer < len(self.layers):
            raise LayerError(f"layer {layer!r} does not exist: this trace has recurrences at layers {there}")
        if self.layers[layer].kind != "ssm":
            raise LayerError(f"layer {layer} is {self.layers[layer].kind} and has no recurrence: choose from {there}")
        raise LayerError(f"layer {layer} was not traced: this trace has recurrences at layers {there}")

    def __iter__(self) -> Iterator[MixerTrace]:
        """The mixers in layer order."""
        return iter(self.mixers[k] for k in sorted(self.mixers))

    def __len__(self) -> int:
        """Number of traced mixers."""
        return len(self.mixers)

    def save(self, path: str | Path, weights: bool = False) -> None:
        """Write one safetensors file, bf16 kept, no pickle.

        Args:
            path: file to write; replaced only once it is complete.
            weights: also store the mixers' weights, so that a loaded trace can rebuild outputs and attribute.
        """
        from ssmlens.storage import save

        save(self, Path(path), weights)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Trace:
        """Read a trace that `save` wrote.

        Raises:
            CheckpointError: when the file is missing, damaged or no trace.
        """
        from ssmlens.storage import load

        return load(Path(path), device)

    def __repr__(self) -> str:
        b, t = self.ids.shape
        errors = self.reconstruction_error.values()
        worst = f", reconstruction error <= {max(errors):.1e}" if errors else ""
        return (
            f"Trace({self.settings['model']}, {b} x {t} tokens, {len(self.mixers)} of {len(self.layers)} layers{worst})"
        )
