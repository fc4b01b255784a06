"""What `rome` asks of the model: the subject's key, and a change of out_proj's output that makes it say the target."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ssmlens.errors import SsmlensError
from ssmlens.interventions._forward import Changes, forward
from ssmlens.lens import Lens
from ssmlens.prompt import Batch

__all__ = ["Task", "keys", "out_weight"]


class Task:
    """The prompt after every prefix, and what is asked of the model there."""

    def __init__(
        self, lens: Lens, layer: int, batch: Batch, subject: Tensor, prompt: int, target: list[int], fronts: Any
    ) -> None:
        self.lens, self.layer, self.batch = lens, layer, batch
        self.rows = torch.arange(len(fronts), device=lens.device)
        self.subject = subject.to(lens.device)
        first = torch.tensor([len(f) + prompt - 1 for f in fronts], device=lens.device)
        self.asked = first[:, None] + torch.arange(len(target), device=lens.device)
        self.target = torch.tensor(target, device=lens.device).expand(len(fronts), -1)[..., None]

    def key_and_output(self) -> tuple[Tensor, Tensor]:
        """Mean key (e,) at the subject, and mean output (d,) of out_proj there, without its bias."""
        with keys(self.lens, self.layer) as seen:
            self.reference = self._after(forward(self.lens, self.batch, Changes()), self.subject).detach()
        key = seen[0][self.rows, self.subject].to(torch.promote_types(seen[0].dtype, torch.float32)).mean(0)
        return key, out_weight(self.lens, self.layer).detach().to(key.dtype) @ key

    def _after(self, logits: Tensor, at: Tensor) -> Tensor:
        """Log probabilities at positions (b,) or (b, k)."""
        rows = self.rows if at.ndim == 1 else self.rows[:, None]
        return logits[rows, at].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def probability(self) -> float:
        """Of the whole target after the prompt without a prefix."""
        logits = forward(self.lens, self.batch, Changes())
        return float(self._after(logits, self.asked).gather(-1, self.target)[0].sum().exp())

    def optimise(
        self, output: Tensor, steps: int, rate: float, kl_weight: float, weight_decay: float, clamp: float
    ) -> tuple[Tensor, tuple[float, ...]]:
        """The change (d,) of out_proj's output at the subject, and the losses on the way."""
        scale = output.norm()
        change = torch.zeros_like(output).requires_grad_()
        losses: list[float] = []
        optimizer = torch.optim.Adam([change], lr=rate * float(scale) / len(output) ** 0.5)

        def add(x: Tensor) -> Tensor:
            x = x.clone()
            x[self.rows, self.subject] = x[self.rows, self.subject] + change.to(x.dtype)
            return x

        for _ in range(steps):
            logits = forward(self.lens, self.batch, Changes(outputs={self.layer: add}), gradients=True)
            loss = -self._after(logits, self.asked).gather(-1, self.target).sum((1, 2)).mean()
            if not losses and not bool(torch.autograd.grad(loss, change, retain_graph=True)[0].any()):
                raise SsmlensError(
                    f"nothing that layer {self.layer} puts out at the subject reaches the target, so the edit would "
                    "touch nothing: choose an earlier layer"
                )
            now = self._after(logits, self.subject)
            loss = loss + kl_weight * (self.reference.exp() * (self.reference - now)).sum(-1).mean()
            loss = loss + weight_decay * _norm(change) / scale**2
            (change.grad,) = torch.autograd.grad(loss, change)
            optimizer.step()
            losses.append(float(loss.detach()))
            with torch.no_grad():
                change.mul_((clamp * scale / change.norm()).clamp(max=1.0))
        return change.detach(), tuple(losses)


def _norm(x: Tensor) -> Tensor:
    """The norm, with gradient 0 at 0."""
    return (x.pow(2).sum() + torch.finfo(x.dtype).tiny).sqrt()


@contextmanager
def keys(lens: Lens, layer: int) -> Iterator[list[Tensor]]:
    """The inputs of out_proj in the forwards inside."""
    seen: list[Tensor] = []
    projection = lens._mixers[layer][1].out_proj
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))  # type: ignore[union-attr]
    try:
        yield seen
    finally:
        handle.remove()
    if not seen:
        raise SsmlensError(f"out_proj of layer {layer} was never called, so it has no keys to edit")


def out_weight(lens: Lens, layer: int) -> Tensor:
    weight: Tensor = lens._mixers[layer][1].out_proj.weight  # type: ignore[union-attr, assignment]
    return weight
