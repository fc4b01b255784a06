"""Padding on the right, made silent in the recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmlens.kernels.inputs import ScanInputs

__all__ = ["silence"]


def silence(inputs: ScanInputs, lengths: Tensor | None) -> ScanInputs:
    """Positions at and after ``lengths`` (b,) neither decay nor write nor read, so a padded row equals its single run.

    The model itself lets padded tokens decay the state; on the right that never reaches a real token's output, but
    it would change the final state.
    """
    if lengths is None:
        return inputs
    padded = torch.arange(inputs.length, device=lengths.device) >= lengths[:, None]
    if not padded.any():
        return inputs
    wide = padded[:, :, None, None]
    changes = {"value": inputs.value.masked_fill(wide, 0), "read": inputs.read.masked_fill(wide, 0)}
    if inputs.dt is not None:
        changes["dt"] = inputs.dt.masked_fill(wide[..., 0], 0)
    if inputs.log_decay is not None:
        changes["log_decay"] = inputs.log_decay.masked_fill(wide, 0)
    if inputs.erase_write is not None:
        changes["erase_write"] = inputs.erase_write.masked_fill(wide, 0)
    return inputs.replace(**changes)
