"""Methods on the model's gradient: gradient x input, integrated gradients, SmoothGrad, GradientSHAP.

The last three are captum's, on the token embeddings. Each prompt runs alone and up to its position only, so that a
row's scores do not depend on what it was batched or padded with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ssmlens.attribution._baselines import Baseline, baseline_embedding
from ssmlens.attribution._common import Prompt, Question, ask
from ssmlens.attribution._forward import EXACT, Network, Rules
from ssmlens.attribution.result import Attribution
from ssmlens.attribution.targets import Position, Target
from ssmlens.errors import SsmlensError
from ssmlens.lens import Lens

__all__ = ["gradient_shap", "gradient_x_input", "integrated_gradients", "smoothgrad"]

TOKENS_AT_ONCE = 4096
"""Rows times length of the batches that captum makes of one prompt."""


def gradient_x_input(
    lens: Lens,
    prompt: Prompt,
    target: Target = None,
    position: Position = -1,
    *,
    detach_norm: bool = False,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """Embedding times gradient of one logit per prompt.

    The first-order effect of scaling a token's embedding. Behind an RMSNorm scaling all embeddings together changes
    next to nothing, so the scores nearly cancel and say little; ``detach_norm`` holds every 1/rms constant, the gated
    norm of Mamba-2 included, which is the usual mend.

    Args:
        lens, prompt, target, position, attention_mask: as in `decompose`.
        detach_norm: hold the norms' scales constant.

    Returns:
        scores (b, s) in logits; nothing is promised about their sum.

    Raises:
        PromptError, UnsupportedModelError, ReconstructionError: as `decompose`.
    """
    rules = Rules(norm="freeze") if detach_norm else EXACT
    question = ask(lens, prompt, target, position, rules, attention_mask)
    found = question.network.gradient(question.embeddings, question.positions, rules, question.target)
    scores = (question.embeddings * found.embeddings).sum(-1)
    return question.finish(
        "gradient_x_input", scores, found.target, found.logit, complete=False, detach_norm=detach_norm
    )


def integrated_gradients(
    lens: Lens,
    prompt: Prompt,
    target: Target = None,
    position: Position = -1,
    *,
    baseline: Baseline = "mean",
    steps: int = 64,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """Integrated gradients (Sundararajan et al. 2017) from a baseline prompt, by Gauss-Legendre quadrature.

    From a zero baseline RMSNorm squeezes most of the change into the first sliver of the path, where it is smaller
    than its epsilon, and no reasonable number of steps catches it; hence the mean embedding. ``completeness_error``
    says how far the quadrature got.

    Args:
        lens, prompt, target, position, attention_mask: as in `decompose`.
        baseline: what every token's embedding starts from: "mean" (of the vocabulary), "zero" or a token id.
        steps: points on the path.

    Returns:
        scores (b, s) in logits; ``bias`` is the baseline prompt's logit, and the sum of both approaches the logit.

    Raises:
        PromptError, UnsupportedModelError, ReconstructionError: as `decompose`.
    """
    from captum.attr import IntegratedGradients

    _at_least(steps, 2, "steps")
    question = ask(lens, prompt, target, position, EXACT, attention_mask)
    start = baseline_embedding(question.network, baseline)

    def attribute(row: _Row) -> tuple[Tensor, Tensor]:
        base = start.expand_as(row.embeddings)
        scores = IntegratedGradients(row.logit).attribute(
            row.embeddings,
            baselines=base,
            n_steps=steps,
            internal_batch_size=max(1, TOKENS_AT_ONCE // row.embeddings.shape[1]),
        )
        return scores, row.logit(base)[0]

    return _by_rows(question, "integrated_gradients", attribute, baseline=baseline, steps=steps)


def smoothgrad(
    lens: Lens,
    prompt: Prompt,
    target: Target = None,
    position: Position = -1,
    *,
    samples: int = 32,
    noise: float = 0.1,
    seed: int = 0,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """Embedding times the gradient averaged over noisy embeddings (Smilkov et al. 2017).

    Args:
        lens, prompt, target, position, attention_mask: as in `decompose`.
        samples: noisy copies of each prompt.
        noise: standard deviation of the noise in units of that of the prompt's embedding entries.
        seed: of the noise; the same numbers on the same kind of device.

    Returns:
        scores (b, s) in logits; nothing is promised about their sum.

    Raises:
        PromptError, UnsupportedModelError, ReconstructionError: as `decompose`.
    """
    from captum.attr import NoiseTunnel, Saliency

    _at_least(samples, 1, "samples")
    question = ask(lens, prompt, target, position, EXACT, attention_mask)

    def attribute(row: _Row) -> tuple[Tensor, None]:
        x = row.embeddings
        with _seeded(seed, x.device):
            gradient = NoiseTunnel(Saliency(row.logit)).attribute(
                x.clone().requires_grad_(),
                nt_type="smoothgrad",
                nt_samples=samples,
                nt_samples_batch_size=min(samples, max(1, TOKENS_AT_ONCE // x.shape[1])),
                stdevs=noise * _spread(x),
                abs=False,
            )
        return x * gradient, None

    return _by_rows(question, "smoothgrad", attribute, complete=False, samples=samples, noise=noise, seed=seed)


def gradient_shap(
    lens: Lens,
    prompt: Prompt,
    target: Target = None,
    position: Position = -1,
    *,
    baseline: Baseline = "tokens",
    baselines: int = 16,
    samples: int = 64,
    noise: float = 0.0,
    seed: int = 0,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """Expected gradients (GradientSHAP, Lundberg and Lee 2017): integrated gradients from random baselines at random
    points of the path.

    Args:
        lens, prompt, target, position, attention_mask: as in `decompose`.
        baseline: "tokens" for prompts of tokens drawn at random from the vocabulary, or a single one as in
            `integrated_gradients`.
        baselines: how many random prompts to draw from.
        samples: points to average over.
        noise: standard deviation of noise on the prompt's embeddings, in units of that of their entries.
        seed: of every draw; the same numbers on the same kind of device.

    Returns:
        scores (b, s) in logits; ``bias`` is the mean logit of the baselines, and the sum of both approaches the logit
        as samples grow: ``completeness_error`` is the sampling error.

    Raises:
        PromptError, UnsupportedModelError, ReconstructionError: as `decompose`.
    """
    from captum.attr import GradientShap

    _at_least(samples, 1, "samples")
    _at_least(baselines, 1, "baselines")
    question = ask(lens, prompt, target, position, EXACT, attention_mask)
    network = question.network
    single = None if baseline == "tokens" else baseline_embedding(network, baseline, ("tokens",))

    def attribute(row: _Row) -> tuple[Tensor, Tensor]:
        x = row.embeddings
        if single is None:
            draw = torch.Generator().manual_seed(seed)
            base = network.embed(torch.randint(lens.vocab_size, (baselines, x.shape[1]), generator=draw))
        else:
            base = single.expand_as(x)
        with _seeded(seed, x.device):
            scores = GradientShap(row.logit).attribute(
                x.clone().requires_grad_(), baselines=base, n_samples=samples, stdevs=noise * _spread(x)
            )
        return scores, row.logit(base).mean()

    options = {"baseline": baseline, "baselines": baselines, "samples": samples, "noise": noise, "seed": seed}
    return _by_rows(question, "gradient_shap", attribute, **options)


class _Logit(torch.autograd.Function):
    """The target logit of each prompt of a batch, with the engine's gradient."""

    @staticmethod
    def forward(ctx, x, network, positions, target):  # type: ignore[no-untyped-def]
        if not ctx.needs_input_grad[0]:
            return network.last_logits(x, positions).gather(1, target[:, None])[:, 0]
        found = network.gradient(x, positions, EXACT, target)
        ctx.save_for_backward(found.embeddings)
        return found.logit

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return d[:, None, None] * gradient, None, None, None


