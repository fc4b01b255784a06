"""Training of the tuned lens: each layer's translator alone, on the divergence from the model's own prediction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmlens.errors import PromptError, SsmlensError
from ssmlens.interventions._lenses import unembed
from ssmlens.interventions._translators import Translators
from ssmlens.lens import Lens
from ssmlens.prompt import prepare
from ssmlens.trace import Trace

__all__ = ["train_translators", "windows"]


def train_translators(
    lens: Lens,
    text: str | Sequence[str] | Sequence[int] | Tensor,
    *,
    rank: int | None = None,
    steps: int = 200,
    rows: int = 4,
    length: int = 128,
    rate: float = 1e-3,
    check_every: int = 10,
    watched: int = 4,
    seed: int = 0,
) -> Translators:
    """Train the translators of `tuned_lens`, from the identity, by Adam on KL(final || lens).

    Every ``check_every`` steps the divergence on some of the training windows is measured. A layer that got worse
    there goes back to where it was and on at half the rate, so ``curve`` never increases and the result is at least
    as good on them as the logit lens.

    Args:
        lens: the model.
        text: a text, several, token ids, or windows of ids (n, t). The longer the better: ten thousand tokens is
            little.
        rank: of the maps' change from the identity; None for full affine maps.
        steps: of the optimiser.
        rows, length: windows of a step, and tokens of a window that a text is cut into.
        rate: of Adam; it falls to a tenth along a cosine.
        check_every: steps between two checks.
        watched: windows that the checks use.
        seed: of initialisation and order.

    Returns:
        The `Translators`, float32 on the CPU.

    Raises:
        PromptError: when the text is empty or shorter than two tokens.
        SsmlensError: for settings that are not positive.

    Source: Belrose et al. 2023, Eq. 10.
    """
    for name, value in (("rank", rank), ("steps", steps), ("rows", rows), ("length", length), ("watched", watched)):
        if value is not None and value < 1:
            raise SsmlensError(f"{name} is at least 1, got {value}")
    data = windows(lens, text, length)
    generator = torch.Generator().manual_seed(seed)
    layers, width = len(lens.layers), lens.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    maps = [_Map(width, rank, generator, lens.device) for _ in range(layers)]
    watch = lens.trace(data[:watched], layers=())
    curve = [_check(watch, maps, rate)]
    for step, batch in zip(range(1, steps + 1), _batches(data, rows, generator)):
        trace = lens.trace(batch, layers=())
        final = trace.logits.float().log_softmax(-1)
        for k, one in enumerate(maps):
            one.step(trace.residual(k).float(), final, trace, _share(step - 1, steps))
        if step % check_every == 0 or step == steps:
            curve.append(_check(watch, maps, rate))
    settings = {
        "model": lens.name, "rank": rank or width, "steps": steps, "rows": rows, "length": data.shape[1],
        "tokens": steps * rows * data.shape[1], "rate": rate, "seed": seed,
    }  # fmt: skip
    best = [one.best for one in maps]
    down = None if rank is None else torch.stack([b[2] for b in best]).cpu()
    up, bias = (torch.stack([b[i] for b in best]).cpu() for i in (0, 1))
    return Translators(up, down, bias, settings, torch.tensor(curve))


def windows(lens: Lens, text: Any, length: int) -> Tensor:
    """(n, t) token ids that a text is cut into; its last tokens are dropped when they do not fill a window."""
    if isinstance(text, Tensor) and text.ndim == 2:
        return prepare(text, lens.tokenizer, lens.vocab_size).ids
    batch = prepare(text, lens.tokenizer, lens.vocab_size)
    size = min(length, int(batch.lengths.max()))
    cut = [row[i : i + size] for row, n in zip(batch.ids, batch.lengths.tolist()) for i in range(0, n - size + 1, size)]
    if size < 2:
        raise PromptError("the text to train on has fewer than two tokens")
    return torch.stack(cut)


class _Map:
    """One layer's translator while it is trained."""

    def __init__(self, width: int, rank: int | None, generator: torch.Generator, device: torch.device) -> None:
        self.up = torch.zeros(width, rank or width, device=device)
        self.bias = torch.zeros(width, device=device)
        self.down = None
        if rank is not None:
            self.down = (torch.randn(rank, width, generator=generator) / math.sqrt(width)).to(device)
        self.factor, self.lowest = 1.0, math.inf
        self.best = self._copy()

    def parameters(self) -> list[Tensor]:
        return [x for x in (self.up, self.bias, self.down) if x is not None]

    def _copy(self) -> tuple[Tensor, ...]:
        return tuple(x.detach().clone() for x in self.parameters())

    def start(self, rate: float) -> None:
        """A fresh optimiser at the layer's own rate."""
        for x in self.parameters():
            x.requires_grad_()
        self.rate = rate * self.factor
        self.optimizer = torch.optim.Adam(self.parameters(), lr=self.rate)

    def accept(self, kl: float, rate: float) -> float:
        """Keep what is there when it is no worse than before, else go back; returns the divergence that is kept."""
        if kl <= self.lowest:
            first = math.isinf(self.lowest)
            self.lowest, self.best = kl, self._copy()
            if first:
                self.start(rate)
            return kl
        with torch.no_grad():
            for x, kept in zip(self.parameters(), self.best):
                x.copy_(kept)
        self.factor /= 2
        self.start(rate)
        return self.lowest

    def apply(self, x: Tensor) -> Tensor:
        inner = x if self.down is None else x @ self.down.T
        return x + inner @ self.up.T + self.bias

    def step(self, stream: Tensor, final: Tensor, trace: Trace, share: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * share
        kl = _divergence(final, unembed(self.apply(stream), _float_head(trace)))
        self.optimizer.zero_grad()
        kl.backward()
        self.optimizer.step()


def _check(watch: Trace, maps: list[_Map], rate: float) -> list[float]:
    """The divergence of every layer on the watched windows, and what follows from it."""
    final, found = watch.logits.float().log_softmax(-1), []
    with torch.no_grad():
        for k, one in enumerate(maps):
            logits = unembed(one.apply(watch.residual(k).float()), _float_head(watch))
            found.append(float(_divergence(final, logits)))
    return [one.accept(kl, rate) for one, kl in zip(maps, found)]


def _divergence(final: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(final || lens) over tokens in nats; ``final`` are log probabilities."""
    return (final.exp() * (final - logits.log_softmax(-1))).sum(-1).mean()


def _float_head(trace: Trace) -> dict[str, Tensor]:
    return {name: x if name == "norm.eps" else x.float() for name, x in trace.head.items()}


def _share(step: int, steps: int) -> float:
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batches(data: Tensor, rows: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches, every window once before any comes again."""
    while True:
        order = torch.randperm(len(data), generator=generator)
        for start in range(0, len(data), rows):
            yield data[order[start : start + rows]]
