"""Maps through all layers: rollout of the layers' maps, and Mamba-Attribution, which weighs them with a gradient.

Both come from Ali, Zimerman and Wolf ("The Hidden Attention of Mamba Models", ACL 2025), whose released code differs
from the paper. `COMPAT` names the readings:

=========  ==========================================================================================================
None       what is recommended: non-negative maps plus the identity, rows divided by their sums
"paper"    the formulas as printed: the identity plus the mean over channels (signed for rollout, the positive part
           of gradient times map for Mamba-Attribution), nothing divided
"code"     as released: one row, off by one step (see `hidden_row`), stands for every row of its layer
=========  ==========================================================================================================

A rollout says how maps compose if information only ever moved as they say: it is no decomposition of the prediction
(`decompose` is one).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ssmlens.attribution._common import Prompt, Question, ask
from ssmlens.attribution._contributions import contributions
from ssmlens.attribution._forward import EXACT, Network
from ssmlens.attribution.result import Attribution
from ssmlens.attribution.targets import Position, Target
from ssmlens.errors import LayerError, SsmlensError
from ssmlens.kernels import attention
from ssmlens.kernels import contributions as kernel
from ssmlens.lens import Lens
from ssmlens.trace import MixerTrace, Trace

__all__ = ["COMPAT", "SOURCES", "hidden_row", "mamba_attribution", "rollout"]

SOURCES = ("mean_positive", "mean_abs", "alti")
"""Which map of a layer `rollout` takes."""

COMPAT = (None, "paper", "code")
"""Which reading of the paper `rollout` and `mamba_attribution` follow."""


def hidden_row(mixer: MixerTrace, row: int = -1, compat: str | None = None) -> Float[Tensor, "b h s"]:
    """One row of the hidden attention of every head, (b, h, s): what token ``row`` reads from each source.

    Args:
        mixer: one layer of a trace.
        row: position of the reading token; negative ones count from the end.
        compat: None for the matrix itself, as the paper defines it. "code" for what the released
            ``compute_middle_attn_vector`` gives: the decay of the last step and the token's own entry are left out.

    Raises:
        SsmlensError: unknown ``compat``.
        IndexError: when the row does not exist.
    """
    if compat not in (None, "code"):
        raise SsmlensError(f"compat of a row is None or 'code', got {compat!r}")
    x = mixer.recurrence.inputs.map(torch.detach).cast()
    if not -x.length <= row < x.length:
        raise IndexError(f"row {row} is outside the {x.length} tokens of this trace")
    row %= x.length
    if compat is None:
        return attention.row(x, row)
    out = x.value.new_zeros(x.batch, x.n_heads, x.length)
    if row:
        # What would be read one step earlier with this row's read direction: one decay short, and not itself.
        before = x.slice(0, row)
        read = before.read.clone()
        read[:, -1] = x.read[:, row]
        out[..., :row] = attention.row(before.replace(read=read), row - 1)
    return out


def rollout(trace: Trace, source: str = "mean_positive", compat: str | None = None) -> Float[Tensor, "b t s"]:
    """How much of each token is in each position behind the last layer, if the layers' maps were all that moves it.

    Args:
        trace: of all layers, each with a recurrence.
        source: the layers' maps: "mean_positive" (mean over heads of the positive part of the implicit attention),
            "mean_abs", both with the identity added and rows divided by their sums, or "alti" (how near each token's
            contribution brings the block's output, the residual stream on the diagonal; Ferrando et al. 2022).
        compat: one of `COMPAT`; "paper" and "code" have one source only, the signed mean.

    Returns:
        (b, t, s); rows sum to 1 unless ``compat`` is "paper"; exactly 0 for s > t except with "code", whose one row
        stands for all. A padded row is that of the identity.

    Raises:
        SsmlensError: unknown source or compat.
        LayerError: when the trace leaves out a layer.
        ZeroDivisionError: when rows of the signed maps of "code" sum to 0.
    """
    if source not in SOURCES:
        raise SsmlensError(f"unknown source {source!r}: choose one of {', '.join(SOURCES)}")
    if compat not in COMPAT:
        raise SsmlensError(f"compat is None, 'paper' or 'code', got {compat!r}")
    if compat is not None and source != "mean_positive":
        raise SsmlensError(f"compat={compat!r} has its own map, the signed mean over heads: leave source out")
    return _product([_map(trace, k, source, compat) for k in _all_layers(trace)])


def mamba_attribution(
    lens: Lens,
    prompt: Prompt,
    target: Target = None,
    position: Position = -1,
    compat: str | None = None,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """Rollout of each layer's mean hidden attention weighed with the gradient of the target logit.

    ``I + max(0, g[t] * mean_h M[t, s])`` per layer, g the mean over channels of the gradient of the logit by the gated
    output of the scan (Ali, Zimerman and Wolf, eq. 24; that the gradient belongs to the reading token is our reading).
    Scores are the row of the explained position: weights without the unit of a logit, and they promise no sum.

    Args:
        lens, prompt, target, position, attention_mask: as for `decompose`.
        compat: None divides rows by their sums, "paper" does not, "code" follows the released program: the largest
            positive gradient by the residual stream per source, scaled to 0 ... 1, times one row of the map, scaled
            to 0 ... 1 over heads and sources and averaged over heads.

    Raises:
        SsmlensError: unknown compat, or what `decompose` raises.
    """
    if compat not in COMPAT:
        raise SsmlensError(f"compat is None, 'paper' or 'code', got {compat!r}")
    question = ask(lens, prompt, target, position, EXACT, attention_mask)
    mask = torch.arange(question.batch.ids.shape[1]) < question.batch.lengths[:, None]
    trace = lens.trace(question.batch.ids, attention_mask=mask.long())
    target_ids, logit, gradients = _residual_gradients(question.network, question.embeddings, question)
    rows = torch.arange(len(logit), device=logit.device)
    where = question.positions.to(logit.device)
    maps = []
    for k, gradient in enumerate(gradients):
        mixer = trace[k]
        if compat == "code":
            maps.append(_weighed_row(mixer, gradient[0], where))
            continue
        # Behind the output projection the gradient is that of the next residual stream.
        by_output = (gradient[1] @ mixer.parameters["out_proj.weight"].to(gradient[1].dtype)).mean(-1)
        mean = mixer.recurrence.attention.reduce("mean").detach().to(by_output.dtype)
        maps.append(_with_identity((by_output[..., None] * mean).clamp(min=0), divide=compat is None))
    scores = _product(maps)[rows, where]
    return question.finish("mamba_attribution", scores, target_ids, logit, complete=False, compat=compat)


def _all_layers(trace: Trace) -> list[int]:
    missing = [k for k in range(len(trace.layers)) if k not in trace.mixers]
    if missing:
        raise LayerError(f"a rollout multiplies the maps of all layers, but the trace holds none of layer {missing[0]}")
    return list(range(len(trace.layers)))


def _map(trace: Trace, k: int, source: str, compat: str | None) -> Tensor:
    mixer = trace[k]
    if source == "alti":
        found = contributions(mixer)
        return kernel.alti(found.terms, trace.residual(k + 1).to(found.terms.inputs.dtype), own=trace.residual(k))
    with torch.no_grad():
        att = mixer.recurrence.attention
        if compat == "code":
            last = hidden_row(mixer, -1, "code").mean(1)
            return _with_identity(last[:, None].expand(-1, last.shape[1], -1), divide=True)
        mean = att.reduce("mean_abs") if source == "mean_abs" else att.reduce("mean")
        if compat == "paper":
            return _with_identity(mean, divide=False)
        if source == "mean_positive":
            mean = (mean + att.reduce("mean_abs")).clamp(min=0) / 2  # the mean of the positive parts
        return _with_identity(mean, divide=True)


def _with_identity(x: Tensor, divide: bool) -> Tensor:
    x = x + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    if not divide:
        return x
    total = x.sum(-1, keepdim=True)
    if not bool((total != 0).all()):
        raise ZeroDivisionError(
            "rows of the signed map sum to 0 and cannot be divided by it: use source='mean_positive'"
        )
    return x / total


def _product(maps: list[Tensor]) -> Tensor:
    """Later layers from the left."""
    out = maps[0]
    for layer in maps[1:]:
        out = layer @ out
    return out


def _weighed_row(mixer: MixerTrace, by_residual: Tensor, where: Tensor) -> Tensor:
    """The map of one layer in the released program, for the row of each prompt's position."""
    rows = []
    for b, row in enumerate(where.tolist()):
        score = by_residual[b].clamp(min=0).amax(-1)
        vector = hidden_row(mixer, row, "code")[b].clamp(min=0).to(score.dtype)
        rows.append(_unit(vector).mean(0) * _unit(score))
    row_map = torch.stack(rows)
    return _with_identity(row_map[:, None].expand(-1, row_map.shape[1], -1), divide=True)


def _unit(x: Tensor) -> Tensor:
    """Scaled to 0 ... 1; a constant becomes 0."""
    low, high = x.min(), x.max()
    return (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)


def _residual_gradients(
    network: Network, embeddings: Tensor, question: Question
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Target ids and logits (b,), and per layer the gradient by the residual stream entering and leaving it."""
    positions, wanted = question.positions.to(embeddings.device), question.target
    with torch.enable_grad():
        x = embeddings.detach().requires_grad_()
        streams = [x]
        for block, carry in zip(network.blocks, network.start(len(x)), strict=True):
            x, _ = block(x, EXACT, carry)
            streams.append(x)
        logits = network.logits(x[torch.arange(len(x), device=x.device), positions])
        target = logits.argmax(1) if wanted is None else wanted.to(logits.device)
        logit = logits.gather(1, target[:, None])[:, 0]
        found = torch.autograd.grad(logit.sum(), streams)
    return target, logit.detach(), list(pairwise(found))
