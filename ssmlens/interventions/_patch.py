"""Activation patching and causal tracing: which activations of a clean run repair a corrupt one.

The corrupt prompt is run again with activations of the clean run put in at a site, and a metric of the logits says how
much comes back (Meng et al. 2022; for Mamba, Sen Sharma et al. 2024). A state space model hands two things from token
to token, the recurrent state and the last inputs of the convolution: "full_state" sites carry both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmlens.errors import PromptError, SsmlensError
from ssmlens.interventions._forward import Changes, forward
from ssmlens.interventions._metric import make_metric
from ssmlens.interventions._patching import Patching
from ssmlens.interventions._positions import mask_of
from ssmlens.interventions._scan import Scan, conv_inputs, convolve
from ssmlens.interventions._sites import Site, make_sites
from ssmlens.lens import Lens
from ssmlens.prompt import Batch, prepare
from ssmlens.trace import Trace

__all__ = ["READS", "Noise", "patch", "putting"]

READS = ("now", "next")
"""Which output is the first to read an exchanged state: that of the same step, or that of the step after it."""

LOGIT_BYTES = 2.5e8
"""Sites are run side by side as long as their logits take no more than this."""


@dataclass(frozen=True)
class Noise:
    """A corrupt run made of the clean tokens, with Gaussian noise on some embeddings (causal tracing).

    Args:
        positions: the tokens that get noise, in any form that `knockout` takes.
        scale: standard deviation of the noise, in the units of the embedding.
        seed: of the draw; one draw serves all sites.
    """

    positions: Any
    scale: float = 0.1
    seed: int = 0


def patch(
    lens: Lens,
    clean: Any,
    corrupt: Any,
    sites: Any,
    metric: str | Callable[[Tensor], Any] = "logit_difference",
    *,
    target: Any = None,
    position: int = -1,
    window: int = 1,
    read: str = "now",
    progress: Callable[[int, int], None] | None = None,
) -> Patching:
    """Run ``corrupt`` once for each site with the activation of ``clean`` put in there.

    Patching every token of a layer's residual stream gives the clean logits; so does the last token of the stream
    after the last layer, at that token. A "full_state" site of all layers hands over everything that the model knows
    of the tokens so far.

    Args:
        lens: the model.
        clean: prompt whose activations are put in.
        corrupt: prompt of the same length that is run and repaired, or `Noise` on the clean one's embeddings.
        sites: a kind (every layer at every token), a site, or several of either: (kind, layer, position), (kind, layer)
            for all tokens, or (layer, position) in the residual stream. Kinds are "residual", "mixer", "state", "conv"
            and "full_state", see `ssmlens.interventions.KINDS`.
        metric: "logit", "logit_difference", "probability", "kl", or a function of logits (b, t, v) that returns a
            number or (b,).
        target: what a named metric is about, see `METRICS`; by default the runs' own top tokens.
        position: whose logits a named metric reads; -1 is each row's last real token.
        window: number of consecutive layers that one site patches, around its own, as far as they exist.
        read: "now": the output of the patched step reads the patched state, as in y[t] = C h[t]; "next": only the
            steps after it do.
        progress: called with the sites done and the sites there are, after each batch of them.

    Returns:
        The `Patching`: value, effect and share recovered for each site, both runs, and a table.

    Raises:
        SsmlensError: when there is no site, a site touches nothing, or the prompts differ in length.
        LayerError: when a layer does not exist.

    Source: Meng et al. 2022; Sen Sharma, Atkinson and Bau 2024.
    """
    _check(window, read)
    good = prepare(clean, lens.tokenizer, lens.vocab_size)
    bad, noise = _corrupt(lens, good, corrupt)
    chosen = make_sites(sites, lens, good.lengths, read == "now")
    spread = [_layers(site, window, lens) for site in chosen]
    recurrent = {k for site, layers in zip(chosen, spread) if site.kind != "residual" for k in layers}
    trace = lens.trace(good.ids, recurrent, attention_mask=good.mask)
    broken = forward(lens, bad, Changes(embeddings=noise(1) if noise else None))
    judge = make_metric(metric, trace.logits, broken, good.lengths, target, position, lens.tokenizer)
    values = []
    for group in _groups(len(chosen), broken):
        run = _Group([chosen[i] for i in group], [spread[i] for i in group], lens, trace, good.lengths, read)
        many = _repeat(bad, len(group))
        logits = forward(lens, many, run.changes(noise(len(group)) if noise else None))
        values += [judge.function(x) for x in logits.split(len(good.lengths))]
        if progress is not None:
            progress(len(values), len(chosen))
    return Patching(
        sites=tuple(chosen),
        value=torch.stack(values).cpu(),
        clean=judge.function(trace.logits).cpu(),
        corrupt=judge.function(broken).cpu(),
        clean_logits=trace.logits,
        corrupt_logits=broken,
        metric=judge.name,
        target=judge.target,
        tokens=(good.tokens, bad.tokens),
        lengths=good.lengths,
        settings={
            **{k: trace.settings[k] for k in ("model", "fingerprint", "dtype")},
            "position": position,
            "window": window,
            "read": read,
            "corrupt": f"noise {corrupt.scale:g}, seed {corrupt.seed}" if noise else "prompt",
        },
    )


def putting(lens: Lens, batch: Batch, clean: Any, site: Any, window: int, read: str) -> Changes:
    """What a forward of this corrupt batch does differently with one site patched; arguments and errors as in
    `patch`."""
    _check(window, read)
    good = prepare(clean, lens.tokenizer, lens.vocab_size)
    _same_lengths(good, batch)
    sites = make_sites(site, lens, good.lengths, read == "now")
    if len(sites) != 1:
        raise SsmlensError(f"one site is patched here, got {len(sites)}: name its kind, layer and position")
    spread = [_layers(sites[0], window, lens)]
    trace = lens.trace(good.ids, [] if sites[0].kind == "residual" else spread[0], attention_mask=good.mask)
    return _Group(sites, spread, lens, trace, good.lengths, read).changes(None)


class _Group:
    """Sites that are run side by side, each on its own rows of one batch."""

    def __init__(
        self, sites: list[Site], spread: list[list[int]], lens: Lens, trace: Trace, lengths: Tensor, read: str
    ) -> None:
        self.lens, self.trace, self.count, self.read = lens, trace, len(sites), read
        rows, longest = trace.ids.shape
        self.masks: dict[tuple[str, int], Tensor] = {}
        for i, (site, layers) in enumerate(zip(sites, spread)):
            kinds = ("state", "conv") if site.kind == "full_state" else (site.kind,)
            for key in [(kind, k) for kind in kinds for k in layers]:
                mask = self.masks.setdefault(key, torch.zeros(len(sites) * rows, longest, dtype=torch.bool))
                mask[i * rows : (i + 1) * rows] = mask_of(site.position, lengths, "a site")
        self.masks = {key: mask.to(lens.device) for key, mask in self.masks.items()}

    def changes(self, noise: Callable[[Tensor], Tensor] | None) -> Changes:
        def put(mask: Tensor, clean: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda x: torch.where(mask[..., None], self._all(clean).to(x.dtype), x)

        layers = {k for kind, k in self.masks if kind in ("state", "conv")}
        by_kind = {
            kind: {k: mask for (name, k), mask in self.masks.items() if name == kind} for kind in ("residual", "mixer")
        }
        return Changes(
            scans=dict.fromkeys(layers, self._scan),
            residuals={k: put(mask, self.trace.residual(k)) for k, mask in by_kind["residual"].items()},
            outputs={k: put(mask, self.trace[k].output) for k, mask in by_kind["mixer"].items()},
            embeddings=noise,
        )

    def _all(self, x: Tensor) -> Tensor:
        """A clean tensor (b, ...) for the rows of every site."""
        return x.repeat(self.count, *[1] * (x.ndim - 1))

    def _scan(self, scan: Scan) -> Any:
        layer = scan.call.layer
        conv, state = self.masks.get(("conv", layer)), self.masks.get(("state", layer))
        lowered = scan.lowered
        if conv is not None:
            clean = conv_inputs(scan.family, scan.mixer, self.trace[layer].input)
            lowered = scan.lower(scan.project(_carry(scan.mixer, scan.x, self._all(clean), conv)))
        if state is None:
            if scan.seen is not None:
                scan.seen.recurrence = lowered.recurrence
            return scan.compute(lowered)
        steps = [int(t) for t in state.any(0).nonzero()[:, 0]]
        clean_states = self.trace[layer].recurrence.states(steps)

        def exchange(t: int, h: Tensor) -> Tensor:
            return torch.where(state[:, t, None, None, None], self._all(clean_states[:, steps.index(t)]), h)

        def gain(t: int) -> Tensor:
            heads = lowered.recurrence.n_heads
            return torch.where(state[:, t, None].cpu(), 0.0, 1.0).double().expand(-1, heads)

        return scan.exchange(lowered, dict.fromkeys(steps, exchange), gain, self.read == "now")


def _carry(mixer: Any, x: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
    """The convolution's output when the tokens after a patched step see the clean inputs up to that step."""
    u, reach = convolve(mixer, x), mixer.conv1d.weight.shape[2] - 1
    for t in [int(t) for t in mask.any(0).nonzero()[:, 0]] if reach else []:
        start, stop = max(0, t + 1 - reach), min(x.shape[1], t + 1 + reach)
        mixed = torch.cat([clean[:, start : t + 1], x[:, t + 1 : stop]], dim=1)
        later = convolve(mixer, mixed)[:, t + 1 - start :]
        u[:, t + 1 : stop] = torch.where(mask[:, t, None, None], later, u[:, t + 1 : stop])
    return u


