"""Reading the prediction off an earlier layer, and what that does to the states of the layers above."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmlens.analyses._ledger import Ledger, Progress
from ssmlens.analyses._result import Result
from ssmlens.analyses.sensitivity._removal import fingerprint
from ssmlens.analyses.sensitivity._text import Text
from ssmlens.bootstrap import block_sums, ratio_interval
from ssmlens.errors import SsmlensError
from ssmlens.kernels import scan
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.lens import Lens
from ssmlens.stepping import LayerState, State, Stepper
from ssmlens.trace import Trace

__all__ = ["STATES", "early_exit", "layer_confidence"]

STATES = ("full", "propagate", "freeze")
"""What becomes of the states above the layer at which a token leaves.

full       every layer still runs: only the readout is early, so nothing is saved and every state is right
propagate  the layers above update their states from the residual stream at which the token left
freeze     they never see the token
"""


def layer_confidence(trace: Trace) -> Result:
    """How sure each layer's residual stream already is of the next token, read by the model's final norm and head.

    Args:
        trace: with weights (its ``head``).

    Returns:
        Largest probability, (layer, batch, token); layer k is the stream that enters layer k, the last one that after
        the last layer; NaN at padding. Columns: ``entropy`` in nats, ``agreement`` (1 where the first choice is the
        model's own), ``repeats`` (1 where it is the token itself), ``kl`` of the model's law against this one in nats,
        and the mean agreement of a layer over all tokens, ``mean_agreement``, with ``low`` and ``high``, 95 % of the
        block bootstrap over 20 stretches. Control: ``unigram_agreement``, the share of
        tokens at which the model's most frequent first choice is its first choice: what a constant would reach.

    Raises:
        SsmlensError: when the trace has no head.
    """
    trace.check()
    if not trace.head:
        raise SsmlensError("this trace has no final norm and unembedding: trace a model, or save it with weights=True")
    final = trace.logits.double().log_softmax(-1)
    kept: dict[str, list[Tensor]] = {"value": [], "entropy": [], "agreement": [], "repeats": [], "kl": []}
    for k in range(len(trace.layers) + 1):
        law = _read(trace, trace.residual(k)).log_softmax(-1)
        p = law.exp()
        kept["value"].append(p.amax(-1))
        kept["entropy"].append(-(p * law).sum(-1))
        kept["agreement"].append((law.argmax(-1) == final.argmax(-1)).double())
        kept["repeats"].append((law.argmax(-1) == trace.ids.to(law.device)).double())
        kept["kl"].append((final.exp() * (final - law)).sum(-1).clamp(min=0))
    real = torch.arange(trace.ids.shape[1]) < trace.lengths[:, None]
    numbers = {name: torch.stack(x).cpu().where(real, torch.nan) for name, x in kept.items()}
    agreed = numbers["agreement"][:, real].T  # (tokens, layers)
    low, high = ratio_interval(block_sums(agreed), block_sums(torch.ones(len(agreed), 1)))
    for name, x in (("mean_agreement", agreed.mean(0)), ("low", low), ("high", high)):
        numbers[name] = x[:, None, None]
    first = final.argmax(-1).cpu()[real]
    common = float((first == first.mode().values).double().mean())
    return Result(
        name="confidence",
        value=numbers.pop("value"),
        dims=("layer", "batch", "token"),
        units="1",
        columns=numbers,
        control={"unigram_agreement": torch.tensor(common, dtype=torch.float64)},
        settings={**trace.settings, "reconstruction_error": dict(trace.reconstruction_error)},
        assumes=(
            "The final norm and head were trained on the last layer alone; an earlier one may hold what they miss.",
            "With tied embeddings the early streams read as the token itself, and surely so: see repeats.",
        ),
        checked_by="the last layer is the model; tests/analyses/sensitivity/test_early_exit.py",
    )  # fmt: skip


def early_exit(
    lens: Lens, prompt: Any, thresholds: Sequence[float] = (0.3, 0.5, 0.7, 0.9), *,
    states: Sequence[str] = STATES, earliest: int = 1, repeats: bool = False, seed: int = 0,
    resume: str | Path | None = None, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """Let each token leave at the first layer that is sure enough, and compare the loss with the whole model's.

    A recurrent model cannot just skip layers: their states need the token (DYNAMAX, Nogales et al. 2025, leaves open
    how). `STATES` are three answers.

    Args:
        lens: a model whose layers all are mixers.
        prompt: whatever `Lens.trace` takes.
        thresholds: largest probabilities above which a token leaves.
        states: which answers, see `STATES`.
        earliest: layers that every token passes.
        repeats: whether a token may leave while its first choice is the token itself, as the streams of the first
            layers say where embeddings are tied.
        seed: of the control.
        resume: file that keeps each threshold that is done; a run with the same settings goes on there.
        progress: called with the tokens done and the tokens there are.

    Returns:
        Change of the loss in nats a token, (states, threshold). Columns: ``low`` and ``high``, 95 % of the block
        bootstrap over 20 stretches; ``depth``, mean share of the layers below the exit; ``agreement`` with the whole
        model's first choice. Control: ``random_change``, the loss when the same depths fall on tokens at random (of
        "full").

    Raises:
        SsmlensError: for thresholds outside (0, 1], unknown states, or an ``earliest`` that is no number of layers.
    """
    wrong = [x for x in states if x not in STATES]
    if wrong or not states or not thresholds or not all(0 < x <= 1 for x in thresholds):
        raise SsmlensError(
            f"thresholds lie above 0 and up to 1, and states are {', '.join(STATES)}; "
            f"got {list(thresholds)} and {list(states)}"
        )
    if not 0 <= earliest <= len(lens.layers):
        raise SsmlensError(f"earliest is from 0 to the {len(lens.layers)} layers, got {earliest}")
    net, text = Stepper(lens), Text.of(lens, prompt)
    about = {"earliest": earliest, "repeats": repeats, "seed": seed, **fingerprint(text)}
    ledger = Ledger(resume, {**text.settings, **about})
    length = text.ids.shape[1]
    total = (1 + len(thresholds)) * length

    def tick(part: int, t: int) -> None:
        if progress is not None:
            progress(part * length + t, total)

    whole = _tensors(ledger.get("whole", partial(_whole, net, text, partial(tick, 0))))
    tick(1, 0)
    parts = []
    for i, threshold in enumerate(thresholds, start=1):
        run = partial(_leave, net, text, threshold, earliest, repeats, partial(tick, i))
        stepped = {
            k: torch.tensor(x, dtype=torch.float64) for k, x in ledger.get(f"threshold {threshold:g}", run).items()
        }
        tick(i + 1, 0)
        parts.append(_numbers(whole, stepped, threshold, text, states, earliest, repeats, seed))
    numbers = {k: torch.stack([part[k] for part in parts], dim=1) for k in parts[0]}
    return Result(
        name="loss_change",
        value=numbers.pop("value"),
        dims=("states", "threshold"),
        units="nats per token",
        coords={"states": list(states), "threshold": [float(x) for x in thresholds]},
        control={"random_change": numbers.pop("random_change")},
        columns=numbers,
        settings={**text.settings, **about, "loss": float(whole["loss"][:, -1].mean())},
        assumes=(
            "Both runs read the same text; in generation an early choice would also change what comes.",
            "The depth counts layers below the exit; reading every layer's stream with the head costs more than a "
            "small model's layers do.",
        ),
        checked_by="threshold 1 is the whole model; tests/analyses/sensitivity/test_early_exit.py",
    )


def _tensors(kept: dict[str, Any]) -> dict[str, Tensor]:
    return {k: torch.tensor(x, dtype=torch.float64) for k, x in kept.items()}


def _recur(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    return scan.run(inputs, impl="naive")  # one token at a time


def _read(trace: Trace, residual: Tensor) -> Tensor:
    """Logits (b, t, v) of a residual stream, in float64."""
    x = residual.double()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + float(trace.head["norm.eps"]))
    bias = trace.head.get("unembedding.bias")
    weight = trace.head["unembedding.weight"].double()
    return F.linear(x * trace.head["norm.weight"].double(), weight, None if bias is None else bias.double())


@torch.no_grad()
def _whole(net: Stepper, text: Text, tick: Any) -> dict[str, Any]:
    """For each target (row after row) and each stream (layers + 1): confidence, loss, and agreement with the last."""
    state, kept = net.initial(text.ids.shape[0]), []
    for t in range(text.ids.shape[1] - 1):
        x, carried, laws = net.embed(text.ids[:, t])[:, None], [], []
        for layer, own in zip(net.layers, state.layers):
            laws.append(net.logits(x[:, 0]).double().log_softmax(-1))
            x, left, _ = layer(x, own, _recur)
            carried.append(left)
        laws.append(net.logits(x[:, 0]).double().log_softmax(-1))
        state = State(tuple(carried))
        law = torch.stack(laws, dim=1).cpu()  # (b, streams, v)
        target = text.ids[:, t + 1, None, None].expand(-1, law.shape[1], 1)
        same = law.argmax(-1) == law[:, -1:].argmax(-1)
        repeat = law.argmax(-1) == text.ids[:, t, None]
        kept.append(torch.stack([law.amax(-1).exp(), -law.gather(-1, target)[..., 0], same.double(), repeat.double()]))
        tick(t)
    found = torch.stack(kept, dim=2)[:, text.real]  # (4, count, streams)
    return {name: x.tolist() for name, x in zip(("confidence", "loss", "same", "repeat"), found)} | {
        "first": _first(net, text).tolist()
    }


@torch.no_grad()
def _first(net: Stepper, text: Text) -> Tensor:
    """(count,) the whole model's first choices."""
    _, logits = net.run(net.initial(text.ids.shape[0]), text.ids)
    assert logits is not None
    return logits[:, :-1].argmax(-1).cpu()[text.real]


