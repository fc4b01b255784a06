"""Which tokens a model can do without: scores of token reduction, and the loss when the lowest are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._ledger import Ledger, Progress
from ssmlens.analyses._result import Result
from ssmlens.analyses.sensitivity._removal import fingerprint
from ssmlens.analyses.sensitivity._text import Text
from ssmlens.analyses.sensitivity._units import Model
from ssmlens.bootstrap import block_sums, ratio_interval
from ssmlens.errors import LayerError, PromptError, SsmlensError
from ssmlens.kernels import scan
from ssmlens.lens import Lens
from ssmlens.trace import MixerTrace, Trace

__all__ = ["CONTROLS", "SCORES", "token_reduction", "token_scores"]

SCORES = ("dt", "positive", "write", "mass", "similar")
"""How a token's worth is judged at one layer.

dt        mean step size over heads (DeciMamba, Ben-Kish et al. 2025)
positive  mean over channels of max(0, y) of the scan's output (UTRC, Zhan et al. 2024)
write     mean over heads of the norm of what is written into the state
mass      what all later tokens read from it: sum over rows of |M[t, s]|, mean over heads
similar   cosine of its residual stream with the last token's (after ReMamba, Yuan et al. 2024)
"""

CONTROLS = ("recent", "random")
"""Keep the latest tokens; keep tokens at random, the mean of several draws."""

DRAWS = 4


def token_scores(trace: Trace, scores: Sequence[str] = SCORES) -> Result:
    """Scores of every token at every layer; higher is kept longer.

    Args:
        trace: of any layers with a step size.
        scores: which, see `SCORES`.

    Returns:
        (score, layer, batch, token), NaN at padding. Column: ``rank``, the share of the row's tokens that score lower.
        Control: ``position``, the rank that the token would have if later were better.

    Raises:
        SsmlensError: for an unknown score.
    """
    _known(scores, SCORES)
    trace.check()
    layers = sorted(trace.mixers)
    real = torch.arange(trace.ids.shape[1]) < trace.lengths[:, None]
    value = torch.stack([torch.stack([_score(trace, trace[k], name) for k in layers]) for name in scores])
    value = value.where(real, torch.nan)
    lower = (value[..., None, :] < value[..., :, None]).double().sum(-1)
    count = trace.lengths[:, None].double()
    return Result(
        name="score",
        value=value,
        dims=("score", "layer", "batch", "token"),
        units="differs by score",
        coords={"score": list(scores), "layer": layers},
        columns={"rank": (lower / count).where(real, torch.nan)},
        control={"position": (torch.arange(real.shape[1]) / count).where(real, torch.nan)},
        settings={**trace.settings, "reconstruction_error": dict(trace.reconstruction_error)},
        assumes=("A score says what it is made of; whether the model can do without the token is token_reduction's.",),
        checked_by="scores from plain loops; tests/analyses/sensitivity/test_tokens.py",
    )


def token_reduction(
    lens: Lens, prompt: Any, layer: int | None = None, keep: Sequence[float] = (0.75, 0.5, 0.25), *,
    scores: Sequence[str] = (*SCORES, *CONTROLS), context: float = 0.75, seed: int = 0,
    resume: str | Path | None = None, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """Drop the lowest tokens of the context above one layer, and measure the loss on the rest of the text.

    Args:
        lens: a model whose layers all are mixers.
        prompt: whatever `Lens.trace` takes.
        layer: tokens are scored here and missing from the next layer on; the middle one by default.
        keep: shares of the context's tokens that stay.
        scores: which, see `SCORES` and `CONTROLS`.
        context: share of each row that is context; the loss is that of the rest, which stays whole.
        seed: of "random".
        resume: file that keeps each score that is done; a run with the same settings goes on there.
        progress: called with the scores done and the scores there are.

    Returns:
        Change of the loss in nats a token, (score, keep). Columns: ``low`` and ``high``, 95 % of the block bootstrap
        over 20 stretches; ``kept``, tokens of context that stayed, over all rows. Control: ``random_change``, the
        mean over four random choices of as many tokens, and ``no_context``, the change when all of it is dropped
        above the layer.

    Raises:
        SsmlensError: for unknown scores or shares outside (0, 1).
        LayerError: when nothing lies above the layer.
        PromptError: when a row is too short to have both context and a rest.
    """
    _known(scores, (*SCORES, *CONTROLS))
    if not keep or not all(0 < x <= 1 for x in keep) or not 0 < context < 1:
        raise SsmlensError(f"keep and context are shares above 0, context below 1; got {list(keep)} and {context}")
    layer = len(lens.layers) // 2 - 1 if layer is None else layer
    if not 0 <= layer < len(lens.layers) - 1:
        raise LayerError(f"no layer lies above layer {layer}: choose from 0 to {len(lens.layers) - 2}")
    text, trace = Text.of(lens, prompt), lens.trace(prompt, layers=[layer])
    ends = [int(context * n) for n in text.lengths.tolist()]
    if any(end < 1 or n - end < 2 for end, n in zip(ends, text.lengths.tolist())):
        raise PromptError("a row is too short for a context and two tokens after it: give a longer text")
    about = {"layer": layer, "context": context, "seed": seed, "draws": DRAWS, **fingerprint(text)}
    ledger = Ledger(resume, {**text.settings, **about})
    model = Model(lens, text)
    model.remember()
    base = _rest(model, layer, [torch.arange(end) for end in ends], ends)
    generator = torch.Generator().manual_seed(seed)
    orders = {name: _orders(trace, layer, name, ends, generator) for name in dict.fromkeys((*scores, "random"))}
    parts = {}
    for done, name in enumerate(orders):
        for share in keep:
            run = partial(_changes, model, layer, orders[name], ends, share, base)
            parts[name, share] = torch.tensor(ledger.get(f"{name} {share:g}", run), dtype=torch.float64)
        if progress is not None:
            progress(done + 1, len(orders))
    nothing = float((_rest(model, layer, [torch.arange(0)] * len(ends), ends) - base).mean())
    value = torch.stack([torch.stack([parts[name, share].mean() for share in keep]) for name in scores])
    changes = torch.stack([torch.stack([parts[name, share] for share in keep]) for name in scores])
    low, high = ratio_interval(block_sums(changes.movedim(-1, 0)), block_sums(torch.ones(len(base), 1, 1)))
    return Result(
        name="loss_change",
        value=value,
        dims=("score", "keep"),
        units="nats per token",
        coords={"score": list(scores), "keep": [float(x) for x in keep]},
        columns={"low": low, "high": high, "kept": _kept(ends, keep)},
        control={
            "random_change": torch.stack([parts["random", share].mean() for share in keep]),
            "no_context": torch.tensor(nothing, dtype=torch.float64),
        },
        settings={**text.settings, **about, "loss": float(base.mean()), "measured_tokens": len(base)},
        assumes=(
            "The convolution of the layers above sees tokens as neighbours that were apart.",
            "Scores look at the whole text, the measured rest included, as the published ones do.",
        ),
        checked_by="keep 1 changes nothing; tests/analyses/sensitivity/test_tokens.py",
    )


def _known(scores: Sequence[str], known: Sequence[str]) -> None:
    wrong = [x for x in scores if x not in known]
    if wrong or not scores:
        raise SsmlensError(f"unknown score {wrong[0] if wrong else 'none'!r}: choose from {', '.join(known)}")


def _score(trace: Trace, mixer: MixerTrace, name: str) -> Tensor:
    """(b, t) in float64."""
    rec = mixer.recurrence
    if name == "similar":
        x = trace.residual(mixer.layer + 1).double()
        last = x[torch.arange(len(x)), (trace.lengths - 1).to(x.device)]
        found = torch.nn.functional.cosine_similarity(x, last[:, None], dim=-1)
    elif name == "mass":
        found = rec.attention.reduce("mean_abs").double().sum(1)
    elif name == "positive":
        found = rec.run().double().clamp(min=0).mean((-2, -1))
    elif name == "write":
        found = (rec.value.double().norm(dim=-1) * rec.write.double().norm(dim=-1)).mean(-1)
    elif rec.dt is None:
        raise SsmlensError(f"layer {mixer.layer} has no step size: leave 'dt' out of scores")
    else:
        found = rec.dt.double().mean(-1)
    return found.detach().cpu()


def _orders(trace: Trace, layer: int, name: str, ends: Sequence[int], generator: torch.Generator) -> list[list[Tensor]]:
    """For each draw and row the context's tokens, the one to keep longest first."""
    if name == "random":
        return [[torch.randperm(end, generator=generator) for end in ends] for _ in range(DRAWS)]
    if name == "recent":
        return [[torch.arange(end).flip(0) for end in ends]]
    score = _score(trace, trace[layer], name)
    return [[score[row, :end].argsort(descending=True, stable=True) for row, end in enumerate(ends)]]


