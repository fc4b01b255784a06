"""Where to patch: what kind of activation, in which layers, at which tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmlens.errors import LayerError, SsmlensError
from ssmlens.interventions._positions import mask_of, one_position
from ssmlens.lens import Lens

__all__ = ["KINDS", "Site", "make_sites"]

KINDS = ("residual", "mixer", "state", "conv", "full_state")
"""What can be patched. "residual": the stream entering a layer, the number of layers standing for the stream after
the last. "mixer": a mixer's output. "state": the recurrent state after a token. "conv": the K - 1 inputs of the
convolution that are carried on after a token. "full_state": both, all that a layer hands on."""

ALIASES = {"output": "mixer", "mixer_output": "mixer", "conv_state": "conv", "recurrent_state": "state"}


@dataclass(frozen=True)
class Site:
    """One place to patch.

    Args:
        kind: one of `KINDS`.
        layer: index of the layer; for "residual" also the number of layers.
        position: a token position, several, or None for all tokens; negative ones count from the end.
    """

    kind: str
    layer: int
    position: int | tuple[int, ...] | None = None


def make_sites(sites: Any, lens: Lens, lengths: Tensor, read_now: bool = True) -> list[Site]:
    """Sites from what a caller wrote, checked; positions count from 0 unless rows differ in length.

    Args:
        sites: a kind (every layer at every token), a site, or several of either. A site is a `Site`, a mapping
            with its names, (kind, layer, position), (kind, layer), or (layer, position) in the residual stream.
        lens: the model.
        lengths: (b,) real tokens of each row; a position has to be there in all of them.
        read_now: whether the step of a patched state reads it; else it touches nothing at the last token.

    Raises:
        SsmlensError: when there is none, or one is malformed.
        LayerError: when a layer does not exist or has no recurrence.
    """
    if isinstance(sites, str):
        sites = [sites]
    single = isinstance(sites, Site | Mapping) or (
        isinstance(sites, tuple)
        and bool(sites)
        and not isinstance(sites[0], Site | Mapping | tuple | list)
        and not all(isinstance(x, str) for x in sites)
    )
    try:
        items = [sites] if single else list(sites)
    except TypeError:
        raise SsmlensError(f"sites is a kind, a site or a list of sites, got {sites!r}") from None
    if not items:
        raise SsmlensError("sites is empty: a patch without a site would touch nothing")
    wanted = [
        x for item in items for x in (_everywhere(item, lens, lengths, read_now) if isinstance(item, str) else [item])
    ]
    return [_check(_read(item), lens, lengths, read_now) for item in wanted]


def _everywhere(name: str, lens: Lens, lengths: Tensor, read_now: bool) -> list[Site]:
    """The sites of one kind in every layer at every token, except where nothing reads what is handed on."""
    kind = _kind(name)
    layers = range(len(lens.layers) + 1) if kind == "residual" else sorted(lens._mixers)
    return [Site(kind, k, t) for k in layers for t in range(int(lengths.min()) - _only_later(kind, read_now))]


def _only_later(kind: str, read_now: bool) -> bool:
    """Only tokens after the patched one read it."""
    return kind == "conv" or (not read_now and kind in ("state", "full_state"))


def _read(item: Any) -> Site:
    if isinstance(item, Site):
        return item
    if isinstance(item, Mapping):
        unknown = sorted(set(item) - {"kind", "layer", "position"})
        if unknown or "layer" not in item:
            raise SsmlensError(f"a site is a mapping of kind, layer and position, got {dict(item)!r}")
        return Site(item.get("kind", "residual"), item["layer"], _position(item.get("position")))
    if isinstance(item, Sequence) and not isinstance(item, str):
        if len(item) == 3 and isinstance(item[0], str):
            return Site(item[0], item[1], _position(item[2]))
        if len(item) == 2 and isinstance(item[0], str):
            return Site(item[0], item[1])
        if len(item) == 2:
            return Site("residual", item[0], _position(item[1]))
    raise SsmlensError(f"a site is (kind, layer, position) or (layer, position), got {item!r}")


def _position(found: Any) -> Any:
    if isinstance(found, str) and found == "all":
        return None
    return tuple(found) if isinstance(found, Iterable) and not isinstance(found, str) else found


def _kind(name: Any) -> str:
    if isinstance(name, str):
        name = name.replace(" ", "_")
    kind = ALIASES.get(name, name) if isinstance(name, str) else name
    if kind not in KINDS:
        raise SsmlensError(f"unknown kind of site {name!r}: choose one of {', '.join(KINDS)}")
    return str(kind)


def _check(site: Site, lens: Lens, lengths: Tensor, read_now: bool) -> Site:
    kind, layer = _kind(site.kind), site.layer
    if kind == "residual":
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= len(lens.layers):
            raise LayerError(f"residual {layer!r} does not exist: choose 0 to {len(lens.layers)}")
    else:
        lens._choose([layer])
    position = _position(site.position)
    shortest, longest = int(lengths.min()), int(lengths.max())

    def checked(t: Any) -> int:
        found = one_position(t, shortest, "a site")
        return found if shortest == longest else int(t)

    many = isinstance(position, tuple)
    if many and not position:
        raise SsmlensError(f"a {kind} site in layer {layer} has no position, so it would touch nothing")
    if position is not None:
        position = tuple(checked(t) for t in position) if many else checked(position)
    carried = torch.arange(longest) < lengths[:, None] - 1
    if _only_later(kind, read_now) and not bool((mask_of(position, lengths, "a site") & carried).any(1).all()):
        raise SsmlensError(f"the {kind} site in layer {layer} is at the last token, after which nothing reads it")
    return Site(kind, layer, position)