class _Row:
    """One prompt alone, cut after its position: what captum works on."""

    def __init__(self, network: Network, embeddings: Tensor, target: Tensor | None) -> None:
        self.network = network
        self.embeddings = embeddings  # (1, t, d)
        logits = network.last_logits(embeddings, self._last(1))[0]
        self.target = logits.argmax() if target is None else target.to(logits.device)
        self.value = logits[self.target]

    def _last(self, rows: int) -> Tensor:
        return torch.full((rows,), self.embeddings.shape[1] - 1)

    def logit(self, x: Tensor) -> Tensor:
        """(k,) target logit at the last token of embeddings (k, t, d); differentiable."""
        result: Tensor = _Logit.apply(x, self.network, self._last(len(x)), self.target.expand(len(x)))
        return result


def _by_rows(
    question: Question, method: str, attribute: Callable[[_Row], tuple[Tensor, Tensor | None]], **options: Any
) -> Attribution:
    """Apply a method that gives scores (1, t, d) and a bias () to every prompt alone."""
    scores = question.embeddings.new_zeros(question.embeddings.shape[:2])
    rows, shares = [], []
    for i, k in enumerate(question.positions.tolist()):
        row = _Row(
            question.network,
            question.embeddings[i : i + 1, : k + 1],
            None if question.target is None else question.target[i],
        )
        found, share = attribute(row)
        scores[i, : k + 1] = found[0].detach().sum(-1)
        rows.append(row)
        shares.append(scores.new_zeros(()) if share is None else share.detach())
    target, logit = torch.stack([row.target for row in rows]), torch.stack([row.value for row in rows])
    return question.finish(method, scores, target, logit, torch.stack(shares), **options)


def _spread(x: Tensor) -> float:
    """Standard deviation of the entries; 0 when there is only one."""
    return float(x.std(correction=0))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """captum draws from the global generators of torch and NumPy: seeded inside, as before outside."""
    import numpy as np

    state = np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _at_least(value: int, least: int, name: str) -> None:
    if value < least:
        raise SsmlensError(f"{name} is at least {least}, got {value}")
