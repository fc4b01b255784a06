"""Token text as labels: whitespace made visible, nothing that a font or a markup language could trip over."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

__all__ = ["apart", "drawable", "label", "plain", "positions", "thin", "visible"]

EMPTY = "∅"
_SPACE = "·"
_NAMED = {" ": _SPACE, "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
_CONTROL_PICTURES = 0x2400
_STEPS = (1, 2, 5)


def visible(token: str) -> str:
    """The token with spaces, newlines and control characters as symbols; "∅" for the empty string.

    >>> visible(" the\\n")
    '·the↵'
    """
    return "".join(_visible(c) for c in token) or EMPTY


def apart(tokens: Sequence[str]) -> bool:
    """True where the tokens themselves hold no space, so that running text needs gaps to show where they end."""
    return len(tokens) > 1 and not any(c.isspace() for token in tokens for c in token)


def plain(text: str) -> str:
    """Running text: spaces and line breaks as they are, every other invisible character made visible."""
    return "".join(c if c in " \n" else _visible(c) for c in text)


def _visible(c: str) -> str:
    if c in _NAMED:
        return _NAMED[c]
    if ord(c) < 0x20:
        return chr(_CONTROL_PICTURES + ord(c))
    # Cc control, Cf format (bidirectional overrides, joiners), Cs surrogate, Co private, Cn unassigned,
    # Z* spaces.
    if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"):
        return f"\\u{ord(c):04x}"
    return c


def label(token: str, width: int = 12) -> str:
    """`visible` cut to ``width`` characters, the cut shown as "…"."""
    text = visible(token)
    return text if len(text) <= width else text[: width - 1] + "…"


@cache
def _known_characters() -> frozenset[int]:
    from matplotlib import font_manager, ft2font

    path = font_manager.findfont("DejaVu Sans Mono", fallback_to_default=True)
    return frozenset(ft2font.FT2Font(path).get_charmap())


def drawable(text: str) -> str:
    """``text`` with characters that matplotlib's own font lacks (emoji, CJK) written as their code points."""
    known = _known_characters()
    return "".join(c if ord(c) in known else f"\\u{ord(c):04x}" for c in text)


def thin(n: int, most: int) -> range:
    """Positions to label so that at most ``most`` of ``n`` are: every 1st, 2nd, 5th, 10th, 20th, ..."""
    if n <= 0:
        return range(0)
    scale = 1
    while True:
        for step in _STEPS:
            if -(-n // (step * scale)) <= max(most, 1):
                return range(0, n, step * scale)
        scale *= 10


def positions(tokens: Sequence[str] | None, n: int) -> list[str]:
    """One name per position: the token where there is one, else the number.

    Raises:
        ValueError: when the number of tokens is not ``n``.
    """
    if tokens is None:
        return [str(i) for i in range(n)]
    if len(tokens) != n:
        raise ValueError(f"{len(tokens)} tokens for {n} positions: give one token per position, or None")
    return list(tokens)