def _kept(ends: Sequence[int], keep: Sequence[float]) -> Tensor:
    return torch.tensor([float(sum(max(1, round(share * end)) for end in ends)) for share in keep])


def _changes(
    model: Model, layer: int, orders: list[list[Tensor]], ends: Sequence[int], share: float, base: Tensor
) -> list[float]:
    """Change on each target of the rest, mean over draws."""
    found = []
    for order in orders:
        kept = [row[: max(1, round(share * end))].sort().values for row, end in zip(order, ends)]
        found.append(_rest(model, layer, kept, ends) - base)
    return torch.stack(found).mean(0).tolist()


@torch.no_grad()
def _rest(model: Model, layer: int, kept: Sequence[Tensor], ends: Sequence[int]) -> Tensor:
    """Losses on the targets of each row's rest, the layers above ``layer`` seeing ``kept`` and the rest alone."""
    text, found = model.text, []
    for row, (end, length) in enumerate(zip(ends, text.lengths.tolist())):
        chosen = torch.cat([kept[row], torch.arange(end, length)])
        x = model.streams[layer + 1][row : row + 1, chosen.to(model.streams[0].device)]
        for above in range(layer + 1, len(model.net.layers)):
            x, _, _ = model.net.layers[above](x, model.net.layers[above].initial(1), scan.run)
        laws = model.net.logits(x[0, len(kept[row]) :]).double().log_softmax(-1).cpu()
        found.append(-laws[:-1].gather(-1, text.ids[row, end + 1 : length, None])[:, 0])
    return torch.cat(found)
