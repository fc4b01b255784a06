"""Mamba-1 (selective scan): transformers' Mamba and Falcon-Mamba.

``h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]``, ``y[t] = C[t] h[t] + D x[t]``, per inner channel, with dt after
softplus and A = -exp(A_log) (Gu and Dao 2023; B discretised by Euler, as in the released code).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmlens.kernels.inputs import ScanInputs
from ssmlens.models.family import Family, Lowered, finite_rate, own_copy
from ssmlens.models.padding import silence
from ssmlens.recurrence import Recurrence

__all__ = ["FAMILY"]


def lower(arguments: Mapping[str, Any], lengths: Tensor | None) -> Lowered:
    """Arguments of ``mamba_selective_scan``, channels first (b, d, t), as a recurrence with one head per channel."""
    x, dt = arguments["hidden_states"], arguments["dt"]
    if arguments.get("delta_bias") is not None:
        dt = dt + arguments["delta_bias"].to(dt.dtype)[..., None]
    if arguments.get("delta_softplus"):
        dt = F.softplus(dt)
    inputs = ScanInputs(
        value=time_first(x)[..., None],  # (b, t, h, 1)
        write=arguments["B"].transpose(1, 2)[:, :, None],  # (b, t, 1, n)
        read=arguments["C"].transpose(1, 2)[:, :, None],
        dt=time_first(dt),  # (b, t, h)
        A=finite_rate(arguments["A"]),  # (h, n)
    )
    z = arguments.get("z")
    gate = None if z is None else z.transpose(1, 2)
    return Lowered(Recurrence(silence(inputs, lengths), D=own_copy(arguments.get("D")), lengths=lengths), gate)


def replace(arguments: Mapping[str, Any], lowered: Lowered, y: Tensor, final: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Our y (b, t, h, 1) and state as ``mamba_selective_scan`` returns them: gated, (b, d, t) and (b, d, n)."""
    out = y[..., 0]
    if lowered.gate is not None:
        gate = F.silu(lowered.gate)
        # In place where it can be: a long text has little room for one more tensor of this size.
        out = out * gate if torch.is_grad_enabled() or gate.dtype != out.dtype else gate.mul_(out)
    out = out.transpose(1, 2)
    return (out, final[:, :, 0]) if arguments.get("return_last_state") else out


def prefix(arguments: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The same call on the first ``length`` tokens."""
    timed = ("hidden_states", "dt", "B", "C", "z")
    return {k: v[..., :length] if k in timed and v is not None else v for k, v in arguments.items()}


def describe(mixer: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights around the scan by reference: in_proj, conv1d, x_proj, dt_proj, out_proj, A_log and D."""
    parameters: dict[str, Tensor] = dict(mixer.named_parameters())
    config: dict[str, Any] = {"d_conv": int(mixer.conv_kernel_size), "activation": str(mixer.activation)}  # type: ignore[arg-type]
    if hasattr(mixer, "rms_eps"):
        config["bcdt_rms_eps"] = float(mixer.rms_eps)  # type: ignore[arg-type]
    return parameters, config


def front(hidden: Tensor, parameters: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Mixer input (b, t, d) to the scan's value (b, t, h, 1) and the gate z (b, t, h)."""
    x, z = F.linear(hidden, parameters["in_proj.weight"], parameters.get("in_proj.bias")).chunk(2, dim=-1)
    return causal_conv(x, parameters, config)[..., None], z


def rebuild(y: Tensor, gate: Tensor, parameters: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """Scan output with skip (b, t, h, 1) and gate (b, t, h) to the mixer's output (b, t, d)."""
    weight = parameters["out_proj.weight"]
    out = (y[..., 0] * F.silu(gate.to(y.dtype))).to(weight.dtype)
    return F.linear(out, weight, parameters.get("out_proj.bias"))


def time_first(x: Tensor) -> Tensor:
    """(b, d, t) to a contiguous (b, t, d). Row by row, because only the two-dimensional transpose is blocked in torch:
    25 times faster at d = 1536, t = 1024 on a CPU."""
    if x.device.type != "cpu" or x.requires_grad:
        return x.transpose(1, 2).contiguous()
    out = x.new_empty(x.shape[0], x.shape[2], x.shape[1])
    for row, source in zip(out, x):
        row.copy_(source.t())
    return out


def causal_conv(x: Tensor, parameters: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """Depthwise causal convolution over time and activation, (b, t, d); the last tap is the current token."""
    from transformers.activations import ACT2FN

    weight = parameters["conv1d.weight"]  # (d, 1, k)
    padded = F.pad(x.transpose(1, 2), (config["d_conv"] - 1, 0))
    out: Tensor = ACT2FN[config["activation"]](
        F.conv1d(padded, weight, parameters.get("conv1d.bias"), groups=weight.shape[0])
    )
    return out.transpose(1, 2)


FAMILY = Family(
    name="mamba1",
    scan="mamba_selective_scan",
    lower=lower,
    replace=replace,
    prefix=prefix,
    describe=describe,
    front=front,
    rebuild=rebuild,
)
