"""Checkpoint folders with something changed in them, and the refusal that should follow."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

import ssmlens
from ssmlens.errors import CheckpointError, SsmlensError

__all__ = ["Bomb", "change_json", "hf", "native", "refused", "setting", "without"]

Change = Callable[[dict[str, Any]], Any]


def setting(**values: Any) -> Change:
    """Set entries of a table; those of ``ssm_cfg`` with ``ssm_cfg=...`` replace it whole."""
    return lambda table: table.update(values)


def without(*names: str) -> Change:
    """Drop entries of a table."""
    return lambda table: [table.pop(name) for name in names]


def change_json(path: Path, change: Change) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def hf(path: Path, model: Any = None, config: Change | None = None, weights: Change | None = None) -> Path:
    """A transformers folder, by default of a tiny Mamba-1, its config and weights changed."""
    folder = checkpoints.transformers_folder(checkpoints.mamba1() if model is None else model, path / "m")
    if config:
        change_json(folder / "config.json", config)
    if weights:
        tensors = load_file(folder / "model.safetensors")
        weights(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def native(path: Path, family: str = "mamba1", config: Change | None = None, weights: Change | None = None) -> Path:
    """A state-spaces folder for 37 tokens padded to 40, its config and weights changed."""
    model = getattr(checkpoints, family)(vocab_size=40, tie_word_embeddings=True)
    folder = checkpoints.native_folder(model, path / "m", vocab_size=37)
    if config:
        change_json(folder / "config.json", config)
    if weights:
        tensors = torch.load(folder / "pytorch_model.bin")
        weights(tensors)
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def refused(source: Any, words: str, error: type[Exception] = CheckpointError, **options: Any) -> None:
    """The load fails with one sentence in which the pattern ``words`` is found."""
    with pytest.raises(error, match=words) as caught:
        ssmlens.load(source, **options)
    assert isinstance(caught.value, SsmlensError)
    assert "\n" not in str(caught.value)


class Bomb:
    """Makes the folder ``path`` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)

    def works(self) -> bool:
        """The bomb would go off; leaves the place clean."""
        pickle.loads(pickle.dumps(self))
        os.rmdir(self.path)
        return True
