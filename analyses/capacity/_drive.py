"""A trained model as a reservoir: driven by random numbers along one direction of its embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmlens.kernels import scan
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.lens import Lens
from ssmlens.quiet import quiet_transformers
from ssmlens.tap import ScanCall, tapping

__all__ = ["LAWS", "drive"]

LAWS = ("uniform", "gaussian")
"""What the inputs are drawn from: the law that the Legendre, or the Hermite, polynomials belong to."""

BLOCK = 64
"""Tokens whose states are held at once."""


def drive(
    lens: Lens,
    layer: int | None = None,
    samples: int = 8192,
    *,
    features: int = 256,
    component: int = 0,
    law: str = "uniform",
    frozen: bool = False,
    warmup: int = 1024,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """States that independent random inputs leave in a layer, for `memory_capacity` and its kin.

    Token embeddings are replaced by their mean plus u[t] times a principal component, scaled to the spread that the
    vocabulary has along it. The states of all heads are projected to ``features`` random directions.

    Args:
        lens: the model.
        layer: whose state; by default the last one with a recurrence.
        samples: steps.
        features: random directions of the state that are kept, at most as many as it has; capacities are bounded by
            them.
        component: which principal component of the embeddings, from 0.
        law: one of `LAWS`.
        frozen: hold dt, B and C of this layer at their means over time: its state is then linear in its values.
        warmup: steps before those that are returned, so that slow heads have settled.
        seed: of inputs and directions.

    Returns:
        Features (samples, features) and inputs (samples,), float64.

    Raises:
        ValueError: for an unknown law, or numbers out of range.
        LayerError: when the layer does not exist or has no recurrence.
    """
    if law not in LAWS:
        raise ValueError(f"unknown law {law!r}: choose one of {', '.join(LAWS)}")
    if samples < 2 or features < 1 or warmup < 0:
        raise ValueError(f"samples is at least 2, features 1, warmup 0: got {samples}, {features} and {warmup}")
    chosen = lens._choose(None if layer is None else [layer])[-1]
    generator = torch.Generator().manual_seed(seed)
    if law == "uniform":
        inputs = torch.rand(warmup + samples, generator=generator, dtype=torch.float64) * 2 - 1
    else:
        inputs = torch.randn(warmup + samples, generator=generator, dtype=torch.float64)
    vectors = _vectors(lens, inputs / inputs.std(), component)
    found: list[Tensor] = []

    def on_scan(call: ScanCall) -> Any:
        lowered = call.family.lower(call.arguments, None)
        inputs = lowered.recurrence.inputs
        if call.layer == chosen:
            inputs = _frozen(inputs) if frozen else inputs
            found.append(_project(inputs, features, generator))
        y, final = scan.run(inputs)
        return call.family.replace(call.arguments, lowered, lowered.recurrence.add_skip(y), final)

    with tapping(lens._mixers, on_scan), torch.no_grad(), quiet_transformers():
        modes = {m: m.training for m in lens.model.modules()}
        try:
            lens.model.eval()
            model: Any = lens.model.base_model
            model(inputs_embeds=vectors[None], use_cache=False, return_dict=True)
        finally:
            for module, training in modes.items():
                module.training = training
    return found[0][warmup:], inputs[warmup:]


def _vectors(lens: Lens, u: Tensor, component: int) -> Tensor:
    """(t, d) embeddings' mean plus u times a principal component, in the model's dtype."""
    weight = lens.model.get_input_embeddings().weight.detach().double().cpu()  # type: ignore[operator]
    mean = weight.mean(0)
    _, spread, directions = torch.linalg.svd(weight - mean, full_matrices=False)
    if not 0 <= component < len(spread):
        raise ValueError(f"component {component} does not exist: embeddings have 0 to {len(spread) - 1}")
    scale = spread[component] / len(weight) ** 0.5
    return (mean + u[:, None] * scale * directions[component]).to(lens.device, lens.dtype)


def _frozen(inputs: ScanInputs) -> ScanInputs:
    """dt, B and C, and an explicit decay, at their means over time; decays averaged in log space."""
    names = ("dt", "write", "read", "log_decay", "erase_read", "erase_write")
    held = {k: x.mean(1, keepdim=True).expand_as(x) for k, x in inputs.tensors().items() if k in names}
    return inputs.replace(**held)


def _project(inputs: ScanInputs, features: int, generator: torch.Generator) -> Tensor:
    """(t, features) random directions of the states of all heads, in float64."""
    size = inputs.n_heads * inputs.head_dim * inputs.d_state
    width = min(features, size)
    directions = torch.randn(size, width, generator=generator, dtype=torch.float32) if width < size else None
    parts, state = [], inputs.initial
    for start in range(0, inputs.length, BLOCK):
        part = inputs.slice(start, min(start + BLOCK, inputs.length)).replace(initial=state)
        states = scan.states(part)[0]
        state = states[-1:]
        flat = states.flatten(1)
        parts.append((flat if directions is None else flat @ directions.to(flat)).double().cpu())
    return torch.cat(parts)
