"""`load`: from a name, a folder, a Hub id or a model in memory to a `Lens`."""

from __future__ import annotations

import importlib
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmlens import zoo
from ssmlens.errors import CheckpointError, SsmlensError, UnsupportedModelError, brief, few
from ssmlens.lens import Lens
from ssmlens.models import SUPPORTED, supported
from ssmlens.quiet import quiet_transformers

__all__ = ["DTYPES", "load"]

DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")
"""Names that ``load(dtype=...)`` takes besides torch dtypes."""

_LOCK = threading.Lock()
"""transformers switches initialisation off process-wide while it loads: two loads at once spoil each other."""


def load(
    source: str | os.PathLike[str] | nn.Module,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    tokenizer: Any = None,
) -> Lens:
    """Make a lens of a model.

    Nothing is downloaded for a shipped name or a folder, no pickle is executed and no remote code is run. A model in
    memory is used as it is, without a copy, and keeps its dtype unless ``dtype`` says otherwise.

    A float64 model computes in float64 throughout: transformers' casts to float32 inside it are lifted
    (`ssmlens.exact`).

    Args:
        source: a shipped model's name (`ssmlens.zoo.names()` and `organisms()`), a folder in transformers or in
            state-spaces layout, a Hub id "owner/name", or a transformers model.
        device: where the model goes.
        dtype: a torch dtype or its name; "auto" keeps the checkpoint's. Default float32, or the model's own for one
            in memory.
        tokenizer: for a model in memory or a folder without one: anything with ``encode(text)`` and ``decode(ids)``.

    Raises:
        CheckpointError: when there is no such checkpoint, or it is damaged, incomplete or not finite.
        UnsupportedModelError: naming what is supported, when the model is of another family.
    """
    wanted = _dtype(dtype)
    device = _device(device)
    if isinstance(source, nn.Module):
        model, name = source, type(source).__name__
        _check_family(getattr(getattr(model, "config", None), "model_type", type(model).__name__), model)
        keep = next(model.parameters()).dtype
    else:
        try:
            path = os.fsdecode(source)
        except TypeError as error:
            raise CheckpointError(f"a source is a name, a folder or a model, got {type(source).__name__}") from error
        with _LOCK:
            model, name, keep, found = _open(path, wanted or torch.float32)
        tokenizer = tokenizer if tokenizer is not None else found
    _check_finite(model, name)
    if isinstance(source, nn.Module):
        # Without a dtype, weights of several dtypes stay what they are.
        model = model.to(device, wanted) if isinstance(wanted, torch.dtype) else model.to(device)
    else:
        target = wanted if isinstance(wanted, torch.dtype) else keep if wanted == "auto" else torch.float32
        model = model.to(device, target).eval()
    return Lens(model, tokenizer, name)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    if dtype is None or dtype == "auto":
        return dtype
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise SsmlensError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise SsmlensError(f"unknown device {device!r}: give 'cpu', 'cuda' or 'cuda:N'") from error
    if found.type not in ("cpu", "cuda"):
        raise SsmlensError(f"device {device!r} is not supported: give 'cpu', 'cuda' or 'cuda:N'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise SsmlensError(f"device {device!r} was asked for, but torch does not see it here: use device='cpu'")
    return found


def _open(source: str, dtype: torch.dtype | str) -> tuple[nn.Module, str, torch.dtype, Any]:
    """Model, name, checkpoint dtype and tokenizer of anything that is not a model already."""
    if source in (*zoo.names(), *zoo.organisms()):
        folder, name = Path(zoo.path(source)), source
    elif Path(source).is_dir():
        folder, name = Path(source), Path(source).resolve().name
    elif Path(source).exists():
        raise CheckpointError(f"{source} is a file: give the folder that holds config.json and the weights")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        return _from_hub(source, dtype)
    else:
        raise CheckpointError(
            f"no model at {source!r}: it is neither a folder, nor a Hub id 'owner/name', nor a shipped model "
            f"({', '.join(zoo.names())})"
        )
    config = _config(folder)
    kind = config.get("model_type")
    if kind is None and {"d_model", "n_layer"} <= set(config):
        from ssmlens.models.native import load_native

        model, keep = load_native(folder, config)
    elif kind is None:
        raise UnsupportedModelError(
            f"{folder}/config.json has neither a model_type (transformers) nor d_model and n_layer (state-spaces): "
            f"choose {supported()}"
        )
    elif str(kind).startswith("ssmlens-"):
        raise UnsupportedModelError(f"{name} is no language model: open it with ssmlens.zoo.organism({name!r})")
    else:
        _check_family(str(kind))
        model, keep = _from_folder(folder, str(kind), dtype)
    return model, name, keep, _tokenizer(folder)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no config.json: it is no model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return config


def _check_family(kind: str, model: nn.Module | None = None) -> None:
    if kind not in SUPPORTED:
        raise UnsupportedModelError(f"models of type {kind!r} are not supported: choose {supported()}")
    if model is not None and not hasattr(model, "lm_head"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language model head: give a {SUPPORTED[kind][1]} instead"
        )


def _class(kind: str) -> Any:
    module, name, _ = SUPPORTED[kind]
    return getattr(importlib.import_module(module), name)


def _from_folder(folder: Path, kind: str, dtype: torch.dtype | str) -> tuple[nn.Module, torch.dtype]:
    """A transformers folder, read strictly and without any network.

    The dtype goes along: "auto" would first round the weights to what config.json states.
    """
    from safetensors import SafetensorError

    cls = _class(kind)
    try:
        with quiet_transformers():
            model, info = cls.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                weights_only=True,
                ignore_mismatched_sizes=True,  # they are named and refused below
                # Meant for fresh weights, it would divide the loaded out_proj by sqrt(layers).
                rescale_prenorm_residual=False,
            )
    except SafetensorError as error:
        raise CheckpointError(f"the weights in {folder} are damaged: {brief(error)}") from error
    except Exception as error:
        # transformers raises OSError, ValueError, RuntimeError, TypeError, KeyError and validation errors of its own.
        raise CheckpointError(f"{folder} cannot be loaded as {cls.__name__}: {brief(error)}") from error
    # lm_head.weight is absent from tied checkpoints; transformers does not count it as missing.
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        wrong = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info.get(what, ()))
        if wrong:
            raise CheckpointError(
                f"the weights in {folder} do not fit its config.json: {what.replace('_', ' ')} {few(wrong)}"
            )
    limits = getattr(model.config, "time_step_limit", (0.0, 0.0))
    if len(limits) != 2:
        raise CheckpointError(f"{folder}/config.json: time_step_limit is a pair of numbers, got {list(limits)}")
    return model, next(model.parameters()).dtype


