"""What the page says about the run itself: the opening sentence, the key facts, settings and how to repeat it."""

from __future__ import annotations

import shlex
from html import escape

from ssmlens import zoo
from ssmlens.plotting.labels import apart, plain, visible
from ssmlens.report.numbers import REDUCTIONS, Numbers

__all__ = ["FAMILIES", "badge", "facts", "footer", "lead", "settings"]

FAMILIES = {"mamba1": "Mamba-1", "mamba2": "Mamba-2"}
_SHORT_TEXT = 400
_SHORT_IDS = 100


def lead(numbers: Numbers) -> str:
    """One sentence: what ran over what."""
    families = sorted({FAMILIES.get(x.family, x.family) for x in numbers.layers})
    shown = "" if len(numbers.layers) == numbers.n_layers else f" of {numbers.n_layers}"
    return (
        f"One forward pass over {_count(len(numbers.tokens), 'token')}: what its {len(numbers.layers)}{shown} "
        f"{escape(' and '.join(families))} {'layer' if len(numbers.layers) == 1 else 'layers'} wrote into their "
        "states, kept, and read back; each figure rests on numbers that were checked against the model itself."
    )


def facts(numbers: Numbers) -> str:
    """The row of key facts, with the verdict on the reconstruction."""
    sizes = {(x.n_heads, x.head_dim, x.d_state) for x in numbers.layers}
    h, p, n = max(sizes)
    state = f"{h} heads × {p} × {n}" if len(sizes) == 1 else f"up to {h} heads × {p} × {n}"
    best = numbers.predictions[0]
    pairs = [
        ("Tokens", str(len(numbers.tokens))),
        ("State per layer", state),
        ("Computed in", escape(str(numbers.settings.get("dtype", "")))),
        ("Next token", f'<span class="mono">{escape(visible(best.text))}</span> {best.probability:.0%}'),
    ]
    verdict = badge(numbers.verified, "verified", "not verified")
    words = f"{numbers.worst_error:.1e} {verdict}"
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs)
    return cells + f'<div class="wide"><dt>Largest reconstruction error</dt><dd>{words}</dd></div>'


def footer(numbers: Numbers) -> str:
    """The colophon."""
    return (
        "Made by ssmlens. This page is one file: it loads nothing and sends nothing. Implicit attention follows Ali, "
        "Zimerman and Wolf, “The Hidden Attention of Mamba Models” (ACL 2025), with the step size of the source "
        "included."
    )


def settings(numbers: Numbers) -> str:
    """The section with every setting, and the code and command that give the numbers again."""
    flat: list[tuple[str, str]] = []
    for key, value in numbers.settings.items():
        if isinstance(value, dict):
            flat += [(f"{key}: {k}", str(v)) for k, v in value.items()]
        else:
            flat.append((key.replace("_", " "), str(value)))
    rows = "".join(f'<tr><td>{escape(k)}</td><td class="left">{escape(plain(v))}</td></tr>' for k, v in flat)
    model = str(numbers.settings["model"])
    words = ["ssmlens report --model", shlex.quote(plain(model)), _prompt(numbers), "--out report.html"]
    command = " ".join(word for word in words if word)
    code = (
        f"import ssmlens\nlens = ssmlens.load({model!r})\ntrace = lens.trace(text).check()\n"
        f"trace[{numbers.layers[0].layer}].recurrence.attention.reduce({REDUCTIONS[0]!r})   # (b, t, s)"
    )
    return (
        '<section id="settings"><h2>Settings and versions</h2><div class="panel two"><table><tbody>'
        f"{rows}</tbody></table><div><h3>The same numbers in Python</h3><pre>{escape(code)}</pre>"
        f"<h3>The same page again</h3><pre>{escape(command)}</pre></div></div></section>"
    )


def _prompt(numbers: Numbers) -> str:
    """The option that gives this text again: none for a model's own passage, else the text or its ids."""
    text, model = "".join(numbers.tokens), numbers.settings["model"]
    if model in zoo.names() and text == zoo.passage(model):
        return ""
    spelled = plain(text) == text and "\ufffd" not in text and not apart(numbers.tokens)
    if spelled and len(text) <= _SHORT_TEXT:
        return f"--text {shlex.quote(text)}"
    if len(numbers.ids) <= _SHORT_IDS:
        return f"--ids {','.join(map(str, numbers.ids))}"
    return "--file text.txt"


def badge(good: bool, yes: str, no: str) -> str:
    """A verdict in a mark, a word and a colour."""
    return f'<span class="badge good">✓ {yes}</span>' if good else f'<span class="badge bad">✗ {no}</span>'


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
