"""From what a caller hands to a probe to features, targets and where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._layers import Source, collect, listed
from ssmlens.analyses.memory import _features as f
from ssmlens.lens import Lens
from ssmlens.recurrence import Recurrence
from ssmlens.trace import MixerTrace, Trace

__all__ = ["Material", "checked_lags", "digest", "gather", "log_spaced"]


@dataclass(frozen=True, eq=False)
class Material:
    """What is probed.

    Args:
        layers: layer index to its features; the index is None without a model.
        residuals: layer index to the residual stream before it, for a trace.
        targets: (b, t, d) float64 what is to be read back, by the token that brought it.
        lengths: (b,) real tokens of each sequence.
        tokens: whether the targets are embeddings of tokens.
        settings: provenance, with digests of the numbers.
    """

    layers: Mapping[int | None, f.Blocks]
    residuals: Mapping[int | None, Tensor]
    targets: Tensor
    lengths: Tensor
    tokens: bool
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stacked(self) -> bool:
        return len(self.layers) > 1 or (self.tokens and None not in self.layers)


def gather(source: Any, targets: Any, features: str) -> Material:
    """Features and targets of a source, see `ssmlens.analyses.memory.fidelity`."""
    if features not in f.FEATURES:
        raise ValueError(f"unknown features {features!r}: choose one of {', '.join(f.FEATURES)}")
    if isinstance(source, Lens):
        if targets is None:
            raise ValueError("a lens needs a prompt or prompts to read: pass them second")
        source, targets = source.trace(targets), None
    if isinstance(source, Trace | MixerTrace | Recurrence):
        return _of_model(source, targets, features)
    if targets is None:
        raise ValueError("states alone do not say what to read back: pass targets (t, d) second")
    states = as_series(source, "states")
    wanted = as_series(targets, "targets")
    if wanted.shape[:2] != states.shape[:2]:
        raise ValueError(
            f"states have {states.shape[0]} x {states.shape[1]} tokens and targets {wanted.shape[0]} x "
            f"{wanted.shape[1]}: one target for each state is needed"
        )
    lengths = torch.full((len(states),), states.shape[1])
    settings = {"states": digest(states), "targets": digest(wanted)}
    return Material({None: f.of_tensor(states)}, {}, _finite(wanted), lengths, False, settings)


def _of_model(source: Source, targets: Any, features: str) -> Material:
    layers = collect(source)
    trace = source if isinstance(source, Trace) else None
    recs = layers.recurrences
    residuals: dict[int | None, Tensor] = {}
    if trace is not None:
        residuals = {k: trace.residual(k).detach() for k in recs if k is not None}
    blocks = {k: f.of_layer(rec, residuals.get(k), features) for k, rec in recs.items()}
    tokens = targets is None and trace is not None
    if targets is not None:
        wanted = as_series(targets, "targets")
    elif trace is not None:
        wanted = trace.residual(0)
    else:
        wanted = source.input if isinstance(source, MixerTrace) else next(iter(layers)).value.flatten(2)
    wanted = wanted.detach().double().cpu()
    first = next(iter(layers))
    if wanted.shape[:2] != (first.batch, first.length):
        raise ValueError(f"targets are {tuple(wanted.shape[:2])} tokens and the source {(first.batch, first.length)}")
    lengths = first.real_lengths.cpu()
    settings = {**layers.settings, "targets": digest(wanted), "features": features}
    settings["reads"] = "token embeddings" if tokens else "targets" if targets is not None else "inputs of the layer"
    real = torch.arange(wanted.shape[1]) < lengths[:, None]
    return Material(blocks, residuals, _finite(wanted.where(real[..., None], 0.0)), lengths, tokens, settings)


def as_series(x: Any, what: str) -> Tensor:
    """(t, n), (b, t, n) or (t,) numbers as (b, t, n); whole numbers (t,) are classes, and become one column each."""
    x = torch.as_tensor(x).detach()
    if x.ndim == 1 and x.dtype in (torch.int64, torch.int32):
        x = torch.nn.functional.one_hot(torch.unique(x, return_inverse=True)[1])
    if not x.is_floating_point():
        x = x.double()
    x = x[:, None] if x.ndim == 1 else x
    x = x[None] if x.ndim == 2 else x
    if x.ndim != 3 or not x.numel():
        raise ValueError(f"{what} are (t, n), or (b, t, n) for several sequences, got {tuple(x.shape)}")
    return x


def _finite(x: Tensor) -> Tensor:
    if not bool(x.isfinite().all()):
        raise ValueError("the targets hold NaN or infinite numbers")
    return x.double().cpu()


def digest(x: Tensor) -> str:
    """Sixteen hexadecimal digits that change with the shape or any number."""
    plain = x.detach().double().cpu().contiguous()
    return hashlib.sha256(f"{tuple(x.shape)}".encode() + plain.numpy().tobytes()).hexdigest()[:16]


def log_spaced(longest: int) -> list[int]:
    """0, 1, 2, 3, 4, 6, 8, 12, 16, ... up to ``longest``: two lags for each doubling."""
    found = [0, 1, 2]
    while found[-1] <= longest:
        found.append(found[-2] * 2 if len(found) > 3 else 3)
    return [k for k in found if k <= longest]


def checked_lags(lags: int | Sequence[int] | None, lengths: Tensor) -> list[int]:
    """Lags in order, each once; by default log-spaced up to an eighth of the longest sequence, 256 at most."""
    longest = int(lengths.max())
    if lags is None:
        return log_spaced(min(256, max(1, longest // 8)))
    found = sorted(set(listed(lags)))
    if not found or found[0] < 0 or found[-1] >= longest:
        raise ValueError(f"lags are whole numbers from 0 to {longest - 1}, the longest sequence less one token")
    return found