def _from_hub(source: str, dtype: torch.dtype | str) -> tuple[nn.Module, str, torch.dtype, Any]:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                source, allow_patterns=["*.json", "*.safetensors", "pytorch_model*.bin", "*.txt", "*.model"]
            )
        )
    except Exception as error:
        raise CheckpointError(
            f"no model {source!r}: there is no such folder, and the Hub did not give it ({brief(error)}); "
            f"shipped models are {', '.join(zoo.names())}"
        ) from error
    model, _, keep, tokenizer = _open(str(folder), dtype)
    return model, source, keep, tokenizer


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None. A tokenizer.json is read by the tokenizers library alone, which is quick."""
    if (folder / "tokenizer.json").is_file():
        from ssmlens.tokenizer import FastTokenizer

        return FastTokenizer.from_file(folder / "tokenizer.json")
    if any((folder / f).is_file() for f in ("tokenizer_config.json", "vocab.json", "tokenizer.model")):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {brief(error)}") from error
    return None


def _check_finite(model: nn.Module, name: str) -> None:
    wrong = [key for key, x in model.named_parameters() if not _finite(x)]
    if wrong:
        raise CheckpointError(f"{name} has weights that are NaN or infinite: {few(wrong)}")


def _finite(x: Tensor) -> bool:
    # A sum is NaN or infinite when any entry is; only then, or when it overflows, look at every entry.
    return bool(torch.isfinite(x.detach().sum(dtype=torch.float64))) or bool(torch.isfinite(x.detach()).all())
