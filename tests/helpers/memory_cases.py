"""Recurrences for the memory tests, and their decays and matrices as plain Python lists."""

from __future__ import annotations

import math

import torch

from ssmlens.kernels import naive
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.recurrence import Recurrence


def constant(a: float, length: int, dtype: torch.dtype = torch.float64) -> Recurrence:
    """One head, one state, the decay ``a`` at every token; writes and reads are 1, so M[t, s] = a^(t - s)."""
    ones = torch.ones(1, length, 1, 1, dtype=dtype)
    return Recurrence(ScanInputs(value=ones, write=ones, read=ones, log_decay=ones * math.log(a)))


def random(form: str, batch: int = 2, length: int = 23, lengths: list[int] | None = None, seed: int = 0) -> Recurrence:
    """A float64 recurrence with three heads and four states.

    Args:
        form: "per-state" (dt * A, as Mamba-1), "scalar" (dt * A, as Mamba-2) or "explicit" (log_decay per state).
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    b, t, h, n = batch, length, 3, 4
    pieces = {"value": uniform(b, t, h, 2) - 0.5, "write": uniform(b, t, 1, n) - 0.5, "read": uniform(b, t, 1, n) - 0.5}
    if form == "explicit":
        pieces["log_decay"] = -uniform(b, t, h, n).square()
    else:
        pieces["dt"] = uniform(b, t, h).square()
        pieces["A"] = -uniform(h, n if form == "per-state" else 1) - 0.1
    return Recurrence(ScanInputs(**pieces), lengths=None if lengths is None else torch.tensor(lengths))


FORMS = ("per-state", "scalar", "explicit")


def decays(rec: Recurrence, b: int, h: int, n: int) -> list[float]:
    """The log decays of one state over the real tokens of one batch row."""
    full = rec.log_decay.double()
    return full[b, : int(rec.real_lengths[b]), h, min(n, full.shape[-1] - 1)].tolist()


def states(rec: Recurrence) -> int:
    """Number of different decays in a head."""
    return rec.log_decay.shape[-1]


def matrix(rec: Recurrence, b: int, h: int) -> list[list[float]]:
    """The implicit attention of one head, from the naive scan, as rows."""
    return naive.attention(rec.inputs)[b, h].double().tolist()


def single(rec: Recurrence, b: int) -> Recurrence:
    """One batch row as a run of its own, without padding."""
    cut = {k: x if k == "A" else x[b : b + 1, : int(rec.real_lengths[b])] for k, x in rec.inputs.tensors().items()}
    return Recurrence(ScanInputs(**cut))
