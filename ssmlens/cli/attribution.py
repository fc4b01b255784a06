"""``ssmlens attribute`` and ``ssmlens faithfulness``: which tokens a prediction rests on, and which method to trust."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmlens.cli import options as o
from ssmlens.cli import output
from ssmlens.errors import PromptError, SsmlensError

if TYPE_CHECKING:
    from ssmlens.attribution import Attribution
    from ssmlens.attribution._benchmark import Benchmark, Case
    from ssmlens.lens import Lens

__all__ = ["attribute", "faithfulness"]

FIGURES = (".png", ".svg", ".pdf")
FILES = (*FIGURES, ".html", ".csv", ".parquet", ".json", ".safetensors")
TABLES = (".csv", ".json", ".parquet", ".md")


def attribute(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    method: Annotated[str, typer.Option(help="Name of a method; an unknown one lists them all.")] = "decompose",
    target: Annotated[
        str | None, typer.Option(help="Token id, or a text that is one token; by default the model's top token.")
    ] = None,
    position: Annotated[int, typer.Option(help="Token at which the logit is read; -1 is the last.")] = -1,
    out: Annotated[
        Path | None, typer.Option(help="Write a .png, .svg, .pdf, .html, .csv, .parquet, .json or .safetensors file.")
    ] = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Attribute one prediction to the tokens of the prompt, with the error of the sum beside it."""
    output.check_target(out, FILES)
    from ssmlens.attribution._methods import attribute as run
    from ssmlens.attribution._methods import one_method

    one_method(method)
    prompt = o.prompt(model, text, file, ids)
    lens = o.open_lens(model, dtype, device)
    wanted = int(target) if target is not None and target.lstrip("-").isdigit() else target
    found = run(lens, prompt, method, wanted, position)
    if out is not None:
        _write(found, out, lens)
    if json:
        output.print_json(_plain(found, lens, out))
    elif out is not None:
        print(f"wrote {out}")
    else:
        _print(found, lens)


def _write(found: Attribution, out: Path, lens: Lens) -> None:
    suffix = out.suffix.lower()
    if suffix in (".json", ".safetensors", ".csv", ".parquet"):
        with output.whole(out) as part:
            if suffix in (".json", ".safetensors"):
                found.save(part)
            elif suffix == ".csv":
                found.table().to_csv(part, index=False)
            else:
                found.table().to_parquet(part)
        return
    from ssmlens import plotting

    if suffix == ".html":
        from ssmlens.plotting import pages

        pages.save(pages.attribution(found, _name(lens, int(found.target[0]))), out)
    else:
        plotting.save(plotting.attribution(found, _name(lens, int(found.target[0]))), out)


def _plain(found: Attribution, lens: Lens, out: Path | None) -> dict[str, Any]:
    error = float(found.completeness_error[0])
    return {
        "model": lens.name,
        "method": found.method,
        "target": int(found.target[0]),
        "target_token": _name(lens, int(found.target[0])),
        "position": int(found.position[0]),
        "logit": float(found.logit[0]),
        "bias": float(found.bias[0]),
        "completeness_error": None if error != error else error,
        "tokens": found.tokens[0],
        "scores": found.scores[0].double().tolist(),
        "settings": {k: v for k, v in found.settings.items() if isinstance(v, str | int | float | bool | None)},
        "out": None if out is None else str(out),
    }


def _print(found: Attribution, lens: Lens) -> None:
    from ssmlens.plotting.labels import visible

    error = float(found.completeness_error[0])
    promise = "no promise about the sum" if error != error else f"completeness error {error:.1e}"
    name = visible(_name(lens, int(found.target[0])))
    print(f"{lens.name}: {found.method} of the logit of {name!r} ({float(found.logit[0]):.3f}; {promise})")
    scores, tokens = found.scores[0].double(), found.tokens[0]
    largest = max(1e-300, float(scores.abs().max()))
    for k, token in enumerate(tokens):
        bar = "#" * round(30 * abs(float(scores[k])) / largest)
        print(f"{k:5d}  {visible(token):<16.16}  {float(scores[k]):+11.4f}  {bar}")
    if float(found.bias[0]):
        print(f"       {'bias':<16}  {float(found.bias[0]):+11.4f}")


