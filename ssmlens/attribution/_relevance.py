"""`relevance`: MambaLRP (Jafari, Montavon, Müller and Eberle, NeurIPS 2024) for Mamba-1 and Mamba-2.

Layer-wise relevance propagation as the gradient of a network whose values are unchanged and whose nonlinear factors
are cut off: SiLU passes relevance on as it is (its factor sigmoid(x) is a constant, also at exactly 0), norms are
scaled by a constant, the scan carries relevance through its values only, a gate shares it equally between its two
factors, and linear maps and convolutions share it in proportion (LRP-0). Mamba-2, which the paper does not treat,
adds that the gated norm's 1/rms is a constant as well. Additive weights own what they add: ``bias``.

The rules hold on every device and path here. The authors' code leaves the SiLU rule out where fused CUDA kernels
run, so its relevances depend on the device.
"""

from __future__ import annotations

from torch import Tensor

from ssmlens.attribution._common import Prompt, conserved
from ssmlens.attribution._forward import LRP
from ssmlens.attribution.result import Attribution
from ssmlens.attribution.targets import Position, Target
from ssmlens.lens import Lens

__all__ = ["relevance"]


def relevance(
    lens: Lens,
    prompt: Prompt,
    target: Target = None,
    position: Position = -1,
    *,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """MambaLRP relevances of one logit per prompt.

    Args:
        lens: a model whose layers are all Mamba-1 or Mamba-2.
        prompt: whatever `Lens.trace` takes.
        target: a token id, a text that is one token, or one per prompt; None for the model's top token.
        position: where the logit is read, or one per prompt; negative ones count from each prompt's last token.
        attention_mask: (b, t) of 0 and 1 for a (b, t) prompt with padding.

    Returns:
        scores (b, s) in logits, which with ``bias`` sum to the logit: relevance is conserved, and
        ``completeness_error`` is rounding alone.

    Raises:
        PromptError: when the prompt, the target or the position is none.
        UnsupportedModelError: when a layer is no Mamba mixer, or an activation is not 0 at 0.
        ReconstructionError: when a recomputed layer is not the model's.
    """
    return conserved("relevance", LRP, lens, prompt, target, position, attention_mask)
