"""`residual_parts`: the frozen decomposition in full: the residual stream of every layer and position, by source token.

Where `decompose` goes back once from one logit, this goes forward with one copy of the network per source token: the
part of token s enters as its embedding alone and passes every layer with all factors at the values of the whole
prompt. Parts and additive weights sum to the residual stream at every layer, and to every logit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssmlens.attribution._check import check
from ssmlens.attribution._common import Prompt
from ssmlens.attribution._forward import FROZEN, Network
from ssmlens.attribution._mixers import Factors
from ssmlens.errors import MemoryLimitError
from ssmlens.lens import Lens
from ssmlens.prompt import prepare
from ssmlens.trace import relative_error

__all__ = ["LogitParts", "ResidualParts", "residual_parts"]

WORK_BYTES = 128 * 2**20
"""About what the copies of the network that run side by side may take."""


@dataclass(frozen=True, eq=False)
class LogitParts:
    """One logit per position by source token.

    Args:
        scores: (b, t, s) what token s adds to the target's logit at position t; 0 for s > t and at padding.
        bias: (b, t) what the additive weights add.
        target: (b, t) token ids.
        logit: (b, t).
        error: largest difference between sum and logit over the largest logit.
    """

    scores: Float[Tensor, "b t s"]
    bias: Float[Tensor, "b t"]
    target: Int[Tensor, "b t"]
    logit: Float[Tensor, "b t"]
    error: float


@dataclass(frozen=True, eq=False)
class ResidualParts:
    """The residual stream by source token.

    Args:
        parts: per layer, the stream that enters it, and after the last: (b, t, s, d) part of source token s at
            position t. 0 for s > t and at padding.
        bias: per layer, (b, t, d) part of the additive weights.
        error: per layer, the largest difference between the sum of the parts and the residual stream, over its
            largest entry: rounding alone.
        residuals: per layer, (b, t, d) the stream itself.
        lengths: (b,) real tokens per prompt.
        tokens: their texts.
        network: whose layers these are.
    """

    parts: tuple[Tensor, ...]
    bias: tuple[Tensor, ...]
    error: tuple[float, ...]
    residuals: tuple[Tensor, ...]
    lengths: Tensor
    tokens: list[list[str]]
    network: Network

    @torch.no_grad()
    def logits(self, target: int | Tensor | None = None) -> LogitParts:
        """Every position's logit of one token, by source.

        Args:
            target: a token id, ids (b, t), or None for the top token of each position.
        """
        last, (weight, eps) = self.residuals[-1], self.network.final
        logits = self.network.logits(last)
        chosen = (
            logits.argmax(-1) if target is None else torch.as_tensor(target, device=last.device).expand_as(last[..., 0])
        )
        scale = torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + eps)
        reading = self.network.head[chosen] * weight * scale
        scores = torch.einsum("btsd,btd->bts", self.parts[-1], reading)
        bias = (self.bias[-1] * reading).sum(-1)
        if self.network.head_bias is not None:
            bias = bias + self.network.head_bias[chosen]
        logit = logits.gather(-1, chosen[..., None])[..., 0]
        real = _real(self.lengths, last)
        logit, bias = logit.masked_fill(~real, 0), bias.masked_fill(~real, 0)
        return LogitParts(scores, bias, chosen, logit, relative_error(scores.sum(-1) + bias, logit))


@torch.no_grad()
def residual_parts(
    lens: Lens, prompt: Prompt, *, attention_mask: Tensor | None = None, limit: float = 2e9
) -> ResidualParts:
    """The frozen decomposition at every layer and position of a short prompt.

    Args:
        lens: a model whose layers are all Mamba-1 or Mamba-2.
        prompt: whatever `Lens.trace` takes.
        attention_mask: (b, t) of 0 and 1 for a (b, t) prompt with padding.
        limit: bytes that the result may take: (layers + 1) * b * t * t * d numbers.

    Raises:
        MemoryLimitError: before anything is allocated.
        PromptError, UnsupportedModelError, ReconstructionError: as `decompose`.
    """
    batch = prepare(prompt, lens.tokenizer, lens.vocab_size, attention_mask)
    network = Network(lens)
    b, t = batch.ids.shape
    size = (len(network.blocks) + 1) * b * t * t * network.embedding.shape[1] * torch.finfo(network.dtype).bits // 8
    if size > limit:
        raise MemoryLimitError(
            f"the parts of {b} x {t} tokens at {len(network.blocks) + 1} places take {size / 1e9:.1f} GB, above the "
            f"limit of {limit / 1e9:.1f} GB: shorten the prompt, raise limit=, or use decompose for single logits"
        )
    check(network, batch, batch.lengths - 1, FROZEN)
    x = network.embed(batch.ids)
    real = _real(batch.lengths, x)
    parts = torch.diag_embed(x.masked_fill(~real[..., None], 0).permute(0, 2, 1)).permute(0, 2, 3, 1).contiguous()
    bias = torch.zeros_like(x)
    kept, shares, streams = [parts], [bias], [x]
    for block, carry in zip(network.blocks, network.start(b)):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + block.eps) * block.weight
        factors = block.mixer.factors(x * scale)
        grown, shifted = torch.empty_like(parts), torch.empty_like(bias)
        for i in range(b):
            own = Factors(
                factors.slope[i : i + 1],
                {n: r if n == "A" else r[i : i + 1] for n, r in factors.routing.items()},
                factors.gate[i : i + 1],
            )
            for s in _chunks(t, t * block.mixer.inner * 8 * x.element_size()):
                mine = parts[i, :, s].transpose(0, 1)  # (s, t, d): one copy of the layer per source
                grown[i, :, s] = (mine + block.mixer.replay(mine * scale[i], own, biases=False)).transpose(0, 1)
            shifted[i] = bias[i] + block.mixer.replay((bias[i] * scale[i])[None], own, biases=True)[0]
        parts, bias = grown.masked_fill_(~real[..., None, None], 0), shifted
        x, _ = block(x, FROZEN, carry)
        kept, shares, streams = [*kept, parts], [*shares, bias], [*streams, x]
    shares = [share.masked_fill(~real[..., None], 0) for share in shares]
    errors = tuple(relative_error(p.sum(2) + share, x, real) for p, share, x in zip(kept, shares, streams))
    return ResidualParts(tuple(kept), tuple(shares), errors, tuple(streams), batch.lengths, batch.tokens, network)


def _real(lengths: Tensor, x: Tensor) -> Tensor:
    """(b, t), True at real tokens."""
    return (torch.arange(x.shape[1]) < lengths[:, None]).to(x.device)


def _chunks(count: int, each: int) -> Iterator[slice]:
    step = max(1, WORK_BYTES // max(each, 1))
    for a in range(0, count, step):
        yield slice(a, a + step)