def _name(lens: Lens, token: int) -> str:
    return str(token) if lens.tokenizer is None else str(lens.tokenizer.decode([token]))


def faithfulness(
    model: o.Model = o.DEFAULT_MODEL,
    methods: Annotated[str, typer.Option(help="Names separated by commas, or all.")] = "all",
    prompts: Annotated[
        Path | None,
        typer.Option(help="A text file with one prompt a line; by default the shipped model's held-out prompts."),
    ] = None,
    count: Annotated[int | None, typer.Option(help="How many prompts; by default 120, or all of a file.")] = None,
    baselines: Annotated[
        str, typer.Option(help="What stands in for a token taken away: zero, mean, drop; separated by commas.")
    ] = "zero,drop",
    metrics: Annotated[str, typer.Option(help="Metrics separated by commas; none scores known sources only.")] = (
        "flip,insertion,comprehensiveness,sufficiency"
    ),
    points: Annotated[int, typer.Option(help="Points of a deletion or insertion curve.")] = 10,
    random_orders: Annotated[int, typer.Option(help="Random orders per prompt, for the control.")] = 20,
    samples: Annotated[
        int | None, typer.Option(help="Steps of integrated gradients, samples of SmoothGrad and GradientSHAP.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random orders.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the table as .csv, .json, .parquet or .md.")] = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Compare attribution methods on many prompts, next to random orders and the recency order."""
    output.check_target(out, TABLES)
    from ssmlens.attribution._benchmark import compare
    from ssmlens.attribution._methods import chosen_methods

    names = chosen_methods(_split(methods))
    lens = o.open_lens(model, dtype, device)
    cases = _cases(lens, model, prompts, count)
    show = _progress if sys.stderr.isatty() else None
    found = compare(
        lens,
        cases,
        names,
        _split(baselines),
        [] if metrics == "none" else _split(metrics),
        points=points,
        random_orders=random_orders,
        samples=samples,
        seed=seed,
        progress=show,
    )
    if out is not None:
        with output.whole(out) as part:
            found.save(part)
    if json:
        rows = [{str(k): None if v != v else v for k, v in row.items()} for row in found.table().to_dict("records")]
        output.print_json({"settings": found.settings, "seconds": found.seconds, "rows": rows})
        return
    print(_readable(found))
    if out is not None:
        print(f"wrote {out}")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _cases(lens: Lens, model: str, prompts: Path | None, count: int | None) -> list[Case]:
    from ssmlens import zoo
    from ssmlens.attribution._benchmark import Case
    from ssmlens.prompt import prepare
    from ssmlens.zoo.questions import questions

    if prompts is not None:
        lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise PromptError(f"{prompts} holds no prompt: one text a line")
        if count is not None and not 1 <= count <= len(lines):
            raise PromptError(f"--count is 1 to {len(lines)}, the lines of {prompts}, got {count}")
        batch = prepare(lines[:count], lens.tokenizer, lens.vocab_size)
        return [Case(row[:n]) for row, n in zip(batch.ids.tolist(), batch.lengths.tolist())]
    if model not in zoo.names():
        raise PromptError(f"{model} has no shipped prompts: give --prompts FILE, or one of {', '.join(zoo.names())}")
    try:
        return [Case(q.ids, q.target, q.source) for q in questions(model, 120 if count is None else count)]
    except ValueError as error:
        raise SsmlensError(f"--{error}") from None


def _progress(done: int, total: int) -> None:
    print(f"\r{done} of {total} prompts", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _readable(found: Benchmark) -> str:
    """The table as text, in columns."""
    lines = found.cells()
    head = lines[0]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    s = found.settings
    title = (
        f"{s['model']}: {s['prompts']} prompts, {s['output']}, {s['random_orders']} random orders, mean [95 % interval]"
    )
    return "\n".join([title, *["  ".join(x.ljust(w) for x, w in zip(line, widths)).rstrip() for line in lines]])
