"""The shipped models: small trained Mamba and Mamba-2 language models with their cards.

``names()`` lists them, ``path(name)`` is a transformers folder, ``card(name)`` its model card, and
``passage(name)`` a text to look at. ``python -m ssmlens.zoo.train NAME --text DIR`` trains one again.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["card", "names", "passage", "path"]

_HERE = Path(__file__).parent
_ORDER = ("mamba1-english", "mamba2-english", "mamba1-recall", "mamba2-recall")


def names() -> list[str]:
    """The names of the shipped models."""
    found = {p.parent.name for p in (_HERE / "models").glob("*/config.json")}
    return [n for n in _ORDER if n in found] + sorted(found.difference(_ORDER))


def path(name: str) -> Path:
    """The transformers folder of a shipped model.

    Args:
        name: one of :func:`names`.

    Raises:
        KeyError: for a name that is none of them.
    """
    if name not in names():
        raise KeyError(f"no shipped model {name!r}: the models are {', '.join(names())}")
    return _HERE / "models" / name


def card(name: str) -> str:
    """The model card of a shipped model, as Markdown.

    Args:
        name: one of :func:`names`.

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
