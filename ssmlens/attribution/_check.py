"""The recomputed model held against the model itself, layer by layer.

Each layer is compared on the model's own input to it. Whole passes are compared too, but nothing is refused for their
difference: a deep model multiplies its own rounding, and two float32 passes of one may differ by 1e-3.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ssmlens.attribution._forward import Network, Rules
from ssmlens.errors import ReconstructionError
from ssmlens.exact import KeepFloat64
from ssmlens.prompt import Batch
from ssmlens.quiet import quiet_transformers
from ssmlens.trace import TOLERANCE, relative_error

__all__ = ["CHECKED_TOKENS", "check"]

CHECKED_TOKENS = 512
"""Rows times length on which the layers are compared, because the model's own scans are slow."""


@torch.no_grad()
def check(network: Network, batch: Batch, positions: Tensor, rules: Rules) -> dict[str, Any]:
    """How far the recomputed model is from its own, on the first 512 tokens (rows times length).

    Args:
        network: the recomputed model.
        batch: the prompt.
        positions: (b,) where logits are read, or the last one before them that is among those tokens.
        rules: with which it is recomputed.

    Returns:
        for the settings: ``layer_error``, the largest relative difference of the residual stream after a layer, given
        the model's own before it, and of the logits, given the model's own last residual stream; ``logit_error``, that
        of the logits over the whole pass; ``checked_tokens``.

    Raises:
        ReconstructionError: when ``layer_error`` exceeds the tolerance for the model's dtype, or is NaN.
    """
    rows = min(len(batch.ids), CHECKED_TOKENS)
    length = max(1, min(batch.ids.shape[1], CHECKED_TOKENS // rows))
    ids, where = batch.ids[:rows, :length].to(network.lens.device), positions[:rows].clamp(max=length - 1)
    real = (torch.arange(length) < batch.lengths[:rows, None]).to(ids.device)
    x = network.embed(ids)
    own, theirs = _own_pass(network, ids, where)
    errors = [relative_error(x, own[0], real)]
    for block, carry, before, after in zip(network.blocks, network.start(rows), own, own[1:]):
        errors.append(relative_error(block(before.to(x.dtype), rules, carry)[0], after, real))
    last = own[-1][torch.arange(rows), where].to(x.dtype)
    errors.append(relative_error(network.logits(last), theirs))
    worst = float("nan") if any(e != e for e in errors) else max(errors)
    limit = TOLERANCE[network.lens.dtype]
    if not worst <= limit:
        at = next(k for k, e in enumerate(errors) if not e <= limit)
        place = "the embeddings" if at == 0 else f"layer {at - 1}" if at < len(own) else "the logits"
        dtype = str(network.lens.dtype).removeprefix("torch.")
        raise ReconstructionError(
            f"{place} recomputed from the weights: {errors[at]:.1e} of the largest entry away from the model's own, "
            f"above the tolerance {limit:.0e} for {dtype}, so an attribution would not describe the model"
        )
    whole = relative_error(network.last_logits(x, where, rules), theirs)
    checked = "all" if rows * length == batch.ids.numel() else rows * length
    return {"layer_error": worst, "logit_error": whole, "checked_tokens": checked}


def _own_pass(network: Network, ids: Tensor, positions: Tensor) -> tuple[list[Tensor], Tensor]:
    """The model's own residual stream before and after each layer, and its logits (b, v) at one position per row."""
    model: Any = network.lens.model
    layers = [model.get_submodule(info.path.rpartition(".")[0]) for info in network.lens.layers]
    owner, seen = threading.get_ident(), {}

    def keep(k: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if threading.get_ident() == owner:
                seen[k] = args[0] if args else kwargs["hidden_states"]
                seen[k + 1] = output[0] if isinstance(output, tuple) else output

        return hook

    with ExitStack() as stack:
        for k, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(keep(k), with_kwargs=True).remove)
        stack.enter_context(quiet_transformers())
        if network.lens.dtype == torch.float64:
            stack.enter_context(KeepFloat64())
        # Padding on the right reaches no earlier token, so no mask is needed; only rows that are read get a head.
        hidden = model.base_model(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
        picked = hidden[torch.arange(len(ids), device=ids.device), positions.to(ids.device)]
        logits: Tensor = model.lm_head(picked.to(model.lm_head.weight.dtype))
    return [seen[k] for k in range(len(layers) + 1)], logits