@torch.no_grad()
def _leave(net: Stepper, text: Text, threshold: float, earliest: int, repeats: bool, tick: Any) -> dict[str, Any]:
    """Loss, first choice and depth of each target with "propagate" and with "freeze", (2, count) each."""
    rows = text.ids.shape[0]
    state = net.initial(2 * rows)
    frozen = torch.arange(2 * rows, device=net.embedding.device) >= rows
    kept = []
    for t in range(text.ids.shape[1] - 1):
        own_ids = text.ids[:, t].repeat(2).to(frozen.device)
        x = net.embed(own_ids)[:, None]
        gone, depth, carried = torch.zeros_like(frozen), torch.zeros(2 * rows, device=frozen.device), []
        for k, (layer, own) in enumerate(zip(net.layers, state.layers)):
            if k >= earliest:
                sure = net.logits(x[:, 0]).softmax(-1).max(-1)
                gone = gone | ((sure.values > threshold) & (repeats | (sure.indices != own_ids)))
            depth = depth + (~gone).float()
            after, left, _ = layer(x, own, _recur)
            x = torch.where(gone[:, None, None], x, after)
            stop = gone & frozen
            carried.append(LayerState(_where(stop, own.h, left.h), _where(stop, own.conv, left.conv)))
        state = State(tuple(carried))
        law = net.logits(x[:, 0]).double().log_softmax(-1)
        loss = -law.gather(-1, text.ids[:, t + 1].repeat(2)[:, None].to(law.device))[:, 0]
        kept.append(torch.stack([loss, law.argmax(-1).double(), depth.double()]).cpu().unflatten(1, (2, rows)))
        tick(t)
    found = torch.stack(kept, dim=-1)[:, :, text.real]  # (3, 2, count)
    return {name: x.tolist() for name, x in zip(("loss", "first", "depth"), found)}


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b)


