"""What the levels of a model share: the text as ids, the model as a map of flat states, the frozen exponents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmlens.errors import PromptError
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.lens import Lens
from ssmlens.prompt import prepare
from ssmlens.stepping import Chunk, State, Stepper

__all__ = ["NO_CACHE", "FrozenGates", "Model", "Prompt"]

Prompt = str | Sequence[int] | Tensor

NO_CACHE = "all memory is in the recurrent states and convolution windows: this model has no key-value cache"


@dataclass(frozen=True, eq=False)
class Model:
    """A lens's model as a map of flat states.

    Args:
        net: the map.
        ids: (1, t) of the text.
        like: a state, for its shapes.
    """

    net: Stepper
    ids: Tensor
    like: State

    @classmethod
    def of(cls, lens: Lens, prompt: Prompt, dtype: torch.dtype) -> Model:
        """The model of a lens in ``dtype``, and one text.

        Raises:
            PromptError: for several texts, or none.
        """
        batch = prepare(prompt, lens.tokenizer, lens.vocab_size)
        if len(batch.ids) != 1:
            raise PromptError(f"an orbit is that of one text, got {len(batch.ids)}")
        net = Stepper(lens, dtype)
        return cls(net, batch.ids.to(lens.device), net.initial())

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def settings(self) -> dict[str, Any]:
        """Where the numbers come from."""
        lens = self.net.lens
        return {
            "model": lens.name,
            "fingerprint": lens.fingerprint,
            "dtype": self.net.dtype,
            "device": str(lens.device),
            "tokens": self.length,
            "state_entries": {
                kind: sum(s.stop - s.start for _, name, s in self.like.parts if name == kind) for kind in ("h", "conv")
            },
        }

    def forward(self, flat: Tensor, vectors: Tensor) -> Tensor:
        """Flat states (b, n) after input vectors (b, t, d)."""
        return self.net.advance(self.like.unflatten(flat), vectors)[0].flatten()


class FrozenGates:
    """Sums the log decay of every state over tokens: what `latent` would find on them."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.scans: tuple[ScanInputs, ...] = ()
        self.tokens = 0

    def add(self, scans: Sequence[ScanInputs], first: int = 0) -> None:
        """Count the tokens from ``first`` on of these recurrences, one per layer."""
        ticks = [x.dt[:, first:].double().sum(1) for x in scans if x.dt is not None]
        self.sums = [a + b for a, b in zip(self.sums, ticks)] if self.sums else ticks
        self.scans = tuple(scans)
        self.tokens += scans[0].length - first

    def chunk(self, start: int) -> Any:
        """An observer of `Stepper.run` that counts the tokens from ``start`` on."""

        def observe(chunk: Chunk) -> None:
            if chunk.stop > start:
                self.add(chunk.scans, max(0, start - chunk.start))

        return observe

    def largest(self, k: int) -> Tensor:
        """The k largest exponents of all layers with their multiplicity, decreasing; -inf beyond, for the windows."""
        rates = []
        for ticks, x in zip(self.sums, self.scans):
            assert x.A is not None
            each = (ticks[0, :, None] / self.tokens * x.A.double()).flatten()
            copies = x.head_dim * (x.d_state if x.A.shape[1] == 1 else 1)
            top = each.topk(min(k, len(each))).values
            rates.append(top.repeat_interleave(min(copies, k)))
        found = torch.cat(rates).sort(descending=True).values[:k].cpu()
        return torch.cat([found, found.new_full((k - len(found),), -torch.inf)])
