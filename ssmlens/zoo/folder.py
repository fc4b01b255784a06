"""Writes a trained model as a transformers folder, at the precision it is shipped in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .data import END

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

__all__ = ["round_weights", "save_folder", "write_json"]


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.no_grad()
def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round every parameter to a narrower dtype in place; the model keeps computing in its own.

    Raises:
        ValueError: when a weight does not survive (overflow or NaN).
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(parameter.to(dtype))
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} holds values that {dtype} cannot")


def save_folder(model: PreTrainedModel, tokenizer: Tokenizer, out: Path, dtype: torch.dtype) -> None:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files.

    The weights are stored in ``dtype``, the configuration says float32: a plain ``from_pretrained`` then
    computes in float32 from the stored values.

    Args:
        model: a trained model.
        tokenizer: its tokenizer.
        out: folder to write to.
        dtype: dtype of the stored weights.
    """
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embeddings
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    # It concerns initialisation, but transformers (5.23) also divides loaded out_proj weights when it is set.
    config["rescale_prenorm_residual"] = False
    for key in ("_name_or_path", "_attn_implementation"):
        config.pop(key, None)
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    names = {"bos_token": END, "eos_token": END, "pad_token": END, "unk_token": None}
    rest = {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(out / "tokenizer_config.json", names | rest)
