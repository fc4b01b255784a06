"""A run with something changed in it, open to the same questions as a trace, beside the run without the change.

The changed run records what its scans did: which recurrence every row was computed with, and which states were put in
on the way. The implicit attention and the states are then those of the changed run, not of a recurrence that never ran.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ssmlens.errors import SsmlensError
from ssmlens.interventions._contrast import Contrast, contrast
from ssmlens.interventions._forward import Changes, Watch, forward, run
from ssmlens.interventions._knockout import PATHS, blocking
from ssmlens.interventions._lenses import unembed
from ssmlens.interventions._patch import READS, putting
from ssmlens.interventions._positions import last_real, one_head, whole
from ssmlens.interventions._scan import Seen
from ssmlens.interventions._seen import attention_map, state_norms
from ssmlens.interventions._steer import StateEdit, editing
from ssmlens.lens import Lens, _head
from ssmlens.prompt import Batch, prepare
from ssmlens.trace import Trace

__all__ = ["Knockout", "Observed", "Patch", "Sides", "observe"]


@dataclass(frozen=True)
class Knockout:
    """Tokens that cannot be read, for `observe`; the arguments are those of `knockout`."""

    sources: Any = None
    targets: Any = None
    layers: int | Iterable[int] | None = None
    paths: str | Sequence[str] = PATHS
    decay: str = "keep"
    pairs: Iterable[tuple[int, int]] | None = None


@dataclass(frozen=True)
class Patch:
    """One site of the run that gets the activation of a clean run, for `observe`.

    Args:
        clean: prompt of the same length whose activation is put in.
        site: one site, as `patch` takes it.
        window: number of consecutive layers, as in `patch`.
    """

    clean: Any
    site: Any
    window: int = 1


Change = Knockout | Patch | StateEdit | Mapping[str, Any] | Sequence[StateEdit | Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Sides:
    """One quantity in both runs, tensors of one shape: ``before`` without the change, ``after`` with it."""

    before: Tensor
    after: Tensor

    @property
    def difference(self) -> Tensor:
        """After less before."""
        return self.after - self.before


@dataclass(frozen=True, eq=False)
class Observed:
    """Two runs of one prompt.

    Args:
        before: the trace of the model's own run.
        after: the trace of the changed run. Its mixers are those whose scan was the model's own; the other layers
            have no single recurrence, and are asked through the methods below. Where a mixer's output was patched,
            its entry holds what the mixer computed, and the residual stream what went on.
    """

    before: Trace
    after: Trace
    _seen: Mapping[int, Seen] = field(repr=False)
    _run: tuple[Lens, Batch, Changes] = field(repr=False)

    @property
    def layers(self) -> list[int]:
        """The layers with a recurrence."""
        return sorted(self.before.mixers)

    @cached_property
    def contrast(self) -> Contrast:
        """Both next-token distributions after every token."""
        return contrast(self.before.logits, self.after.logits)

    def attention(self, layer: int, how: str | int = "mean") -> Sides:
        """The implicit attention of one layer in both runs, (b, t, s) in units of y per value.

        In the changed run a blocked source has no entry in the rows that cannot read it by the scan, and what was
        read through an exchanged state is multiplied with what the exchange left of it: 0 behind a state that was
        replaced, the factor behind one that was scaled. What an edit adds comes from no token and has no column.

        Args:
            layer: index of the layer.
            how: a reduction over heads, see `ImplicitAttention.reduce`, or the index of one head.

        Raises:
            LayerError: when the layer has no recurrence, or no such head.
            ValueError: for an unknown reduction.
            SsmlensError: when an edit's function passed this layer's state on, which is no factor.
        """
        if not isinstance(how, str):
            how = one_head(how, self.before[layer].recurrence.n_heads, layer)
        return Sides(attention_map(self._plain(layer), how), attention_map(self._changed(layer), how))

    def state_norm(self, layer: int, head: int | None = None) -> Sides:
        """Norm of the state that each token reads in both runs, (b, t) float64 in units of the state.

        NaN at padding. After an exchange it is that of the state put in; with ``read="next"`` the exchange's own
        step has read the one before.

        Args:
            layer: index of the layer.
            head: one head; all together by default.

        Raises:
            LayerError: when the layer has no recurrence, or no such head.
        """
        if head is not None:
            head = one_head(head, self.before[layer].recurrence.n_heads, layer)
        found = [state_norms(seen, head) for seen in (self._plain(layer), self._changed(layer))]
        real = self._real
        return Sides(*(torch.where(real, x.cpu(), torch.nan) for x in found))

    def lens(self, token: int | None = None, position: int = -1) -> Sides:
        """Log probability of a next token, read off every layer's stream by the logit lens, (k, b) float64.

        Entry k is read from the stream entering layer k, the last one is the model's own.

        Args:
            token: its id; by default each prompt's likeliest next token without the change.
            position: after which token; negative ones count from each row's end.

        Raises:
            SsmlensError: when the model's head is not known, or the position does not exist.
        """
        if not self.before.head:
            raise SsmlensError("the head of this model is not known, so that no lens reads its residual stream")
        rows, where = self._rows(position)
        ids = self._targets(token, position)

        def read(trace: Trace) -> Tensor:
            streams = torch.stack([x[rows, where] for x in trace.residuals])
            logits = unembed(streams, trace.head).double()
            logits[-1] = trace.logits[rows, where].double()
            return logits.log_softmax(-1)[:, rows, ids].cpu()

        return Sides(read(self.before), read(self.after))

    def attribution(self, token: int | None = None, position: int = -1) -> Sides:
        """Gradient times embedding of one logit in both runs, (b, t) in logits: a token's first-order effect.

        Without a change this is `ssmlens.attribution.gradient_x_input`. A state or activation that was put in is a
        constant, so that nothing is attributed through it.

        Args:
            token: id whose logit is attributed; by default each prompt's likeliest next token without the change.
            position: after which token; negative ones count from each row's end.

        Raises:
            SsmlensError: when the position does not exist.
        """
        lens, batch, changes = self._run
        rows, where = self._rows(position)
        ids = self._targets(token, position)

        def scores(changes: Changes) -> Tensor:
            leaf: list[Tensor] = []

            def grow(x: Tensor) -> Tensor:
                leaf.append(x.detach().requires_grad_())
                return leaf[0]

            held = Changes(changes.scans, changes.residuals, changes.outputs, changes.gated, grow)
            logits = forward(lens, batch, held, gradients=True)
            (gradient,) = torch.autograd.grad(logits[rows, where, ids.to(logits.device)].sum(), leaf)
            return (gradient * leaf[0].detach()).sum(-1).cpu()

        return Sides(scores(Changes()), scores(changes))

    @property
    def _real(self) -> Tensor:
        return torch.arange(self.before.ids.shape[1]) < self.before.lengths.cpu()[:, None]

    def _rows(self, position: int) -> tuple[Tensor, Tensor]:
        return torch.arange(len(self.before.lengths)), last_real(position, self.before.lengths)

    def _targets(self, token: int | None, position: int) -> Tensor:
        """(b,) ids of the tokens that are asked for."""
        rows, where = self._rows(position)
        logits = self.before.logits[rows, where].cpu()
        if token is None:
            return logits.argmax(-1)
        index = whole(token)
        if index is None or not 0 <= index < logits.shape[-1]:
            raise SsmlensError(
                f"token {token!r} is outside the vocabulary: choose an id from 0 to {logits.shape[-1] - 1}"
            )
        return torch.full((len(rows),), index, dtype=torch.long)

    def _plain(self, layer: int) -> Seen:
        return Seen(self.before[layer].recurrence)

    def _changed(self, layer: int) -> Seen:
        return self._seen[layer] if layer in self._seen else Seen(self.after[layer].recurrence)


def observe(
    lens: Lens, prompt: Any, change: Change, *, read: str = "now", attention_mask: Tensor | None = None
) -> Observed:
    """Run the model on a prompt without and with a change, and keep what both runs can be asked about.

    Args:
        lens: the model.
        prompt: whatever `Lens.trace` takes; of a `Patch` the corrupt prompt.
        change: a `Knockout`, a `Patch`, or one or several `StateEdit`.
        read: of a patch or edit, as in `patch` and `steer`.
        attention_mask: of a padded (b, t) prompt, as in `Lens.trace`.

    Returns:
        The `Observed` runs. Logits are those of `knockout`, `patch` and `steer`.

    Raises:
        SsmlensError, LayerError, PromptError: as those functions do.
    """
    batch = prepare(prompt, lens.tokenizer, lens.vocab_size, attention_mask)
    changes = _changes(lens, batch, change, read)
    before = lens.trace(batch.ids, attention_mask=batch.mask)
    watch = Watch()
    logits = run(lens, batch, changes, watch=watch).logits
    after = Trace(
        ids=batch.ids,
        tokens=before.tokens,
        logits=logits,
        lengths=batch.lengths,
        layers=lens.layers,
        mixers=watch.mixers,
        residuals=tuple(watch.residuals[k] for k in range(len(lens.layers) + 1)),
        settings={**before.settings, "change": repr(change)},
        head=_head(lens.model),
    )
    return Observed(before, after, watch.seen, (lens, batch, changes))


def _changes(lens: Lens, batch: Batch, change: Any, read: str) -> Changes:
    if read not in READS:
        raise SsmlensError(f"unknown read {read!r}: choose one of {', '.join(READS)}")
    if isinstance(change, Knockout):
        return blocking(
            lens, batch, change.sources, change.targets, change.layers, change.paths, change.decay, change.pairs
        )
    if isinstance(change, Patch):
        return putting(lens, batch, change.clean, change.site, change.window, read)
    if isinstance(change, StateEdit | Mapping) or (isinstance(change, Sequence) and not isinstance(change, str)):
        return editing(lens, batch, change, read)
    raise SsmlensError(f"a change is a Knockout, a Patch or StateEdits, got {type(change).__name__}")
