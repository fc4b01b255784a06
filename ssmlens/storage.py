"""A trace on disk: one safetensors file with a JSON header; bf16 survives and nothing is pickled."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssmlens.errors import CheckpointError, brief

if TYPE_CHECKING:
    from ssmlens.trace import MixerTrace, Trace

__all__ = ["load", "save"]

FORMAT = "ssmlens.trace/1"


def save(trace: Trace, path: Path, weights: bool = False) -> None:
    """Write ``trace`` to ``path``, through a temporary file beside it so that a failure leaves the old one.

    Raises:
        CheckpointError: when the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {"ids": trace.ids, "logits": trace.logits, "lengths": trace.lengths}
    tensors |= {f"residuals.{k}": x for k, x in enumerate(trace.residuals)}
    if weights:
        tensors |= {f"head.{name}": x for name, x in trace.head.items()}
    mixers: dict[str, Any] = {}
    for k, mixer in trace.mixers.items():
        rec = mixer.recurrence
        pieces = {f"scan.{name}": x for name, x in rec.inputs.tensors().items()}
        pieces |= {"input": mixer.input, "output": mixer.output}
        if mixer.parameters or mixer.stored_gate is not None:
            pieces["gate"] = mixer.gate
        if rec.D is not None:
            pieces["D"] = rec.D
        if weights:
            pieces |= {f"weights.{name}": x for name, x in mixer.parameters.items()}
        tensors |= {f"mixers.{k}.{name}": x for name, x in pieces.items()}
        mixers[str(k)] = {
            "family": mixer.family,
            "config": dict(mixer.config),
            "reconstruction_error": mixer.reconstruction_error,
            "padded": rec.lengths is not None,
        }
    header = {
        "format": FORMAT,
        "tokens": json.dumps(trace.tokens),
        "layers": json.dumps([asdict(layer) for layer in trace.layers]),
        "mixers": json.dumps(mixers),
        "settings": json.dumps(dict(trace.settings)),
        "tensors": json.dumps(sorted(tensors)),
    }
    # A clone gives each entry its own memory, which the format demands.
    own = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(own, partial, metadata=header)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the trace cannot be written to {path}: {brief(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # the folder may not even exist
            partial.unlink()


def load(path: Path, device: str | torch.device = "cpu") -> Trace:
    """Read what `save` wrote.

    Raises:
        CheckpointError: when the file is missing, damaged, or not a whole trace.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"no trace at {path}: {'it is a folder' if path.is_dir() else 'the file does not exist'}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(f"{path} is a safetensors file but no trace of format {FORMAT}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {brief(error)}") from error
    try:
        return _decode({k: x if k == "format" else json.loads(x) for k, x in header.items()}, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} holds no whole trace: {brief(error)}") from error


def _decode(header: dict[str, Any], tensors: dict[str, Tensor]) -> Trace:
    from ssmlens.trace import LayerInfo, Trace

    # D and the gate are optional in the format, so their loss would otherwise go unnoticed.
    if sorted(tensors) != header["tensors"]:
        raise ValueError("tensors are missing or were added")
    count = sum(name.startswith("residuals.") for name in tensors)
    trace = Trace(
        ids=tensors["ids"],
        tokens=header["tokens"],
        logits=tensors["logits"],
        lengths=tensors["lengths"],
        layers=tuple(LayerInfo(**layer) for layer in header["layers"]),
        mixers={int(key): _mixer(int(key), info, tensors) for key, info in header["mixers"].items()},
        residuals=tuple(tensors[f"residuals.{k}"] for k in range(count)),
        settings=header["settings"],
        head={name.removeprefix("head."): x for name, x in tensors.items() if name.startswith("head.")},
    )
    if len(trace.layers) + 1 != count or len(trace.tokens) != len(trace.ids):
        raise ValueError("the header does not fit the tensors")
    missing = {"model", "dtype"} - set(trace.settings)
    if missing:
        raise ValueError(f"its settings have no {min(missing)}")
    return trace


def _mixer(layer: int, info: dict[str, Any], tensors: dict[str, Tensor]) -> MixerTrace:
    from ssmlens.kernels.inputs import ScanInputs
    from ssmlens.recurrence import Recurrence
    from ssmlens.trace import MixerTrace

    prefix = f"mixers.{layer}."
    own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    inputs = ScanInputs(**{n.removeprefix("scan."): x for n, x in own.items() if n.startswith("scan.")})
    return MixerTrace(
        layer=layer,
        family=info["family"],
        recurrence=Recurrence(inputs, own.get("D"), tensors["lengths"] if info["padded"] else None),
        input=own["input"],
        output=own["output"],
        parameters={n.removeprefix("weights."): x for n, x in own.items() if n.startswith("weights.")},
        config=info["config"],
        reconstruction_error=info["reconstruction_error"],
        stored_gate=own.get("gate"),
    )
