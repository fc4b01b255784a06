"""What a study will do, in a sentence, before it is started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmlens.apps.measure.options import Text, listed, shortened

__all__ = ["capacity", "lyapunov", "memory", "precision"]


def memory(settings: Mapping[str, Any], text: Text) -> str:
    """Of `memory.effective_remembrance`."""
    powers = [2**i for i in range(text.tokens.bit_length()) if 2**i < text.tokens]
    kept = settings["kept"] or (*powers, text.tokens)
    runs = len({1, text.tokens, *kept})
    return (
        f"Reads the last {shortened(kept)} of {_what(settings, text)} and compares the predictions after them: "
        f"{runs} runs of the model."
    )


def lyapunov(settings: Mapping[str, Any], text: Text) -> str:
    """Of `lyapunov.stack`."""
    discard = settings["discard"]
    first = min(500, text.tokens // 4) if discard is None else discard
    return (
        f"Follows {settings['k']} directions of change, and as many from another start for comparison, through "
        f"{text.tokens} tokens in {settings['dtype']}: {first} to settle, {text.tokens - first} measured."
    )


def capacity(settings: Mapping[str, Any], text: Text) -> str:
    """Of `capacity.rank_floor`."""
    layers = settings["layer"] or text.layers
    cut = settings["token_cut"] or text.tokens // 2
    ranks = "about ten ranks" if settings["r_grid"] is None else _plural(len(settings["r_grid"]), "rank")
    ways = len(settings["readings"])
    return (
        f"Cuts the state before token {cut} in {_plural(len(layers), 'layer')} to {ranks}, one by one"
        f"{', in two ways' if ways == 2 else ''}, and reads the other {text.tokens - cut} tokens of "
        f"{_what(settings, text)} after each cut."
    )


def precision(settings: Mapping[str, Any], text: Text) -> str:
    """Of `precision.divergence`."""
    formats, variants = settings["dtypes"], len(settings["variants"])
    side = f"{variants} rounded runs" if variants > 1 else "one rounded run"
    return (
        f"Steps through {text.tokens} tokens one by one, {side} beside the exact one, for {listed(formats)}: "
        f"{len(formats) * text.tokens} steps."
    )


def _what(settings: Mapping[str, Any], text: Text) -> str:
    count = settings["stretches"]
    return f"{text.tokens} tokens" if count == 1 else f"{count} stretches of {text.tokens} tokens each"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
