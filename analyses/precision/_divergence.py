"""What a rounded state does to the model's predictions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._ledger import Ledger, Progress
from ssmlens.analyses._result import Result
from ssmlens.analyses.precision._formats import Format, format_of, rounded
from ssmlens.bootstrap import block_sums, ratio_interval
from ssmlens.errors import SsmlensError
from ssmlens.lens import Lens
from ssmlens.stepping import LayerState, State, Stepper
from ssmlens.trace import Trace

__all__ = ["VARIANTS", "divergence", "slowest"]

VARIANTS = ("all", "slow", "random", "rest", "stochastic")
"""Whose state is rounded.

all         every head's, to nearest
slow        that of the share with the longest half-lives
random      that of as many others, drawn at random
rest        that of all but the slow ones
stochastic  every head's, rounded stochastically
"""


@dataclass(frozen=True, eq=False)
class _Way:
    """One variant: a mask (1, h, 1, n or 1) of what is rounded in each layer, and how."""

    masks: tuple[Tensor, ...]
    rounding: str


def divergence(
    lens: Lens, prompt: Any,
    dtypes: str | torch.dtype | Format | Sequence[str | torch.dtype | Format] = ("bfloat16", "float16", "fp8"),
    *,
    variants: Sequence[str] = VARIANTS, share: float = 0.1, scaled: bool = False, conv: bool = False, seed: int = 0,
    resume: str | Path | None = None, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """KL(t) of the next-token law with the exact state against the law with the state kept in a number format.

    The model runs token by token. After each token its recurrent state is rounded, and the next token starts from
    what is left; everything else stays in the model's precision, so that the state alone is to blame. Both runs read
    the same text.

    Args:
        lens: a model whose layers all have a recurrence.
        prompt: whatever `Lens.trace` takes.
        dtypes: formats of the state, see `FORMATS`.
        variants: whose state is rounded, see `VARIANTS`.
        share: of the heads (of the states, where those of a head decay differently) that count as slow.
        scaled: with a power of two for each head, as in `rounded`.
        conv: also round the window of the convolution.
        seed: of the random heads and of stochastic rounding.
        resume: file that keeps each format that is done; a run with the same settings goes on there.
        progress: called with the tokens done and the tokens there are.

    Returns:
        KL in nats, (dtype, rounded, batch, token), NaN at padding. Columns: ``agreement`` (1 where both laws have
        the same first token), ``loss_change`` (nats on the text's own next token, NaN at the last), and for each
        row ``mean`` with ``mean_low`` and ``mean_high``, 95 % of the block bootstrap over 20 stretches, and
        ``growth``, mean KL of the second half of the text over that of the first. Control: ``own_forward``, KL
        between the stepped model and the model's own forward, the noise of float32 itself; ``short_weights``, KL of
        the model with its weights and activations in the format and its state in float32 (NaN for 8 bits).

    Raises:
        SsmlensError: for an unknown format or variant, a share outside (0, 1), or an empty list.
        UnsupportedModelError: when a layer has no recurrence.
    """
    listed = [dtypes] if isinstance(dtypes, str | torch.dtype | Format) else dtypes
    formats = [format_of(x) for x in listed]
    wrong = [v for v in variants if v not in VARIANTS]
    if wrong or not variants or not formats:
        raise SsmlensError(
            f"variants are {', '.join(VARIANTS)}, at least one, and so are formats; got {list(variants)}"
        )
    if not 0 < share < 1:
        raise SsmlensError(f"share lies between 0 and 1, got {share}")
    net, trace = Stepper(lens), lens.trace(prompt)
    trace.check()
    about = {
        **trace.settings,
        "tokens": hashlib.sha256(trace.ids.numpy().tobytes()).hexdigest()[:16],
        "lengths": trace.lengths.tolist(),
        "variants": list(variants),
        "share": share,
        "scaled": scaled,
        "conv": conv,
        "seed": seed,
    }
    ledger = Ledger(resume, about)
    ways = _ways(trace, variants, share, seed)
    total = len(formats) * trace.ids.shape[1]
    found = []
    for i, to in enumerate(formats):

        def tick(t: int, start: int = i * trace.ids.shape[1]) -> None:
            if progress is not None:
                progress(start + t, total)

        part = ledger.get(to.name, partial(_run, net, trace, to, ways, scaled, conv, seed, tick))
        tick(trace.ids.shape[1])
        found.append({k: torch.tensor(x, dtype=torch.float64) for k, x in part.items()})
    numbers = {k: torch.stack([part[k] for part in found]) for k in found[0]}
    return _result(numbers, trace, formats, variants, about)


def slowest(trace: Trace, share: float) -> tuple[Tensor, ...]:
    """For each layer True where a head, or a state of it, is among the share with the longest half-lives.

    Half-lives are ln 2 / mean(-log_decay) over all rows of the trace, compared across layers.

    Args:
        trace: of all layers.
        share: of all heads, or states.

    Returns:
        Masks (h, n), or (h, 1) where all states of a head decay alike.
    """
    nats = []
    for mixer in trace:
        rec = mixer.recurrence
        if rec.dt is not None and rec.A is not None:
            nats.append(-rec.dt.double().sum((0, 1))[:, None] * rec.A.double())
        else:
            nats.append(-rec.log_decay.double().sum((0, 1)))
    flat = torch.cat([x.flatten() for x in nats])
    count = max(1, min(len(flat) - 1, round(share * len(flat))))
    order = flat.argsort(stable=True)
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[order[:count]] = True
    return tuple(x.view(y.shape) for x, y in zip(chosen.split([y.numel() for y in nats]), nats))


def _ways(trace: Trace, variants: Sequence[str], share: float, seed: int) -> list[_Way]:
    slow = slowest(trace, share)
    flat = torch.cat([x.flatten() for x in slow])
    others = (~flat).nonzero()[:, 0].cpu()
    drawn = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[: int(flat.sum())]]
    random = torch.zeros_like(flat)
    random[drawn.to(flat.device)] = True
    everything = torch.ones_like(flat)
    masks = {"all": everything, "slow": flat, "random": random, "rest": ~flat, "stochastic": everything}
    sizes = [x.numel() for x in slow]
    return [
        _Way(
            tuple(part.view(1, x.shape[0], 1, x.shape[1]) for part, x in zip(masks[v].split(sizes), slow)),
            "stochastic" if v == "stochastic" else "nearest",
        )
        for v in variants
    ]


@torch.no_grad()
def _run(
    net: Stepper, trace: Trace, to: Format, ways: list[_Way], scaled: bool, conv: bool, seed: int, tick: Any
) -> dict[str, Any]:
    """Every variant of one format, side by side in one batch whose first rows are exact."""
    ids, rows = trace.ids, trace.ids.shape[0]
    kept: dict[str, list[Tensor]] = {"kl": [], "agreement": [], "loss_change": []}
    own: list[Tensor] = []
    generator = torch.Generator(net.embedding.device).manual_seed(seed)
    state = net.initial(rows * (1 + len(ways)))
    for t in range(ids.shape[1]):
        state, logits = net.step(state, ids[:, t].repeat(1 + len(ways)))
        laws = logits.double().log_softmax(-1).unflatten(0, (1 + len(ways), rows)).cpu()
        exact, others = laws[0], laws[1:]
        kept["kl"].append(_kl(exact, others))
        kept["agreement"].append((exact.argmax(-1) == others.argmax(-1)).double())
        follows = ids[:, t + 1] if t + 1 < ids.shape[1] else None
        kept["loss_change"].append(_loss_change(exact, others, follows))
        own.append(_kl(trace.logits[:, t].double().log_softmax(-1).cpu(), exact[None])[0])
        state = _round(state, rows, ways, to, scaled, conv, generator)
        tick(t)
    found = {k: torch.stack(x, dim=-1) for k, x in kept.items()}
    found["own_forward"] = torch.stack(own, dim=-1)[None]
    found["short_weights"] = _short_weights(net, trace, to)[None]
    return {k: x.tolist() for k, x in found.items()}


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of log laws (..., v), as a sum of terms that are none of them negative.

    The sum of p log(p / q) cancels, and stops at 1e-16; adding q - p, which sums to 0, leaves squares of differences.
    """
    ratio = q - p
    return (p.exp() * (torch.expm1(ratio) - ratio)).clamp(min=0).sum(-1)


def _loss_change(exact: Tensor, others: Tensor, ids: Tensor | None) -> Tensor:
    if ids is None:
        return torch.full(others.shape[:-1], torch.nan, dtype=torch.float64)
    index = ids.expand(others.shape[:-1])[..., None]
    return exact.gather(-1, ids[:, None])[:, 0] - others.gather(-1, index)[..., 0]


def _round(
    state: State, rows: int, ways: list[_Way], to: Format, scaled: bool, conv: bool, generator: torch.Generator
) -> State:
    """The state with each variant's rows rounded; the first rows stay exact."""
    layers = []
    for k, layer in enumerate(state.layers):
        parts, windows = list(layer.h.split(rows)), list(layer.conv.split(rows))
        for i, way in enumerate(ways, start=1):
            short = rounded(parts[i], to, way.rounding, generator, scaled)
            parts[i] = torch.where(way.masks[k], short, parts[i])
            if conv:
                windows[i] = rounded(windows[i], to, way.rounding, generator, scaled)
        layers.append(LayerState(torch.cat(parts), torch.cat(windows)))
    return State(tuple(layers))


def _short_weights(net: Stepper, trace: Trace, to: Format) -> Tensor:
    """(b, t) KL of the model whose weights and activations are in the format, its state in float32."""
    if to.digits < 8 or to.dtype == net.dtype:
        return torch.full(trace.ids.shape, torch.nan, dtype=torch.float64)
    short = Stepper(net.lens, to.dtype)
    kept = []
    for other, at in _laws(short, trace.ids):
        kept.append(_kl(trace.logits[:, at].double().log_softmax(-1).cpu(), other))
    return torch.cat(kept, dim=1)


def _laws(net: Stepper, ids: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Log laws (b, chunk, v) and their positions, a chunk at a time."""
    state = net.initial(ids.shape[0])
    for start in range(0, ids.shape[1], 256):
        at = slice(start, min(start + 256, ids.shape[1]))
        state, logits = net.run(state, ids[:, at])
        assert logits is not None
        yield logits.double().log_softmax(-1).cpu(), at


def _result(
    numbers: dict[str, Tensor], trace: Trace, formats: Sequence[Format], variants: Sequence[str], about: dict[str, Any]
) -> Result:
    length = numbers["kl"].shape[-1]
    real = torch.arange(length) < trace.lengths[:, None]
    within = torch.arange(1, length + 1) < trace.lengths[:, None]  # the next token is real
    value = numbers["kl"].where(real, torch.nan)
    mean, low, high, growth = _means(numbers["kl"], trace.lengths)
    return Result(
        name="kl",
        value=value,
        dims=("dtype", "rounded", "batch", "token"),
        units="nats",
        coords={"dtype": [to.name for to in formats], "rounded": list(variants)},
        columns={
            "agreement": numbers["agreement"].where(real, torch.nan),
            "loss_change": numbers["loss_change"].where(within, torch.nan),
            "mean": mean,
            "mean_low": low,
            "mean_high": high,
            "growth": growth,
        },
        control={k: numbers[k].where(real, torch.nan) for k in ("own_forward", "short_weights")},
        settings={**about, "reconstruction_error": dict(trace.reconstruction_error)},
        assumes=(
            "The state is rounded once a token, after it was read and written in the model's own precision, as a cache "
            "in a short format is.",
            "Both runs read the same text: in generation the first differing choice sends them apart.",
        ),
        checked_by="a state kept in its own format has KL 0; tests/analyses/precision/test_divergence.py",
    )


def _means(kl: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """Mean, its interval and the growth, (dtype, rounded, b, 1) each."""
    shape = (*kl.shape[:3], 1)
    found = [torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(4)]
    for row, length in enumerate(lengths.tolist()):
        x = kl[:, :, row, :length].movedim(-1, 0)
        sums, counts = block_sums(x), block_sums(torch.ones(length, 1, 1))
        low, high = ratio_interval(sums, counts)
        growth = x[length // 2 :].mean(0) / x[: length // 2].mean(0)
        for out, part in zip(found, (x.mean(0), low, high, growth)):
            out[:, :, row, 0] = part
    return tuple(found)
