"""``ssmlens trace`` and ``ssmlens verify``: one forward pass, and whether it was rebuilt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmlens.cli import options as o
from ssmlens.cli import output
from ssmlens.errors import SsmlensError

if TYPE_CHECKING:
    from ssmlens.trace import Trace

__all__ = ["trace", "verify"]

_TOP = 5


def trace(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    layer: Annotated[list[int] | None, typer.Option(help="Trace only this layer; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Save the trace as one .safetensors file.")] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Save the mixers' weights with it.")] = False,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Run the model once; print its layers, its next tokens and the reconstruction errors."""
    output.check_target(out, (".safetensors",))
    prompt = o.prompt(model, text, file, ids)
    lens = o.open_lens(model, dtype, device)
    found = lens.trace(prompt, layers=layer)
    if out is not None:
        found.save(out, weights=weights)
    best = _next_tokens(found, lens.tokenizer)
    if json:
        output.print_json(_summary(found) | {"next": best, "out": None if out is None else str(out)})
        return
    print(f"{found.settings['model']}: {found.ids.shape[1]} tokens, {found.settings['dtype']}")
    _print_layers(found)
    print("next token: " + ", ".join(f"{x['token']!r} {x['probability']:.1%}" for x in best))
    if out is not None:
        print(f"wrote {out}")


def verify(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest error that passes; by default that of the dtype.")
    ] = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> int:
    """Compare every layer, rebuilt from its recurrence, with the model's own; exit 1 when one differs too much."""
    if tolerance is not None and not tolerance >= 0:
        raise SsmlensError(f"--tolerance is 0 or more, got {tolerance}")
    prompt = o.prompt(model, text, file, ids)
    found = o.open_lens(model, dtype, device).trace(prompt, scan="model")
    limit = found.tolerance if tolerance is None else tolerance
    good = all(error <= limit for error in found.reconstruction_error.values())
    if json:
        output.print_json(_summary(found) | {"tolerance": limit, "passed": good})
    else:
        print(f"{found.settings['model']}: {found.ids.shape[1]} tokens, {found.settings['dtype']}, scan by the model")
        _print_layers(found, limit)
        print(f"{'every layer within' if good else 'NOT every layer within'} the tolerance {limit:.0e}")
    return 0 if good else 1


def _print_layers(found: Trace, limit: float | None = None) -> None:
    head = ["layer", "family", "heads", "channels", "states", "reconstruction error", ""]
    rows = []
    for mixer in found:
        rec, error = mixer.recurrence, mixer.reconstruction_error
        verdict = "ok" if error <= (found.tolerance if limit is None else limit) else "FAIL"
        sizes = (rec.n_heads, rec.head_dim, rec.d_state)
        rows.append([mixer.layer, mixer.family, *sizes, f"{error:.2e}", verdict])
    output.print_table(head, rows, left=(1, 6))


def _summary(found: Trace) -> dict[str, Any]:
    layers = [
        {
            "layer": mixer.layer,
            "family": mixer.family,
            "heads": mixer.recurrence.n_heads,
            "head_dim": mixer.recurrence.head_dim,
            "d_state": mixer.recurrence.d_state,
            "reconstruction_error": mixer.reconstruction_error,
        }
        for mixer in found
    ]
    return {
        "model": found.settings["model"],
        "tokens": found.tokens[0],
        "ids": found.ids[0].tolist(),
        "layers": layers,
        "tolerance": found.tolerance,
        "settings": dict(found.settings),
    }


def _next_tokens(found: Trace, tokenizer: Any) -> list[dict[str, Any]]:
    from ssmlens.report.numbers import predictions

    decode = None if tokenizer is None else tokenizer.decode
    best = predictions(found, decode=decode, most=_TOP)
    return [{"id": p.id, "token": p.text, "probability": p.probability} for p in best]
