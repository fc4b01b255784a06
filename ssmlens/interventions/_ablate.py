"""Ablation: what the model says with a part of its mixers taken out.

A part is a tensor on the way through the mixer. It is replaced at every chosen token by zero, by its mean over the
real tokens of a reference run, or by its value at tokens drawn from that run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmlens.errors import SsmlensError
from ssmlens.interventions._forward import Changes, choose_layers, forward
from ssmlens.interventions._positions import mask_of
from ssmlens.interventions._scan import Scan, convolve, past_taps
from ssmlens.kernels import scan as kernel
from ssmlens.lens import Lens
from ssmlens.prompt import Batch, prepare

__all__ = ["HOWS", "PARTS", "ablate"]

PARTS = ("block", "ssm", "skip", "head", "channel", "state", "conv", "gate")
"""What can be taken out of a mixer.

block    its output, so that the residual stream passes it by
ssm      what is read from the state: y = M x, without the skip
skip     D x
head     scan output with skip of some heads: ("head", [0, 3]); in Mamba-1 a head is a channel
channel  scan output with skip of some inner channels
state    what is read from some of the n state dimensions
conv     what the K - 1 earlier taps of the convolution add; the current token's tap stays
gate     SiLU(z)
"""

INDEXED = ("head", "channel", "state")
HOWS = ("zero", "mean", "resample", "one")
"""What comes in its place; "one" is for the gate alone and leaves the product out."""

Swap = Callable[[str, Tensor], Tensor]
"""Part and its tensor (b, t, ...) to the one that goes on."""


@dataclass(frozen=True)
class _Part:
    name: str
    indices: tuple[int, ...] = ()


def ablate(
    lens: Lens,
    prompt: str | Sequence[str] | Sequence[int] | Tensor,
    layers: int | Iterable[int] | None = None,
    parts: Any = "block",
    how: str = "zero",
    *,
    positions: Any = None,
    reference: Any = None,
    seed: int = 0,
) -> Tensor:
    """Logits of the model with parts of its mixers replaced.

    Args:
        lens: the model.
        prompt: whatever `Lens.trace` takes.
        layers: where; all with a recurrence by default.
        parts: a name of `PARTS`, a pair such as ("state", [0, 5]), a mapping {"head": [1], "skip": None}, or a list
            of names and pairs. "head", "channel" and "state" need indices.
        how: "zero" drops the part; "mean" is that of the part over the real tokens of the reference run, "resample"
            its values at tokens drawn from the reference run, the same draw for all parts and layers; "one" is for
            the gate.
        positions: the tokens at which it is replaced, in any form that `knockout` takes; all by default.
        reference: prompt or prompts whose unchanged run gives means and values; by default ``prompt`` itself, whose
            mean still tells of the prompt. It goes with "mean" and "resample" alone.
        seed: of the draw.

    Returns:
        (b, t, v) logits.

    Raises:
        SsmlensError: for an unknown part or way, indices that do not exist, or when nothing would be touched.
        LayerError: when a layer does not exist.
    """
    chosen, wanted = choose_layers(lens, layers), _parts(parts)
    names = {p.name for p in wanted}
    if how not in HOWS:
        raise SsmlensError(f"unknown way {how!r} to ablate: choose one of {', '.join(HOWS)}")
    if how == "one" and names != {"gate"}:
        raise SsmlensError("how='one' leaves the product with the gate out, so it goes with parts='gate' alone")
    if reference is not None and how in ("zero", "one"):
        raise SsmlensError(f"how={how!r} reads no reference run: leave reference out, or choose 'mean' or 'resample'")
    batch = prepare(prompt, lens.tokenizer, lens.vocab_size)
    rows = mask_of(positions, batch.lengths, "positions")
    if not bool(rows.any()):
        raise SsmlensError("positions is empty: an ablation without a token would touch nothing")
    if "conv" in names and not bool(rows[:, 1:].any()):
        raise SsmlensError("the first token has no earlier taps, so ablating its convolution would touch nothing")
    rows = rows.to(lens.device)
    filler = _filler(lens, batch, chosen, wanted, how, reference, seed)

    def swap(layer: int) -> Swap:
        def put(part: str, x: Tensor) -> Tensor:
            mask = rows.reshape(*rows.shape, *[1] * (x.ndim - 2))
            return torch.where(mask, filler(layer, part, x).to(x.dtype), x)

        return put

    return forward(lens, batch, _changes(lens, chosen, wanted, swap))


def _filler(
    lens: Lens, batch: Batch, layers: list[int], parts: Sequence[_Part], how: str, reference: Any, seed: int
) -> Callable[[int, str, Tensor], Tensor]:
    """A function of layer, part and its tensor: what comes in its place, of a shape that broadcasts to it."""
    if how in ("zero", "one"):
        value = torch.zeros((), device=lens.device) if how == "zero" else torch.ones((), device=lens.device)
        return lambda layer, part, x: value
    source = batch if reference is None else prepare(reference, lens.tokenizer, lens.vocab_size)
    seen: dict[tuple[int, str], Tensor] = {}
    real = mask_of(None, source.lengths, "reference").to(lens.device)

    def record(layer: int) -> Swap:
        def keep(part: str, x: Tensor) -> Tensor:
            kept = x[real]
            seen[layer, part] = kept.mean(0) if how == "mean" else kept
            return x

        return keep

    forward(lens, source, _changes(lens, layers, parts, record))
    if how == "mean":
        return lambda layer, part, x: seen[layer, part]
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint(int(real.sum()), tuple(batch.ids.shape), generator=generator).to(lens.device)
    return lambda layer, part, x: seen[layer, part][draw]


def _changes(lens: Lens, layers: list[int], parts: Sequence[_Part], swap: Callable[[int], Swap]) -> Changes:
    """The forward in which every chosen part passes through ``swap(layer)``."""
    names = {p.name for p in parts}
    inside, gated, outputs = {}, {}, {}
    for k in layers:
        put, mamba2 = swap(k), lens._mixers[k][2].name == "mamba2"
        if names - {"block"} - ({"gate"} if mamba2 else set()):
            inside[k] = _inside(parts, put)
        if "gate" in names and mamba2:
            gated[k] = _gated(put)
        if "block" in names:
            outputs[k] = lambda x, put=put: put("block", x)
    return Changes(scans=inside, gated=gated, outputs=outputs)


def _gated(put: Swap) -> Callable[[Tensor, Tensor], tuple[Tensor, None]]:
    """Mamba-2 gates in its norm: the product is taken before it, and the norm gets no gate."""

    def change(y: Tensor, z: Tensor) -> tuple[Tensor, None]:
        wide = torch.promote_types(y.dtype, torch.float32)
        return y.to(wide) * put("gate", F.silu(z.to(wide))), None

    return change


def _inside(parts: Sequence[_Part], put: Swap) -> Callable[[Scan], Any]:
    """Everything from the convolution to the gate, in the order of the model."""
    by_name = {p.name: p for p in parts}

    def change(scan: Scan) -> Any:
        lowered = scan.lowered
        if "conv" in by_name:
            past = put("conv", past_taps(scan.mixer, scan.x))
            lowered = scan.lower(scan.project(convolve(scan.mixer, scan.x, past=past)))
        rec = lowered.recurrence
        y, final = _read(by_name.get("state"), rec.inputs, scan, put)
        if "ssm" in by_name:
            y = put("ssm", y)
        y = y + (put("skip", rec.skip) if "skip" in by_name else rec.skip)
        for name, flat in (("head", y), ("channel", y.flatten(2))):
            if name in by_name:
                at = _indices(by_name[name], flat.shape[2], scan)
                y = flat.index_copy(2, at, put(name, flat[:, :, at])).reshape(y.shape)
        if "gate" in by_name and lowered.gate is not None:
            y = y * put("gate", F.silu(lowered.gate))[..., None]
            lowered = type(lowered)(rec, None)
        return scan.pack(lowered, y, final)

    return change


def _read(part: _Part | None, inputs: Any, scan: Scan, put: Swap) -> tuple[Tensor, Tensor]:
    """y (b, t, h, p) without skip, some state dimensions' share of it passed through ``put``."""
    if part is None:
        return kernel.run(inputs)
    some = torch.zeros(inputs.d_state, dtype=torch.bool, device=inputs.read.device)
    some[_indices(part, inputs.d_state, scan)] = True
    y, final = kernel.run(inputs.replace(read=inputs.read.masked_fill(some, 0)))
    share, _ = kernel.run(inputs.replace(read=inputs.read.masked_fill(~some, 0)))
    return y + put("state", share), final