def _numbers(
    whole: dict[str, Tensor], stepped: dict[str, Tensor], threshold: float, text: Text, states: Sequence[str],
    earliest: int, repeats: bool, seed: int,
) -> dict[str, Tensor]:  # fmt: skip
    """Everything about one threshold, by state policy (states,)."""
    base, layers = whole["loss"][:, -1].double(), whole["loss"].shape[1] - 1
    sure = whole["confidence"] > threshold
    if not repeats:
        sure &= whole["repeat"] == 0
    sure[:, :earliest], sure[:, -1] = False, True
    depth = sure.double().argmax(1)
    drawn = depth[torch.randperm(len(depth), generator=torch.Generator().manual_seed(seed))]
    first, rows = whole["first"].double(), torch.arange(len(depth))
    by_state = {
        "full": (whole["loss"][rows, depth].double(), whole["same"][rows, depth].double(), depth.double()),
        "propagate": (stepped["loss"][0].double(), (stepped["first"][0] == first).double(), stepped["depth"][0]),
        "freeze": (stepped["loss"][1].double(), (stepped["first"][1] == first).double(), stepped["depth"][1]),
    }
    changes = torch.stack([by_state[name][0] - base for name in states], dim=1)
    mean, low, high = (x[0] for x in text.means(changes))
    return {
        "value": mean,
        "low": low,
        "high": high,
        "depth": torch.stack([by_state[name][2].double().mean() / layers for name in states]),
        "agreement": torch.stack([by_state[name][1].mean() for name in states]),
        "random_change": (whole["loss"][rows, drawn].double() - base).mean().expand(len(states)),
    }
