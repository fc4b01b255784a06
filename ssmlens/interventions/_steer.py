"""Edits of the recurrent state that the model itself carries on, also while it generates.

The state h[t] of a layer is changed after step t; the recurrence takes it from there. In generation the changed final
state goes into the model's cache, and the model continues from it with its own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ssmlens.errors import SsmlensError
from ssmlens.interventions._forward import Changes, forward, run
from ssmlens.interventions._patch import READS
from ssmlens.interventions._positions import one_head, one_position
from ssmlens.interventions._scan import Scan
from ssmlens.lens import Lens
from ssmlens.prompt import Batch, prepare
from ssmlens.quiet import quiet_transformers

__all__ = ["METHODS", "StateEdit", "Steered", "editing", "steer"]

METHODS = ("auto", "cache", "recompute")
"""How `steer` generates: with the model's cache, or by running the whole sequence again for every token."""


@dataclass(frozen=True, eq=False)
class StateEdit:
    """One change of a layer's state: ``h <- function(scale * h + add)``, or ``h <- set`` to begin with.

    Args:
        layer: index of the layer.
        step: after which token, or several; negative ones count from the prompt's last token, and those beyond it are
            generated tokens. None is every step, generated ones included.
        add: added to the state; a number or a tensor that broadcasts to (b, h, p, n).
        set: put in its place; as ``add``.
        scale: factor of the state, before ``add``.
        function: of the state (b, h, p, n), returns one of the same shape.
        heads: the heads that are changed; all by default.
    """

    layer: int
    step: int | Sequence[int] | None = -1
    add: Tensor | float | None = None
    set: Tensor | float | None = None
    scale: float | None = None
    function: Callable[[Tensor], Tensor] | None = None
    heads: Sequence[int] | None = None

    def __call__(self, h: Tensor) -> Tensor:
        """The changed state, like ``h``."""
        new = h
        if self.set is not None:
            new = self._number("set", h).expand_as(h)
        if self.scale is not None:
            new = new * self.scale
        if self.add is not None:
            new = new + self._number("add", h)
        if self.function is not None:
            new = self.function(new)
        if new.shape != h.shape:
            raise SsmlensError(f"an edit returns a state like {tuple(h.shape)}, got {tuple(new.shape)}")
        if self.heads is None:
            return new
        keep = torch.ones(h.shape[1], dtype=torch.bool, device=h.device)
        keep[list(self.heads)] = False
        return torch.where(keep[:, None, None], h, new)

    def _number(self, name: str, h: Tensor) -> Tensor:
        """What is added or set, which has to broadcast to the state."""
        given = getattr(self, name)
        try:
            found = torch.as_tensor(given, dtype=h.dtype, device=h.device)
            found.expand_as(h)
        except (TypeError, ValueError, RuntimeError):
            got = f"a tensor {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
            raise SsmlensError(
                f"{name} of an edit is a number or a tensor that broadcasts to the state {tuple(h.shape)}, got {got}"
            ) from None
        return found

    def gain(self, n_heads: int) -> Tensor:
        """(h,) factor that is left of what each head's state held: 0 for ``set``, NaN behind a ``function``."""
        factor = (0.0 if self.set is not None else 1.0) * (1.0 if self.scale is None else self.scale)
        changed = torch.full((n_heads,), torch.nan if self.function is not None else factor, dtype=torch.float64)
        if self.heads is None:
            return changed
        keep = torch.ones(n_heads, dtype=torch.bool)
        keep[list(self.heads)] = False
        return torch.where(keep, 1.0, changed)


@dataclass(frozen=True, eq=False)
class Steered:
    """The steered run.

    Args:
        logits: (b, t, v) over prompt and generated tokens; those of the last one are there as well.
        ids: (b, t) prompt and generated tokens, padded on the right.
        lengths: (b,) real tokens of each row.
        tokens: their texts, one list per row.
        generated: the new tokens' ids, one list per row.
        text: the new tokens' text, one per row; empty without a tokenizer.
        method: "cache", "recompute", or "forward" when nothing was generated.
        settings: model, dtype and how it was run.
    """

    logits: Tensor
    ids: Tensor
    lengths: Tensor
    tokens: list[list[str]]
    generated: list[list[int]]
    text: list[str]
    method: str
    settings: Mapping[str, Any] = field(repr=False)


