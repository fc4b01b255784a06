"""The shipped models: small trained Mamba and Mamba-2 language models with their cards.

``names()`` lists them, ``path(name)`` is a transformers folder, ``card(name)`` its model card, and
``passage(name)`` a text to look at. ``python -m ssmlens.zoo.train NAME --text DIR`` trains one again.

``organisms()`` lists smaller ones, each of which has learned one task of `ssmlens.tasks`; ``path`` and ``card`` know
them too. Those that no transformers class describes are opened by ``organism(name)``, the others by `ssmlens.load`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .organisms_models import Forecaster, SignCounter

__all__ = ["card", "names", "organism", "organisms", "passage", "path"]

_HERE = Path(__file__).parent
_ORDER = ("mamba1-english", "mamba2-english", "mamba1-recall", "mamba2-recall")


def names() -> list[str]:
    """The names of the shipped models; organisms are listed apart."""
    found = _folders().difference(organisms())
    return [n for n in _ORDER if n in found] + sorted(found.difference(_ORDER))


def organisms() -> list[str]:
    """The names of the shipped organisms, in order of their numbers."""
    found = (n for n in _folders() if n.startswith("organism-"))
    return sorted(found, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(6), name))


def organism(name: str, dtype: torch.dtype | None = None) -> Forecaster | SignCounter:
    """A shipped organism that is no transformers model, in eval mode.

    Args:
        name: one of :func:`organisms`.
        dtype: to compute in; float32 by default, float64 for Lyapunov spectra.

    Raises:
        KeyError: for a name that is none of them.
        CheckpointError: for an organism that `ssmlens.load` reads.
    """
    import torch

    from .organisms_models import load_organism

    return load_organism(path(name), dtype or torch.float32)


def _folders() -> set[str]:
    return {p.parent.name for p in (_HERE / "models").glob("*/config.json")}


def path(name: str) -> Path:
    """The folder of a shipped model or organism.

    Args:
        name: one of :func:`names` or :func:`organisms`.

    Raises:
        KeyError: for a name that is none of them.
    """
    if name not in _folders():
        known = ", ".join([*names(), *organisms()])
        raise KeyError(f"no shipped model {name!r}: the models are {known}")
    return _HERE / "models" / name


def card(name: str) -> str:
    """The card of a shipped model or organism, as Markdown.

    Args:
        name: one of :func:`names` or :func:`organisms`.

    Raises:
        KeyError: for a name that is none of them.
    """
    return (path(name) / "README.md").read_text(encoding="utf-8")


def passage(name: str = "mamba1-english") -> str:
    """A short text for a shipped model, in which something told at the start is asked at the end.

    Both end right before the value that is asked for. The English passage tells codes, goes on with lines of
    Persuasion (public domain), which the models never saw, and asks for one; the recall passage is in the words
    of that task.

    Args:
        name: one of :func:`names`; the default suits every English model.
    """
    kind = "recall" if name.endswith("-recall") else "english"
    return (_HERE / "passages" / f"{kind}.txt").read_text(encoding="utf-8").rstrip("\n")
