"""The token-level methods under one signature, by the names that the command line and the bench use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssmlens.attribution._common import Prompt, ask
from ssmlens.attribution._contributions import contributions
from ssmlens.attribution._decompose import decompose
from ssmlens.attribution._occlusion import occlusion
from ssmlens.attribution._relevance import relevance
from ssmlens.attribution._rollout import mamba_attribution, rollout
from ssmlens.attribution._unified import unified
from ssmlens.attribution.gradients import gradient_shap, gradient_x_input, integrated_gradients, smoothgrad
from ssmlens.attribution.result import Attribution
from ssmlens.attribution.targets import Position, Target
from ssmlens.errors import SsmlensError
from ssmlens.lens import Lens
from ssmlens.trace import MixerTrace, Trace

__all__ = ["METHODS", "SAMPLED", "attribute", "chosen_methods", "map_scores", "one_method"]

Method = Callable[..., Attribution]


def map_scores(
    lens: Lens,
    prompt: Prompt,
    target: Target = None,
    position: Position = -1,
    *,
    kind: str,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """A row of a map as an attribution: how strongly the explained position reads from each token.

    Such a row knows no target: it says the same for every prediction at that position. Rows of single layers are
    divided by their sum and averaged over layers, so that no layer drowns the others.

    Args:
        kind: "hidden" (mean over heads of abs(M)), "unified" (mean over channels of abs(U)), "contributions" (Euclidean
            norm of the contribution vectors), "alti", or "rollout", "rollout_abs", "rollout_alti".
        lens, prompt, target, position, attention_mask: as for `decompose`.

    Returns:
        weights without the unit of a logit; they promise no sum.
    """
    question = ask(lens, prompt, target, position, attention_mask=attention_mask)
    mask = question.batch.mask
    trace = lens.trace(question.batch.ids, attention_mask=mask)
    where = question.positions
    rows = torch.arange(len(where))
    with torch.no_grad():
        if kind in _ROLLOUTS:
            scores = rollout(trace, _ROLLOUTS[kind])[rows, where]
        else:
            layers = [_ROWS[kind](trace[k], where) for k in sorted(trace.mixers)]
            scores = torch.stack([x / x.sum(-1, keepdim=True).clamp(min=1e-30) for x in layers]).mean(0)
        logits = _logits_at(trace, where)
    ids = logits.argmax(-1) if question.target is None else question.target.to(logits.device)
    logit = logits.gather(1, ids[:, None])[:, 0]
    return question.finish(kind, scores.to(logit.device), ids, logit, complete=False)


def _logits_at(trace: Trace, where: Tensor) -> Tensor:
    return trace.logits[torch.arange(len(where)), where].detach()


def _hidden(mixer: MixerTrace, where: Tensor) -> Tensor:
    att = mixer.recurrence.attention
    return torch.stack([att.row(t)[i].abs().mean(0) for i, t in enumerate(where.tolist())])


def _unified(mixer: MixerTrace, where: Tensor) -> Tensor:
    found = unified(mixer)
    return torch.stack([found.row(t)[i].abs().mean(0) for i, t in enumerate(where.tolist())])


def _norms(mixer: MixerTrace, where: Tensor) -> Tensor:
    found = contributions(mixer)
    return torch.stack([found.vectors([t])[i, 0].norm(dim=-1) for i, t in enumerate(where.tolist())])


def _alti(mixer: MixerTrace, where: Tensor) -> Tensor:
    found = contributions(mixer)
    rows = []
    for i, t in enumerate(where.tolist()):
        goal = found.output[i, t]
        nearer = (goal.abs() - (goal - found.vectors([t])[i, 0]).abs()).sum(-1)
        rows.append(nearer.clamp(min=0))
    return torch.stack(rows)


_ROLLOUTS = {"rollout": "mean_positive", "rollout_abs": "mean_abs", "rollout_alti": "alti"}
_ROWS: dict[str, Callable[[MixerTrace, Tensor], Tensor]] = {
    "hidden": _hidden,
    "unified": _unified,
    "contributions": _norms,
    "alti": _alti,
}

METHODS: dict[str, Method] = {
    "decompose": decompose,
    "relevance": relevance,
    "gradient_x_input": gradient_x_input,
    "gradient_x_input_frozen_norm": partial(gradient_x_input, detach_norm=True),
    "integrated_gradients": integrated_gradients,
    "smoothgrad": smoothgrad,
    "gradient_shap": gradient_shap,
    "occlusion": occlusion,
    "occlusion_drop": partial(occlusion, baseline="drop"),
    "mamba_attribution": mamba_attribution,
    **{kind: partial(map_scores, kind=kind) for kind in (*_ROWS, *_ROLLOUTS)},
}
"""Every method that gives one score per token: ``METHODS[name](lens, prompt, target, position)``."""

SAMPLED = {"integrated_gradients": "steps", "smoothgrad": "samples", "gradient_shap": "samples"}
"""Methods that run the model many times, and the option that says how often."""


def chosen_methods(names: Sequence[str] | str) -> list[str]:
    """Names of methods, checked; "all" is every one.

    Raises:
        SsmlensError: an unknown name, or none.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    if wanted == ["all"]:
        return list(METHODS)
    if not wanted:
        raise SsmlensError(f"no method is named: choose from all, {', '.join(METHODS)}")
    for name in wanted:
        if name not in METHODS:
            raise SsmlensError(f"unknown method {name!r}: choose from all, {', '.join(METHODS)}")
    return wanted


def one_method(name: str) -> Method:
    """The method of this name.

    Raises:
        SsmlensError: an unknown name; "all" is none, since it stands for several.
    """
    if name not in METHODS:
        raise SsmlensError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def attribute(
    lens: Lens,
    prompt: Prompt,
    method: str = "decompose",
    target: Target = None,
    position: Position = -1,
    **options: Any,
) -> Attribution:
    """One of `METHODS` by name.

    Args:
        lens, prompt, target, position: as for `decompose`.
        method: its name.
        options: passed on to it.

    Raises:
        SsmlensError: an unknown method.
    """
    return one_method(method)(lens, prompt, target, position, **options)