def steer(
    lens: Lens,
    prompt: str | Sequence[str] | Sequence[int] | Tensor,
    edit: StateEdit | Mapping[str, Any] | Sequence[StateEdit | Mapping[str, Any]],
    *,
    new_tokens: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
    read: str = "now",
    method: str = "auto",
) -> Steered:
    """Run the model with its state edited, and let it go on from there.

    Args:
        lens: the model.
        prompt: whatever `Lens.trace` takes.
        edit: a `StateEdit`, a mapping with its names, or several; those of one layer and step apply in order.
        new_tokens: how many tokens to generate after the prompt.
        temperature: 0 takes the likeliest token, above it samples.
        seed: of the sampling; a row draws the same whatever the method.
        read: "now": the output of the edited step reads the edited state; "next": only later steps do.
        method: "cache": the edited state enters the model's cache, one step a token; edits at generated tokens
            cannot be made there. "recompute": the whole sequence is run for every token. "auto": the cache when all
            edits lie in the prompt.

    Returns:
        The `Steered` run.

    Raises:
        SsmlensError: when an edit changes nothing, never comes into play, or a name is unknown.
        LayerError: when an edit's layer does not exist or has no recurrence.
    """
    edits = _listed(edit)
    _check(lens, edits, read, method, new_tokens, temperature)
    batch = prepare(prompt, lens.tokenizer, lens.vocab_size)
    if new_tokens == 0:
        logits = forward(lens, batch, editing(lens, batch, edits, read))
        return _result(lens, logits, batch, [[] for _ in batch.tokens], "forward", {"read": read})
    rows = []
    for i, n in enumerate(batch.lengths.tolist()):
        steps = _steps(edits, n, n + new_tokens, read)
        obstacle = _no_cache(lens, any(t >= n for s in steps for t in s))
        if method == "cache" and obstacle:
            raise SsmlensError(f"method='cache' {obstacle}: use method='recompute'")
        how = _recomputed if method == "recompute" or obstacle else _cached
        ids = batch.ids[i : i + 1, :n]
        chooser = _Chooser(temperature, seed + i)
        rows.append((how(lens, Batch(ids, batch.lengths[i : i + 1], []), edits, steps, new_tokens, read, chooser), how))
    longest = max(len(ids) for (_, ids), _ in rows)
    logits = torch.stack([torch.cat([x, x.new_zeros(longest - len(x), x.shape[1])]) for (x, _), _ in rows])
    full = prepare(torch.stack([_pad(ids, longest) for (_, ids), _ in rows]), lens.tokenizer, lens.vocab_size,
                   torch.stack([_pad(torch.ones_like(ids), longest) for (_, ids), _ in rows]))  # fmt: skip
    made = [ids[n:].tolist() for ((_, ids), _), n in zip(rows, batch.lengths.tolist())]
    used = "cache" if all(how is _cached for _, how in rows) else "recompute"
    settings = {"read": read, "temperature": temperature, "seed": seed, "new_tokens": new_tokens}
    return _result(lens, logits, full, made, used, settings)


def editing(lens: Lens, batch: Batch, edit: Any, read: str) -> Changes:
    """What a forward of this batch does differently with its states edited; arguments and errors as in `steer`."""
    edits = _listed(edit)
    _check(lens, edits, read, "auto", 0, 0.0)
    return _changes(edits, [_steps(edits, n, n, read) for n in batch.lengths.tolist()], read)


def _listed(edit: Any) -> list[Any]:
    """One edit or several, as a list."""
    return [_read(e) for e in ([edit] if isinstance(edit, StateEdit | Mapping) else edit)]


def _read(edit: Any) -> Any:
    """An edit written as a mapping, made one."""
    if not isinstance(edit, Mapping):
        return edit
    known = [f.name for f in fields(StateEdit)]
    unknown = sorted(set(map(str, edit)) - set(known))
    if unknown or "layer" not in edit:
        raise SsmlensError(
            f"an edit names its layer and some of {', '.join(known[1:])}, got {', '.join(map(str, edit))}"
        )
    return StateEdit(**edit)


def _check(lens: Lens, edits: list[StateEdit], read: str, method: str, new_tokens: int, temperature: float) -> None:
    for name, value, valid in (("read", read, READS), ("method", method, METHODS)):
        if value not in valid:
            raise SsmlensError(f"unknown {name} {value!r}: choose one of {', '.join(valid)}")
    if not isinstance(new_tokens, int) or new_tokens < 0 or not temperature >= 0:
        raise SsmlensError(f"new_tokens and temperature are at least 0, got {new_tokens!r} and {temperature!r}")
    if not edits:
        raise SsmlensError("edit is empty: steering without an edit would touch nothing")
    for e in edits:
        if not isinstance(e, StateEdit):
            raise SsmlensError(f"an edit is a StateEdit, got {type(e).__name__}")
        lens._choose([e.layer])
        if all(x is None for x in (e.add, e.set, e.scale, e.function)):
            raise SsmlensError(f"the edit of layer {e.layer} names no change: give add, set, scale or function")
        if e.heads is not None and (isinstance(e.heads, str) or not isinstance(e.heads, Iterable)):
            raise SsmlensError(f"heads of an edit is a list of head indices, got {e.heads!r}")
        if e.heads is not None and not len(list(e.heads)):
            raise SsmlensError(f"the edit of layer {e.layer} names no head, so it would touch nothing")
        for i in () if e.heads is None else e.heads:
            one_head(i, _n_heads(lens, e.layer), e.layer)


def _no_cache(lens: Lens, beyond: bool) -> str:
    """Why the model's cache cannot serve; empty when it can."""
    if beyond:
        return "cannot edit at generated tokens"
    low, high = getattr(lens.model.config, "time_step_limit", (0.0, float("inf")))
    if low > 0 or high < float("inf"):
        return "would differ from a whole pass, because the model's own single step does not limit dt"
    return ""


def _n_heads(lens: Lens, layer: int) -> int:
    return int(lens._mixers[layer][1].A_log.shape[0])  # type: ignore[index]


def _steps(edits: list[StateEdit], prompt: int, total: int, read: str) -> list[list[int]]:
    """For each edit its steps in a row of ``prompt`` tokens that grows to ``total``."""
    found = []
    for e in edits:
        several = isinstance(e.step, Iterable) and not isinstance(e.step, str)
        listed: list[Any] = list(range(total)) if e.step is None else list(e.step) if several else [e.step]  # type: ignore[arg-type]
        # Nothing returned reads the state after the last token when only later steps do.
        steps = {t if isinstance(t, int) and prompt <= t < total else one_position(t, prompt, "step") for t in listed}
        if not steps or (read == "next" and steps == {total - 1}):
            why = "has no step" if not steps else "is after the last token, and read='next'"
            raise SsmlensError(f"the edit of layer {e.layer} {why}, so it would touch nothing")
        found.append(sorted(steps))
    return found


def _changes(edits: list[StateEdit], steps: list[list[list[int]]], read: str, upto: int | None = None) -> Changes:
    """The forward with the edits; ``steps[row][edit]`` lists steps, those from ``upto`` on have not come yet."""

    def change(scan: Scan) -> Any:
        here = [i for i, e in enumerate(edits) if e.layer == scan.call.layer]
        rows: dict[int, list[tuple[int, Tensor]]] = {}
        for i in here:
            for t in sorted({t for row in steps for t in row[i] if upto is None or t < upto}):
                mask = torch.tensor([t in row[i] for row in steps], device=scan.hidden.device)
                rows.setdefault(t, []).append((i, mask))

        def exchange(t: int, h: Tensor) -> Tensor:
            for i, mask in rows[t]:
                h = torch.where(mask[:, None, None, None], edits[i](h), h)
            return h

        def gain(t: int) -> Tensor:
            left = torch.ones(len(steps), scan.lowered.recurrence.n_heads, dtype=torch.float64)
            for i, mask in rows[t]:
                left = torch.where(mask.cpu()[:, None], left * edits[i].gain(left.shape[1]), left)
            return left

        return scan.exchange(scan.lowered, dict.fromkeys(rows, exchange), gain, read == "now")

    return Changes(scans={e.layer: change for e in edits})


class _Chooser:
    """The next token from logits (v,), greedy or sampled with a generator of its own."""

    def __init__(self, temperature: float, seed: int) -> None:
        self.temperature, self.random = temperature, torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        chances = (logits.double().cpu() / self.temperature).softmax(-1)
        return int(torch.multinomial(chances, 1, generator=self.random))


def _recomputed(
    lens: Lens, batch: Batch, edits: list[StateEdit], steps: list[list[int]], count: int, read: str, choose: _Chooser
) -> tuple[Tensor, Tensor]:
    """Logits (t, v) and ids (t,), the whole sequence run again for every new token."""
    ids = batch.ids
    while True:
        length = ids.shape[1]
        logits = forward(lens, Batch(ids, torch.tensor([length]), []), _changes(edits, [steps], read, length))[0]
        if length == batch.ids.shape[1] + count:
            return logits, ids[0]
        ids = torch.cat([ids, torch.tensor([[choose(logits[-1])]])], dim=1)


def _cached(
    lens: Lens, batch: Batch, edits: list[StateEdit], steps: list[list[int]], count: int, read: str, choose: _Chooser
) -> tuple[Tensor, Tensor]:
    """As `_recomputed`: the edited prompt fills the model's cache, and the model goes on by itself."""
    out = run(lens, batch, _changes(edits, [steps], read), cached=True)
    logits, ids = [out.logits[0]], batch.ids[0].tolist()
    modes = {m: m.training for m in lens.model.modules()}
    try:
        lens.model.eval()
        with torch.no_grad(), quiet_transformers():
            for _ in range(count):
                ids.append(choose(logits[-1][-1]))
                step = torch.tensor([[ids[-1]]], device=lens.device)
                out = lens.model(input_ids=step, cache_params=out.cache_params, use_cache=True, return_dict=True)
                logits.append(out.logits[0])
    finally:
        for module, training in modes.items():
            module.training = training
    return torch.cat(logits), torch.tensor(ids)


def _pad(ids: Tensor, length: int) -> Tensor:
    return torch.cat([ids, ids.new_zeros(length - len(ids))])


def _result(
    lens: Lens, logits: Tensor, batch: Batch, made: list[list[int]], method: str, settings: dict[str, Any]
) -> Steered:
    return Steered(
        logits=logits,
        ids=batch.ids,
        lengths=batch.lengths,
        tokens=batch.tokens,
        generated=made,
        text=["" if lens.tokenizer is None else str(lens.tokenizer.decode(ids)) for ids in made],
        method=method,
        settings={"model": lens.name, "fingerprint": lens.fingerprint, **settings},
    )
