"""The state-spaces checkpoint format: config.json without a model_type, and one weights file.

Names are those of transformers' Mamba and Mamba-2 but for ``backbone.embedding``. The head is tied to the embedding,
and the vocabulary is padded up to a multiple. Every name and shape must fit; what transformers' models cannot express
is refused in a sentence.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmlens.errors import CheckpointError, UnsupportedModelError, brief, few

__all__ = ["load_native"]

NORM_EPS = 1e-5
"""mamba_ssm's RMSNorm epsilon, which its config does not hold."""

COMMON_SSM = {
    "layer",
    "d_state",
    "d_conv",
    "expand",
    "conv_bias",
    "bias",
    "dt_min",
    "dt_max",
    "dt_init_floor",
}
MAMBA1_SSM = COMMON_SSM | {"dt_rank", "dt_init", "dt_scale", "use_fast_path"}
MAMBA2_SSM = COMMON_SSM | {
    "headdim", "ngroups", "A_init_range", "D_has_hdim", "rmsnorm", "norm_before_gate", "dt_limit", "chunk_size",
    "use_mem_eff_path", "d_ssm", "conv_init",
}  # fmt: skip


def load_native(folder: Path, config: dict[str, Any]) -> tuple[nn.Module, torch.dtype]:
    """A transformers model with the weights of a state-spaces folder, and the dtype they are stored in.

    Raises:
        CheckpointError: when the weights are missing, damaged, or do not fit the config by name and shape.
        UnsupportedModelError: when the config asks for attention, MLP or mixer options without a counterpart.
    """
    ssm = config.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise CheckpointError(f"config.json: ssm_cfg is an object, got {ssm!r}")
    layer = ssm.get("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise UnsupportedModelError(f"ssm_cfg.layer {layer!r} is not supported: choose 'Mamba1' or 'Mamba2'")
    _refuse(config, ssm, layer)
    weights = _read(folder)
    weights = {("backbone.embeddings.weight" if k == "backbone.embedding.weight" else k): x for k, x in weights.items()}
    embedding = weights.get("backbone.embeddings.weight")
    if embedding is None:
        raise CheckpointError(f"the weights in {folder} have no backbone.embedding.weight")
    shape = (_padded_vocabulary(config), _whole(config, "d_model"))
    if tuple(embedding.shape) != shape:
        raise CheckpointError(
            f"backbone.embedding.weight is {tuple(embedding.shape)}, but config.json says {shape} after padding the "
            "vocabulary"
        )
    tied = bool(config.get("tie_embeddings", True))
    head = weights.get("lm_head.weight")
    if head is None:
        if not tied:
            raise CheckpointError(f"the weights in {folder} have no lm_head.weight, and tie_embeddings is false")
        weights["lm_head.weight"] = embedding
    elif tied and not torch.equal(head, embedding):
        raise CheckpointError("lm_head.weight differs from the embedding, but the config ties them")
    model = _build(config, ssm, layer, shape[0], tied)
    _check_fit(folder, weights, model.state_dict())
    model.load_state_dict(weights, strict=True, assign=True)
    if tied:
        model.tie_weights()  # type: ignore[operator]
    return model, embedding.dtype


def _refuse(config: dict[str, Any], ssm: dict[str, Any], layer: str) -> None:
    known = MAMBA1_SSM if layer == "Mamba1" else MAMBA2_SSM
    unknown = sorted(set(ssm) - known)
    if unknown:
        raise UnsupportedModelError(f"ssm_cfg holds {', '.join(unknown)}, which {layer} checkpoints here may not have")
    cases = {
        "attention layers (attn_layer_idx)": bool(config.get("attn_layer_idx")),
        "an MLP (d_intermediate)": bool(config.get("d_intermediate")),
        "LayerNorm (rms_norm false)": not config.get("rms_norm", True),
        "a skip weight per channel (D_has_hdim)": bool(ssm.get("D_has_hdim", False)),
        "no gated norm (rmsnorm false)": not ssm.get("rmsnorm", True),
        "the norm before the gate (norm_before_gate)": bool(ssm.get("norm_before_gate", False)),
        "a partial SSM (d_ssm)": ssm.get("d_ssm") is not None,
    }
    for what, present in cases.items():
        if present:
            raise UnsupportedModelError(f"state-spaces checkpoints with {what} are not supported")


def _padded_vocabulary(config: dict[str, Any]) -> int:
    vocab, multiple = _whole(config, "vocab_size"), _whole(config, "pad_vocab_size_multiple", 8)
    return math.ceil(vocab / multiple) * multiple


def _whole(table: dict[str, Any], key: str, default: int | None = None) -> int:
    """A count from the config."""
    value = table.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 1:
        raise CheckpointError(f"config.json: {key} is a whole number above 0, got {value!r}")
    return int(value)


def _limits(value: Any) -> tuple[float, float]:
    try:
        low, high = (float(x) for x in value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: dt_limit is a pair of numbers, got {value!r}") from error
    return low, high


def _check_fit(folder: Path, weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every weight is there, nothing else is, and all have their shape."""
    shapes = [
        f"{k} is {tuple(weights[k].shape)} instead of {tuple(x.shape)}"
        for k, x in expected.items()
        if k in weights and weights[k].shape != x.shape
    ]
    for what, wrong in {
        "missing": sorted(set(expected) - set(weights)),
        "unexpected": sorted(set(weights) - set(expected)),
        "wrong shape:": shapes,
        "not floating point:": sorted(k for k, x in weights.items() if not x.is_floating_point()),
    }.items():
        if wrong:
            raise CheckpointError(f"the weights in {folder} do not fit its config.json: {what} {few(wrong)}")


def _build(config: dict[str, Any], ssm: dict[str, Any], layer: str, rows: int, tied: bool) -> nn.Module:
    """The transformers model of this config, on the meta device: the weights are assigned afterwards."""
    d_model, expand = _whole(config, "d_model"), _whole(ssm, "expand", 2)
    common: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": d_model,
        "num_hidden_layers": _whole(config, "n_layer"),
        "layer_norm_epsilon": NORM_EPS,
        "expand": expand,
        "conv_kernel": _whole(ssm, "d_conv", 4),
        "use_bias": ssm.get("bias", False),
        "use_conv_bias": ssm.get("conv_bias", True),
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": tied,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if layer == "Mamba1":
        kind, name = "mamba", "Mamba"
        common |= {"state_size": _whole(ssm, "d_state", 16), "time_step_rank": ssm.get("dt_rank", "auto")}
    else:
        kind, name = "mamba2", "Mamba2"
        head_dim, inner = _whole(ssm, "headdim", 64), expand * d_model
        if inner % head_dim:
            raise CheckpointError(f"headdim {head_dim} does not divide the inner width {inner}")
        common |= {
            "state_size": _whole(ssm, "d_state", 128),
            "head_dim": head_dim,
            "num_heads": inner // head_dim,
            "n_groups": _whole(ssm, "ngroups", 1),
            "chunk_size": _whole(ssm, "chunk_size", 256),
            "time_step_limit": _limits(ssm.get("dt_limit", (0.0, math.inf))),
        }
    module = importlib.import_module(f"transformers.models.{kind}")
    try:
        with torch.device("meta"):
            model: nn.Module = getattr(module, f"{name}ForCausalLM")(getattr(module, f"{name}Config")(**common))
    except Exception as error:  # the config classes validate with errors of their own
        raise CheckpointError(f"config.json describes no {name} model: {brief(error)}") from error
    _check_norm(model, common.get("n_groups", 1))
    return model


def _check_norm(model: nn.Module, groups: int) -> None:
    """Refuse a transformers that normalises over all groups at once, which mamba_ssm never did."""
    norms = [m for m in model.modules() if type(m).__name__ == "MambaRMSNormGated"]
    if groups > 1 and not all(hasattr(m, "group_size") for m in norms):
        raise UnsupportedModelError(
            f"state-spaces checkpoints with ngroups {groups} need transformers >= 5.23: older versions normalise over "
            "all groups at once"
        )


def _read(folder: Path) -> dict[str, Tensor]:
    """The weights file, never unpickled beyond plain tensors."""
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if safe.is_file():
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(safe)
        except SafetensorError as error:
            raise CheckpointError(f"{safe} is damaged: {brief(error)}") from error
    if not pickled.is_file():
        raise CheckpointError(f"{folder} holds neither pytorch_model.bin nor model.safetensors")
    try:
        weights = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and runtime errors alike
        raise CheckpointError(f"{pickled} cannot be read: {brief(error)}") from error
    if not isinstance(weights, dict) or not all(
        isinstance(k, str) and isinstance(x, Tensor) for k, x in weights.items()
    ):
        raise CheckpointError(f"{pickled} holds no state dict of tensors")
    return weights
