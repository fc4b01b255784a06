"""Recurrences of every kind, made from a few numbers: for the kernels' tables and for the laws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssmlens.kernels.inputs import ScanInputs

__all__ = ["DECAYS", "Case", "gradients", "make", "relative_error"]

DECAYS = ("dt*A head", "dt*A state", "log head", "log state")
"""How the decay is given: factorised or not, one per head or one per state."""


@dataclass(frozen=True)
class Case:
    """Sizes and features of one recurrence; ``decay`` is one of `DECAYS`, ``scale`` nats a step."""

    t: int
    h: int = 4
    p: int = 3
    g: int = 2
    n: int = 5
    decay: str = "dt*A head"
    scale: float = 1.0
    initial: bool = False
    reset: bool = False
    erase: bool = False
    read_groups: int | None = None
    b: int = 2

    def __str__(self) -> str:
        flags = "".join(f" {k}" for k in ("initial", "reset", "erase") if getattr(self, k))
        return f"t{self.t} h{self.h} p{self.p} g{self.g} n{self.n} {self.decay} {self.scale:g}{flags}"


def make(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> ScanInputs:
    """Random inputs of a case; the same numbers, rounded, in every dtype."""
    rng = torch.Generator().manual_seed(seed)
    b, t, h, p, g, n = case.b, case.t, case.h, case.p, case.g, case.n

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, dtype=torch.float64)

    m = 1 if case.decay.endswith("head") else n
    pieces: dict[str, Tensor] = {
        "value": normal(b, t, h, p),
        "write": normal(b, t, g, n),
        "read": normal(b, t, case.read_groups or g, n),
    }
    if case.decay.startswith("dt"):
        pieces |= {"dt": uniform(b, t, h), "A": -(0.1 + uniform(h, m)) * case.scale}
    else:
        log_decay = -uniform(b, t, h, m) * case.scale
        log_decay[:, 3:4] = -torch.inf
        pieces["log_decay"] = log_decay
    if case.initial:
        pieces["initial"] = normal(b, h, p, n)
    if case.reset:
        pieces["reset"] = uniform(b, t) < 0.1
    if case.erase:
        key = torch.nn.functional.normalize(normal(b, t, g, n), dim=-1)
        pieces |= {"erase_read": key, "erase_write": uniform(b, t, g, 1) * key}
    return ScanInputs(**pieces).cast(dtype)


def gradients(inputs: ScanInputs, run, weights_seed: int = 1) -> tuple[list[Tensor], dict[str, Tensor]]:  # type: ignore[no-untyped-def]
    """Outputs of ``run(inputs) -> list of tensors`` and the gradient of a random weighting of all of them."""
    pieces = {
        k: x.detach().clone().requires_grad_() if x.is_floating_point() else x for k, x in inputs.tensors().items()
    }
    found = run(ScanInputs(**pieces))
    rng = torch.Generator().manual_seed(weights_seed)
    weights = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.dtype) for x in found]
    leaves = {k: x for k, x in pieces.items() if x.is_floating_point()}
    loss = sum((w * x).sum() for w, x in zip(weights, found, strict=True))
    found_gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return [x.detach() for x in found], dict(zip(leaves, found_gradients, strict=True))


def relative_error(found: Tensor, true: Tensor) -> float:
    """Largest difference over the largest true entry; NaN stays NaN, shapes must agree."""
    assert found.shape == true.shape, f"{tuple(found.shape)} is not {tuple(true.shape)}"
    if not true.numel():
        return 0.0
    difference = (found.double() - true.double()).abs().max()
    return float(difference / true.double().abs().max().clamp(min=torch.finfo(torch.float64).tiny))
