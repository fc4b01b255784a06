"""`decompose`: a logit as an exact sum over the prompt's tokens, with everything that multiplies held fixed.

Hold the norms' 1/rms, the slope of the convolution's activation, the scan's decays, writes, reads and step sizes, and
the gates at the values they have on this prompt. What is left is a network that is linear in its embeddings, so the
logit is the sum of one term per token and one for the additive weights, without remainder. One backward pass gives
them all: the term of token s is its embedding times the gradient of this frozen network.

The terms say how the logit is put together on the paths that the prompt has opened, not what another prompt would
give: opening and shutting those paths (the routing, the gates) is credited to nobody. The idea is DePass (2025) for
transformers; `residuals` has its full form.
"""

from __future__ import annotations

from torch import Tensor

from ssmlens.attribution._common import Prompt, conserved
from ssmlens.attribution._forward import FROZEN
from ssmlens.attribution.result import Attribution
from ssmlens.attribution.targets import Position, Target
from ssmlens.lens import Lens

__all__ = ["decompose"]


def decompose(
    lens: Lens,
    prompt: Prompt,
    target: Target = None,
    position: Position = -1,
    *,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """The exact frozen decomposition of one logit per prompt.

    Args:
        lens: a model whose layers are all Mamba-1 or Mamba-2.
        prompt: whatever `Lens.trace` takes.
        target: a token id, a text that is one token, or one per prompt; None for the model's top token.
        position: where the logit is read, or one per prompt; negative ones count from each prompt's last token.
        attention_mask: (b, t) of 0 and 1 for a (b, t) prompt with padding.

    Returns:
        scores (b, s) in logits, which with ``bias``, the share of convolution and projection biases, sum to the logit:
        ``completeness_error`` is rounding alone.

    Raises:
        PromptError: when the prompt, the target or the position is none.
        UnsupportedModelError: when a layer is no Mamba mixer, or an activation is not 0 at 0.
        ReconstructionError: when a recomputed layer is not the model's.
    """
    return conserved("decompose", FROZEN, lens, prompt, target, position, attention_mask)
