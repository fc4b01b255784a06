"""Mamba-2 (state space duality): transformers' Mamba-2, with groups and dt limits.

``h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]``, ``y[t] = h[t] C[t] + D x[t]``, per head, with one scalar A per head
and B, C shared by the heads of a group (Dao and Gu 2024). The gate and the gated RMSNorm follow the scan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmlens.kernels.inputs import ScanInputs, compute_dtype
from ssmlens.models.family import Family, Lowered, finite_rate, own_copy
from ssmlens.models.mamba1 import causal_conv
from ssmlens.models.padding import silence
from ssmlens.recurrence import Recurrence

__all__ = ["FAMILY"]


def lower(arguments: Mapping[str, Any], lengths: Tensor | None) -> Lowered:
    """Arguments of ``mamba2_chunk_scan``, time first, as a recurrence with scalar decay per head."""
    dt = arguments["dt"]
    if arguments.get("dt_bias") is not None:
        dt = dt + arguments["dt_bias"].to(dt.dtype)
    if arguments.get("dt_softplus"):
        dt = F.softplus(dt)
    # dt is clamped before use, as in the released checkpoints.
    low, high = arguments.get("dt_limit", (0.0, float("inf")))
    inputs = ScanInputs(
        value=arguments["hidden_states"],
        write=arguments["B"],
        read=arguments["C"],
        dt=dt.clamp(min=low, max=high),
        A=finite_rate(arguments["A"])[:, None],
        initial=arguments.get("initial_states"),
    )
    return Lowered(Recurrence(silence(inputs, lengths), D=own_copy(arguments.get("D")), lengths=lengths))


def replace(arguments: Mapping[str, Any], lowered: Lowered, y: Tensor, final: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Our y (b, t, h, p) and state (b, h, p, n) as ``mamba2_chunk_scan`` returns them."""
    return (y, final) if arguments.get("return_final_states") else y


def prefix(arguments: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The same call on the first ``length`` tokens, in one chunk of that size."""
    timed = ("hidden_states", "dt", "B", "C")
    cut = {k: v[:, :length] if k in timed else v for k, v in arguments.items()}
    return cut | {"chunk_size": min(length, arguments["chunk_size"])}


def describe(mixer: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights around the scan by reference: in_proj, conv1d, norm, out_proj, dt_bias, A_log and D."""
    config = {
        "d_conv": int(mixer.conv_kernel_size),  # type: ignore[arg-type]
        "activation": str(mixer.activation),
        "n_heads": int(mixer.num_heads),  # type: ignore[arg-type]
        "n_groups": int(mixer.n_groups),  # type: ignore[arg-type]
        "d_state": int(mixer.ssm_state_size),  # type: ignore[arg-type]
        "norm_eps": float(mixer.norm.variance_epsilon),  # type: ignore[union-attr, arg-type]
        # transformers before 5.23 normalises over the whole width whatever the number of groups.
        "norm_group": int(getattr(mixer.norm, "group_size", mixer.intermediate_size)),  # type: ignore[arg-type]
    }
    return dict(mixer.named_parameters()), config


def front(hidden: Tensor, parameters: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Mixer input (b, t, d) to the scan's value (b, t, h, p) and the gate z (b, t, d_inner)."""
    inner = parameters["out_proj.weight"].shape[1]
    conv = parameters["conv1d.weight"].shape[0]
    projected = F.linear(hidden, parameters["in_proj.weight"], parameters.get("in_proj.bias"))
    z, xBC, _ = projected.split([inner, conv, config["n_heads"]], dim=-1)
    x = causal_conv(xBC, parameters, config)[..., :inner]
    return x.unflatten(-1, (config["n_heads"], -1)), z


def rebuild(y: Tensor, gate: Tensor, parameters: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """Scan output with skip (b, t, h, p) and gate (b, t, d_inner) to the mixer's output: gate, RMSNorm, out_proj."""
    weight = parameters["out_proj.weight"]
    gated = y.flatten(-2) * F.silu(gate.to(y.dtype))
    grouped = gated.unflatten(-1, (-1, config["norm_group"]))
    normed = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + config["norm_eps"])
    # The released code rounds to the model's dtype before the norm's weight.
    normed = normed.flatten(-2).to(y.dtype if compute_dtype(weight.dtype) == weight.dtype else weight.dtype)
    return F.linear((parameters["norm.weight"] * normed).to(weight.dtype), weight, parameters.get("out_proj.bias"))


FAMILY = Family(
    name="mamba2",
    scan="mamba2_chunk_scan",
    lower=lower,
    replace=replace,
    prefix=prefix,
    describe=describe,
    front=front,
    rebuild=rebuild,
)