def _layers(site: Site, window: int, lens: Lens) -> list[int]:
    """The layers that a site patches."""
    there = range(len(lens.layers) + 1) if site.kind == "residual" else sorted(lens._mixers)
    first = site.layer - (window - 1) // 2
    return [k for k in there if first <= k < first + window]


def _corrupt(
    lens: Lens, clean: Batch, corrupt: Any
) -> tuple[Batch, Callable[[int], Callable[[Tensor], Tensor]] | None]:
    """The batch of the corrupt run and, for noise, what makes the change of the embeddings of so many copies."""
    if not isinstance(corrupt, Noise):
        bad = prepare(corrupt, lens.tokenizer, lens.vocab_size)
        _same_lengths(clean, bad)
        return bad, None
    mask = mask_of(corrupt.positions, clean.lengths, "noise")
    if not bool(mask.any()) or not corrupt.scale > 0:
        raise SsmlensError("the noise has no position or no scale above 0, so the corrupt run would be the clean one")
    width = lens.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(corrupt.seed)
    drawn = torch.randn(*mask.shape, width, generator=generator, dtype=torch.float64) * corrupt.scale
    drawn = (drawn * mask[..., None]).to(lens.device)
    return clean, lambda count: lambda x: x + drawn.repeat(count, 1, 1).to(x.dtype)


def _check(window: Any, read: str) -> None:
    if read not in READS:
        raise SsmlensError(f"unknown read {read!r}: choose one of {', '.join(READS)}")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise SsmlensError(f"window is a number of layers, at least 1, got {window!r}")


def _same_lengths(clean: Batch, corrupt: Batch) -> None:
    if corrupt.lengths.tolist() != clean.lengths.tolist():
        raise PromptError(
            f"clean has {clean.lengths.tolist()} tokens and corrupt {corrupt.lengths.tolist()}: give prompts of the "
            "same length, so that their positions match"
        )


def _groups(sites: int, logits: Tensor) -> Iterator[Sequence[int]]:
    """Sites in runs whose logits fit into `LOGIT_BYTES` together."""
    size = max(1, int(LOGIT_BYTES // (logits.numel() * logits.element_size())))
    for start in range(0, sites, size):
        yield range(start, min(start + size, sites))


def _repeat(batch: Batch, count: int) -> Batch:
    return Batch(batch.ids.repeat(count, 1), batch.lengths.repeat(count), batch.tokens * count)
