"""What every method on a prompt starts and ends with: the batch, the checked network, the finished result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmlens.attribution._check import check
from ssmlens.attribution._forward import EXACT, Network, Rules
from ssmlens.attribution.result import Attribution, completeness
from ssmlens.attribution.targets import Position, Target, positions, target_ids
from ssmlens.lens import Lens
from ssmlens.prompt import Batch, prepare

__all__ = ["Prompt", "Question", "ask", "conserved"]

Prompt = str | Sequence[str] | Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt, where its logits are read and which of them, and the network that answers.

    Args:
        network: held against the model on this prompt.
        batch: token ids, padded on the right.
        embeddings: (b, t, d).
        positions: (b,).
        target: (b,) ids, or None for each row's top token.
        settings: what is known before the method runs.
    """

    network: Network
    batch: Batch
    embeddings: Tensor
    positions: Tensor
    target: Tensor | None
    settings: dict[str, Any]

    def finish(
        self,
        method: str,
        scores: Tensor,
        target: Tensor,
        logit: Tensor,
        bias: Tensor | None = None,
        complete: bool = True,
        **options: Any,
    ) -> Attribution:
        """The result, with padding and all after the position set to 0.

        Args:
            method: the function's name.
            scores: (b, t).
            target, logit: (b,).
            bias: (b,), None for none.
            complete: whether the method promises that scores and bias add up to the logit.
            options: of the method, for the settings.
        """
        after = torch.arange(scores.shape[1]) > self.positions[:, None]
        scores = scores.detach().masked_fill(after.to(scores.device), 0)
        bias = torch.zeros_like(logit) if bias is None else bias.detach()
        error = completeness(scores, bias, logit)
        return Attribution(
            scores=scores,
            bias=bias,
            target=target,
            logit=logit.detach(),
            completeness_error=error if complete else torch.full_like(error, torch.nan),
            tokens=self.batch.tokens,
            method=method,
            position=self.positions.to(scores.device),
            settings={**self.settings, **options},
            ids=self.batch.ids,
        )


def ask(
    lens: Lens,
    prompt: Prompt,
    target: Target,
    position: Position,
    rules: Rules = EXACT,
    attention_mask: Tensor | None = None,
) -> Question:
    """Read the arguments that all methods share, and check the network on them.

    Raises:
        PromptError: when the prompt, the target or the position is none.
        UnsupportedModelError: when the model has layers without a recurrence.
        ReconstructionError: when a recomputed layer is not the model's.
    """
    batch = prepare(prompt, lens.tokenizer, lens.vocab_size, attention_mask)
    where = positions(position, batch.lengths)
    wanted = target_ids(target, len(batch.ids), lens.vocab_size, lens.tokenizer)
    network = Network(lens)
    checked = check(network, batch, where, rules)
    settings = {
        "model": lens.name,
        "fingerprint": lens.fingerprint,
        "dtype": str(lens.dtype).removeprefix("torch."),
        "device": str(lens.device),
        "position": position.tolist() if isinstance(position, Tensor) else position,
        "target": "top token" if target is None else target.tolist() if isinstance(target, Tensor) else target,
        **checked,
    }
    return Question(network, batch, network.embed(batch.ids), where, wanted, settings)


def conserved(
    method: str,
    rules: Rules,
    lens: Lens,
    prompt: Prompt,
    target: Target,
    position: Position,
    attention_mask: Tensor | None,
) -> Attribution:
    """Embedding times gradient under rules that let the terms of tokens and additive weights sum to the logit."""
    question = ask(lens, prompt, target, position, rules, attention_mask)
    found = question.network.gradient(question.embeddings, question.positions, rules, question.target, biases=True)
    scores = (question.embeddings * found.embeddings).sum(-1)
    return question.finish(method, scores, found.target, found.logit, found.bias)
