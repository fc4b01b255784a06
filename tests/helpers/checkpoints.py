"""Random checkpoints in both formats, every weight moved away from its initial value."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

__all__ = [
    "GROUPED_NORM",
    "falcon",
    "gap",
    "mamba1",
    "mamba2",
    "native_folder",
    "perturb",
    "save_native",
    "transformers_folder",
]

GROUPED_NORM = "group_size" in inspect.signature(MambaRMSNormGated).parameters
"""transformers before 5.23 normalises Mamba-2's output over all groups at once."""

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def mamba1(seed: int = 0, **config: Any) -> Any:
    """Two layers of 24 channels with 5 states each and a vocabulary of 37; perturbed, float64."""
    from transformers import MambaConfig, MambaForCausalLM

    settings = {"vocab_size": 37, "hidden_size": 12, "num_hidden_layers": 2, "state_size": 5, "time_step_rank": 3}
    return perturb(MambaForCausalLM(MambaConfig(**{**settings, **NO_TOKENS, **config})), seed)


def falcon(seed: int = 0, **config: Any) -> Any:
    """As `mamba1`, with Falcon-Mamba's norms on dt, B and C."""
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    settings = {"vocab_size": 37, "hidden_size": 12, "num_hidden_layers": 2, "state_size": 5, "time_step_rank": 3}
    return perturb(FalconMambaForCausalLM(FalconMambaConfig(**{**settings, **NO_TOKENS, **config})), seed)


def mamba2(seed: int = 0, **config: Any) -> Any:
    """Two layers of 4 heads with 6 channels, 7 states, 2 groups and chunks of 4 tokens; perturbed, float64."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    settings = {
        "vocab_size": 37,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "state_size": 7,
        "num_heads": 4,
        "head_dim": 6,
        "n_groups": 2 if GROUPED_NORM else 1,
        "chunk_size": 4,
    }
    return perturb(Mamba2ForCausalLM(Mamba2Config(**{**settings, **NO_TOKENS, **config})), seed)


@torch.no_grad()
def perturb(model: Any, seed: int = 0) -> Any:
    """Every weight random in float64, of a size that keeps activations near one and every term in play."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    for name, x in model.named_parameters():
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if name.endswith("norm.weight") or name.endswith("norm_f.weight"):
            x.copy_(1 + 0.3 * noise)
        elif name.endswith(("A_log", ".D", "bias")):
            x.copy_(0.7 * noise)
        elif name.endswith("conv1d.weight"):
            x.copy_(0.5 * noise)
        elif "embeddings" in name:
            x.copy_(noise)
        else:
            x.copy_(noise / x.shape[-1] ** 0.5)
    return model


def gap(ours: Tensor, truth: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of the truth; inf for a wrong shape or NaN."""
    if ours.shape != truth.shape:
        return float("inf")
    ours, truth = ours.detach().double(), truth.detach().double()
    difference, scale = (ours - truth).abs().max().item(), truth.abs().max().item()
    return float("inf") if difference != difference else difference if difference == 0 else difference / scale


def transformers_folder(model: Any, folder: Path, **config: Any) -> Path:
    """``save_pretrained``, with entries of config.json exchanged afterwards."""
    model.save_pretrained(folder)
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def native_folder(model: Any, folder: Path, *, vocab_size: int, multiple: int = 8, head: bool = True) -> Path:
    """The weights of a tied transformers model as a state-spaces folder with the published config keys."""
    c, weights = model.config, {}
    for name, x in model.state_dict().items():
        if name != "lm_head.weight" or head:
            weights[name.replace("backbone.embeddings.", "backbone.embedding.")] = x.detach().clone()
    ssm: dict[str, Any] = {
        "d_state": c.state_size,
        "d_conv": c.conv_kernel,
        "expand": c.expand,
        "bias": c.use_bias,
        "conv_bias": c.use_conv_bias,
    }
    config: dict[str, Any] = {"d_model": c.hidden_size, "n_layer": c.num_hidden_layers, "vocab_size": vocab_size}
    if c.model_type == "mamba2":
        ssm |= {"layer": "Mamba2", "headdim": c.head_dim, "ngroups": c.n_groups, "chunk_size": c.chunk_size}
        if tuple(c.time_step_limit) != (0.0, float("inf")):
            ssm["dt_limit"] = list(c.time_step_limit)
        config |= {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "tie_embeddings": True}
    else:
        ssm |= {"dt_rank": c.time_step_rank}
    config |= {
        "ssm_cfg": ssm,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": multiple,
    }
    return save_native(folder, config, weights)


def save_native(folder: Path, config: Mapping[str, Any], weights: Any) -> Path:
    """Write config.json and pytorch_model.bin."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder
