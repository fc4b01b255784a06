"""Attention knockout that says what it blocks: the scan, the convolution, and the decay.

Mamba Knockout (Endy et al., ACL 2025) drops what token j wrote from what the targets read. In Mamba that leaves two
ways open: the short convolution carries x_j into the tokens after it, which write it themselves, and token j still
decays the state by its own step size. `knockout` closes any of the three.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ssmlens.errors import SsmlensError
from ssmlens.interventions._forward import Changes, choose_layers, forward
from ssmlens.interventions._positions import mask_of, one_position
from ssmlens.interventions._scan import Scan, convolve
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.lens import Lens
from ssmlens.models.family import Lowered
from ssmlens.prompt import Batch, prepare

__all__ = ["DECAYS", "PATHS", "blocking", "knockout"]

PATHS = ("ssm", "conv")
"""The ways from one token to another inside a mixer."""

DECAYS = ("keep", "skip")
"""What a blocked token does to the state besides writing."""

Stream = tuple[Tensor, Tensor]
"""Sources and targets, both (b, t) bool: these targets read a pass in which these sources are blocked."""


def knockout(
    lens: Lens,
    prompt: str | Sequence[str] | Sequence[int] | Tensor,
    sources: Any = None,
    targets: Any = None,
    layers: int | Iterable[int] | None = None,
    paths: str | Sequence[str] = PATHS,
    decay: str = "keep",
    *,
    pairs: Iterable[tuple[int, int]] | None = None,
) -> Tensor:
    """Logits of the model when some tokens cannot be read by others.

    In each chosen layer the mixer is computed a second time with the sources blocked; the target rows take the
    output of their position from there, all other rows from the untouched pass. Path "ssm": the source's write
    dt B x is dropped, which is ``alpha[target, source] = 0``. Path "conv": the convolution's taps from the source
    into later tokens are cut, in everything that the target reads, so also in what those tokens write; a source's
    own tap stays. Gate, skip weight and the source's own row are untouched.

    With both paths, ``decay="skip"``, all layers and every later position as target, a source has no influence on
    any later logit: replacing it leaves them as they are. Less than that leaks.

    Args:
        lens: the model.
        prompt: whatever `Lens.trace` takes.
        sources: positions that cannot be read: one, several, a range, a mask (t,) or (b, t), or a list for each row;
            negative ones count from each row's last real token.
        targets: positions that cannot read them, every target none of the sources. None stands for every position
            after each source.
        layers: the layers where it happens; all with a recurrence by default.
        paths: "ssm", "conv" or both.
        decay: "keep" lets a blocked source decay the state as before; with "skip" the targets read a state that it
            never decayed. What it writes is up to the path "ssm".
        pairs: (source, target) positions in place of ``sources`` and ``targets``.

    Returns:
        (b, t, v) logits; those before the first target are the model's own.

    Raises:
        SsmlensError: when no source comes before a target, so that nothing would be blocked, or a name is unknown.
        LayerError: when a layer does not exist.

    Source: Endy et al. 2025 (paths="ssm" with decay="keep" is ZERO_ATTENTION, with decay="skip" ZERO_DELTA).
    """
    batch = prepare(prompt, lens.tokenizer, lens.vocab_size)
    return forward(lens, batch, blocking(lens, batch, sources, targets, layers, paths, decay, pairs))


def blocking(
    lens: Lens,
    batch: Batch,
    sources: Any = None,
    targets: Any = None,
    layers: int | Iterable[int] | None = None,
    paths: str | Sequence[str] = PATHS,
    decay: str = "keep",
    pairs: Iterable[tuple[int, int]] | None = None,
) -> Changes:
    """What a forward of this batch does differently in a knockout; arguments and errors as in `knockout`."""
    chosen = choose_layers(lens, layers)
    ways = _paths(paths)
    if decay not in DECAYS:
        raise SsmlensError(f"unknown decay {decay!r}: choose one of {', '.join(DECAYS)}")
    columns, blocked = _blocked(batch.lengths, sources, targets, pairs)
    # From a token to itself there is a way in the scan, and a step has its own decay, if of nothing at the first.
    itself = "ssm" in ways or decay == "skip"
    rows = torch.arange(blocked.shape[1])[:, None]
    effective = blocked & ((columns <= rows) if itself else (columns < rows))
    effective[:, 0] &= (columns > 0) | ("ssm" in ways)
    if not bool(effective.any()):
        raise SsmlensError("no source comes before a target on these paths, so the knockout would touch nothing")
    streams = [(s.to(lens.device), t.to(lens.device)) for s, t in _streams(columns, blocked, effective.any(2))]

    def change(scan: Scan) -> Any:
        result = scan.plain()
        for source, target in streams:
            lowered, inputs = _without(scan, source, ways, decay)
            result = scan.merge(target, scan.compute(lowered, inputs), result)
            if scan.seen is not None:
                scan.seen.passes.append((target, replace(lowered.recurrence, inputs=inputs)))
        return result

    return Changes(scans=dict.fromkeys(chosen, change))


def _without(scan: Scan, source: Tensor, ways: Sequence[str], decay: str) -> tuple[Lowered, ScanInputs]:
    """The call, and the scan inputs that it is computed with, when ``source`` (b, t) is blocked for everyone."""
    lowered = scan.lowered
    if "conv" in ways:
        u = convolve(scan.mixer, scan.x.masked_fill(source[..., None], 0), own=scan.x)
        lowered = scan.lower(scan.project(u))
    inputs = lowered.recurrence.inputs
    if "ssm" in ways:
        # The write, not the value: the column of the source in the implicit attention is then 0 as well.
        inputs = inputs.replace(write=inputs.write.masked_fill(source[..., None, None], 0))
    if decay == "skip":
        assert inputs.dt is not None
        assert inputs.A is not None
        dt = inputs.dt.masked_fill(source[..., None], 0)
        # A source whose write is not dropped still writes with its own step size.
        inputs = inputs.replace(dt=dt) if "ssm" in ways else inputs.replace(log_decay=dt[..., None] * inputs.A, A=None)
    return lowered, inputs


def _paths(paths: str | Sequence[str]) -> tuple[str, ...]:
    named = (paths,) if isinstance(paths, str) else tuple(paths)
    unknown = [p for p in named if p not in PATHS]
    if unknown or not named:
        found = f"unknown path {unknown[0]!r}" if unknown else "paths is empty"
        raise SsmlensError(f"{found}: choose from {', '.join(PATHS)}")
    return named


def _blocked(lengths: Tensor, sources: Any, targets: Any, pairs: Any) -> tuple[Tensor, Tensor]:
    """Positions (k,) that are a source in some row, and (b, target, k) bool: which targets cannot read them."""
    longest = int(lengths.max())
    if pairs is None:
        if sources is None:
            raise SsmlensError("sources is missing: name the positions that cannot be read, or give pairs")
        source = mask_of(sources, lengths, "sources")
        columns = source.any(0).nonzero()[:, 0]
        target = mask_of(targets, lengths, "targets")
        blocked = target[:, :, None] & source[:, None, columns]
        return columns, blocked if targets is not None else blocked & (columns < torch.arange(longest)[:, None])
    if sources is not None or targets is not None:
        raise SsmlensError("give either pairs, or sources and targets")
    found = []
    for pair in pairs:
        try:
            first, second = pair
        except (TypeError, ValueError):
            raise SsmlensError(f"pairs holds (source, target) positions, got {pair!r}") from None
        for row, length in enumerate(lengths.tolist()):
            found.append((row, one_position(second, length, "pairs"), one_position(first, length, "pairs")))
    columns = torch.tensor(sorted({column for _, _, column in found}), dtype=torch.long)
    place = {column: k for k, column in enumerate(columns.tolist())}
    blocked = torch.zeros(len(lengths), longest, len(columns), dtype=torch.bool)
    for row, reader, column in found:
        blocked[row, reader, place[column]] = True
    return columns, blocked


def _streams(columns: Tensor, blocked: Tensor, targets: Tensor) -> list[Stream]:
    """As few second passes as do: in one pass, a row of the batch serves all targets that share their sources."""
    streams: list[Stream] = []
    for row in range(len(targets)):
        groups: dict[bytes, list[int]] = {}
        # Sets of sources as bytes: a text has as many as it has targets.
        sets = blocked[row].numpy()
        for t in targets[row].nonzero()[:, 0].tolist():
            groups.setdefault(sets[t].tobytes(), []).append(t)
        for i, members in enumerate(groups.values()):
            if i == len(streams):
                streams.append((torch.zeros_like(targets), torch.zeros_like(targets)))
            streams[i][0][row, columns] = blocked[row, members[0]]
            streams[i][1][row, members] = True
    return streams
