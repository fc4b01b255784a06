"""`feature_ablation` and `occlusion`: what the logit loses when tokens are taken away (captum).

No gradient is involved: the model answers the prompt with something else in a token's place. What that is, is part of
the question, so the baseline is always among the settings. "drop" takes the token out and closes the gap: Mamba has no
positions that could shift, but everything after the gap then convolves over it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmlens.attribution._baselines import Baseline, baseline_embedding
from ssmlens.attribution._common import Prompt, Question, ask
from ssmlens.attribution._forward import Network
from ssmlens.attribution.result import Attribution
from ssmlens.attribution.targets import Position, Target
from ssmlens.errors import PromptError, SsmlensError
from ssmlens.lens import Lens

__all__ = ["feature_ablation", "occlusion"]

TOKENS_AT_ONCE = 16384
"""Rows times length of the batches that captum makes of one prompt."""


def feature_ablation(
    lens: Lens,
    prompt: Prompt,
    target: Target = None,
    position: Position = -1,
    *,
    baseline: Baseline = "zero",
    groups: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """The target logit minus that with one token, or one group of tokens, taken away.

    Args:
        lens, prompt, target, position, attention_mask: as in `decompose`.
        baseline: what takes the token's place: "zero" or "mean" embedding, a token id, or "drop" for nothing.
        groups: per token of a single prompt the number of its group, which is taken away at once; each token then has
            its group's score. None takes each token away alone.

    Returns:
        scores (b, s) in logits, positive where the token supports the target; nothing is promised about their sum.
        One forward per token or group.

    Raises:
        PromptError, UnsupportedModelError, ReconstructionError: as `decompose`; PromptError also for groups that do
        not fit, or when "drop" would leave no token.
    """
    question = ask(lens, prompt, target, position, attention_mask=attention_mask)
    if groups is not None and len(question.batch.ids) != 1:
        raise PromptError("groups goes with a single prompt: the tokens of several have no common grouping")
    if groups is not None and len(groups) != question.batch.ids.shape[1]:
        raise PromptError(f"groups has {len(groups)} entries for a prompt of {question.batch.ids.shape[1]} tokens")
    options = {"baseline": baseline, "groups": None if groups is None else list(groups)}

    def attribute(row: _Masked, keep: Tensor) -> Tensor:
        from captum.attr import FeatureAblation

        found = keep.shape[1]
        chosen = torch.arange(found) if groups is None else torch.tensor(list(groups)[:found])
        mask = chosen.unique(return_inverse=True)[1][None].to(keep.device)
        if row.start is None and groups is not None and int(mask.max()) == 0:
            raise PromptError("dropping the whole prompt leaves no token: give several groups, or another baseline")
        scores: Tensor = FeatureAblation(row.logit).attribute(
            keep, baselines=0.0, feature_mask=mask, perturbations_per_eval=row.at_once
        )
        return scores

    return _by_rows(question, "feature_ablation", baseline, attribute, options)


def occlusion(
    lens: Lens,
    prompt: Prompt,
    target: Target = None,
    position: Position = -1,
    *,
    baseline: Baseline = "zero",
    window: int = 1,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """The target logit minus that with a window of tokens taken away, averaged over the windows that hold a token.

    With a window of 1 this is `feature_ablation`.

    Args:
        lens, prompt, target, position, attention_mask: as in `decompose`.
        baseline: what takes the tokens' place: "zero" or "mean" embedding, a token id, or "drop" for nothing.
        window: neighbouring tokens taken away at once; cut to the prompt's length.

    Returns:
        scores (b, s) in logits; nothing is promised about their sum. One forward per window.

    Raises:
        PromptError, UnsupportedModelError, ReconstructionError: as `decompose`; PromptError also when "drop" would
        leave no token.
    """
    if window < 1:
        raise SsmlensError(f"window is at least 1, got {window}")
    question = ask(lens, prompt, target, position, attention_mask=attention_mask)

    def attribute(row: _Masked, keep: Tensor) -> Tensor:
        from captum.attr import Occlusion

        width = min(window, keep.shape[1])
        if row.start is None and width == keep.shape[1] > 1:
            raise PromptError("dropping the whole prompt leaves no token: choose a shorter window or another baseline")
        explainer = Occlusion(row.logit)
        explainer.use_weights = False  # it would take the mean over windows in float32
        total: Tensor = explainer.attribute(
            keep, sliding_window_shapes=(width,), baselines=0.0, perturbations_per_eval=row.at_once
        )
        places = torch.arange(keep.shape[1], device=keep.device)
        first, last = (places - width + 1).clamp(min=0), places.clamp(max=keep.shape[1] - width)
        return total / (last - first + 1)

    return _by_rows(question, "occlusion", baseline, attribute, {"baseline": baseline, "window": window})


class _Masked:
    """One prompt alone, cut after its position, as a function of which tokens are kept."""

    def __init__(self, network: Network, x: Tensor, target: Tensor | None, start: Tensor | None) -> None:
        self.network = network
        self.x = x  # (t, d)
        self.start = start  # (d,) what takes a token's place, None to drop it
        self.at_once = max(1, TOKENS_AT_ONCE // len(x))
        logits = network.last_logits(x[None], torch.tensor([len(x) - 1]))[0]
        self.target = logits.argmax() if target is None else target.to(logits.device)
        self.value = logits[self.target]

    def logit(self, keep: Tensor) -> Tensor:
        """(k,) target logits for masks (k, t) of 1 (kept) and 0."""
        if self.start is not None:
            x = torch.where(keep[..., None] > 0, self.x, self.start)
            last = torch.full((len(keep),), keep.shape[1] - 1)
        else:
            lengths = (keep > 0).sum(1)
            # Kept tokens move to the front in order; what stands behind them is padding.
            order = (keep <= 0).to(torch.uint8).argsort(dim=1, stable=True)
            x, last = self.x[order], (lengths - 1).cpu()
        return self.network.last_logits(x, last)[:, self.target]


def _by_rows(question: Question, method: str, baseline: Baseline, attribute, options) -> Attribution:  # type: ignore[no-untyped-def]
    """Apply a method that gives scores (1, t) to every prompt alone."""
    start = None if baseline == "drop" else baseline_embedding(question.network, baseline, ("drop",))
    scores = question.embeddings.new_zeros(question.embeddings.shape[:2])
    rows = []
    for i, k in enumerate(question.positions.tolist()):
        if start is None and k == 0:
            raise PromptError(f"dropping the only token of prompt {i} leaves none: choose another baseline")
        row = _Masked(
            question.network,
            question.embeddings[i, : k + 1],
            None if question.target is None else question.target[i],
            start,
        )
        scores[i, : k + 1] = attribute(row, scores.new_ones(1, k + 1))[0]
        rows.append(row)
    target, logit = torch.stack([row.target for row in rows]), torch.stack([row.value for row in rows])
    return question.finish(method, scores, target, logit, complete=False, **options)