def _indices(part: _Part, size: int, scan: Scan) -> Tensor:
    wrong = [i for i in part.indices if not -size <= i < size]
    if wrong:
        raise SsmlensError(
            f"{part.name} {wrong[0]} does not exist in layer {scan.call.layer}: choose from 0 to {size - 1}"
        )
    return torch.tensor(sorted({i % size for i in part.indices}), device=scan.hidden.device)


def _is_indices(x: Any) -> bool:
    """What follows the name in a pair, rather than a second part."""
    if isinstance(x, tuple):
        return bool(x) and isinstance(x[0], int)
    return x is None or isinstance(x, int | range | list | Tensor)


def _parts(parts: Any) -> list[_Part]:
    """Parts from a name, a pair, a mapping, or a list of names and pairs.

    Raises:
        SsmlensError: for an unknown name, one named twice, and indices where there are none or missing ones.
    """
    if isinstance(parts, Mapping):
        items: list[Any] = list(parts.items())
    elif isinstance(parts, str) or (isinstance(parts, tuple) and len(parts) == 2 and _is_indices(parts[1])):
        items = [parts]
    else:
        items = list(parts)
    found = []
    for item in items:
        name, indices = (item, None) if isinstance(item, str) else tuple(item)
        if name not in PARTS:
            raise SsmlensError(f"unknown part {name!r}: choose from {', '.join(PARTS)}")
        listed = () if indices is None else (indices,) if isinstance(indices, int) else tuple(int(i) for i in indices)
        if bool(listed) != (name in INDEXED):
            needs = f"needs indices, as in ({name!r}, [0])" if name in INDEXED else "takes no indices"
            raise SsmlensError(f"the part {name!r} {needs}")
        found.append(_Part(name, listed))
    names = [p.name for p in found]
    if not names or len(set(names)) < len(names):
        raise SsmlensError("parts is empty, or names one part twice: give each part once, with all its indices")
    return found
