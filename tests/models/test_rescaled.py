"""An initialisation flag in config.json must not change weights that were read from disk."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch

import ssmlens


@pytest.mark.parametrize("make", [checkpoints.mamba1, checkpoints.falcon, checkpoints.mamba2])
def test_rescale_prenorm_residual_leaves_the_weights(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = make(rescale_prenorm_residual=True)
    model.save_pretrained(tmp_path)
    loaded = ssmlens.load(tmp_path, dtype=torch.float64).model.state_dict()
    for name, x in model.state_dict().items():
        assert torch.equal(loaded[name], x), name
