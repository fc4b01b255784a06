"""The affine maps of the tuned lens, and how they are trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmlens.errors import CheckpointError, SsmlensError, brief

__all__ = ["Translators"]

FORMAT = "ssmlens.translators/1"


@dataclass(frozen=True, eq=False)
class Translators:
    """One affine map per layer, ``x -> x + up (down x) + bias``, or ``x + up x + bias`` at full rank.

    Args:
        up: (layer, d, r), or (layer, d, d) at full rank.
        down: (layer, r, d); None at full rank.
        bias: (layer, d).
        settings: how they were trained: model, rank, steps, tokens, seed.
        curve: (check, layer) KL(final || lens) in nats on the tokens that training was watched on, from the identity
            on; never increasing along the first axis.
    """

    up: Tensor = field(repr=False)
    down: Tensor | None = field(repr=False)
    bias: Tensor = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)
    curve: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        layers, width = self.bias.shape
        rank = width if self.down is None else self.down.shape[1]
        fits = self.up.shape == (layers, width, rank) and (
            self.down is None or self.down.shape == (layers, rank, width)
        )
        if not fits:
            raise SsmlensError(
                f"translators are up (layer, d, r), down (layer, r, d), bias (layer, d), got {tuple(self.up.shape)}, "
                f"{None if self.down is None else tuple(self.down.shape)} and {tuple(self.bias.shape)}"
            )

    @classmethod
    def identity(cls, layers: int, width: int) -> Translators:
        """Maps that change nothing: the tuned lens with them is the logit lens."""
        return cls(torch.zeros(layers, width, width), None, torch.zeros(layers, width), {"rank": width, "steps": 0})

    @property
    def n_layers(self) -> int:
        return self.bias.shape[0]

    @property
    def width(self) -> int:
        return self.bias.shape[1]

    def __call__(self, residual: Tensor, layer: int) -> Tensor:
        """The stream entering ``layer``, (..., d), translated; in its own dtype and on its device."""
        wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
        up, bias = self.up[layer].to(wide), self.bias[layer].to(wide)
        inner = wide if self.down is None else wide @ self.down[layer].to(wide).T
        return (wide + inner @ up.T + bias).to(residual.dtype)

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write one safetensors file, the maps in ``dtype``; the suffix is up to the caller. Returns the path."""
        from safetensors.torch import save_file

        tensors = {"up": self.up, "bias": self.bias} | ({} if self.down is None else {"down": self.down})
        stored = {name: x.detach().cpu().to(dtype).contiguous() for name, x in tensors.items()}
        if self.curve is not None:
            stored["curve"] = self.curve.detach().cpu().float().contiguous()
        save_file(stored, path, metadata={"format": FORMAT, "settings": json.dumps(dict(self.settings))})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Translators:
        """Read what `save` wrote, as float32.

        Raises:
            CheckpointError: when the file is missing, damaged, or holds no translators.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise CheckpointError(f"no translators at {path}: the file does not exist")
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise CheckpointError(f"{path} is a safetensors file but no translators of format {FORMAT}")
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            return cls(
                tensors["up"],
                tensors.get("down"),
                tensors["bias"],
                json.loads(header["settings"]),
                tensors.get("curve"),
            )
        except (SafetensorError, KeyError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} holds no whole translators: {brief(error)}") from error
