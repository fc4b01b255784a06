"""``ssmlens lyapunov`` and its subcommands: how perturbations of a model's state grow or die, on four levels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmlens.cli import options as o
from ssmlens.cli import output, studies
from ssmlens.errors import SsmlensError

if TYPE_CHECKING:
    import torch

    from ssmlens.analyses._result import Result

__all__ = ["app"]

app = typer.Typer(help="How perturbations of a model's state grow or die: Lyapunov exponents on four levels.")

Dtype = Annotated[str, typer.Option(help="float64 or float32, of the model and of the perturbations.")]
Exponents = Annotated[int, typer.Option("--exponents", "-k", help="Exponents, the largest first.")]
Steps = Annotated[int | None, typer.Option(help="Tokens measured; by default the rest of the text.")]
Discard = Annotated[int | None, typer.Option(help="Tokens before, in which everything settles.")]
Every = Annotated[int, typer.Option(help="Tokens between two re-orthonormalisations.")]
Interval = Annotated[
    int | None, typer.Option("--every", help="Tokens between two re-orthonormalisations; by default 50 or fewer.")
]
Control = Annotated[bool, typer.Option(help="Also follow a second frame of perturbations, at twice the cost.")]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]


@app.callback(invoke_without_command=True)
def lyapunov(
    context: typer.Context,
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    k: Exponents = 4,
    steps: Annotated[int, typer.Option(help="Tokens that the model is fed with its own output.")] = 200,
    seed: Seed = 0,
    resume: studies.Resume = None,
    out: studies.Out = None,
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """All levels side by side, and what each says and does not say. About 100 core-seconds for 5 M parameters."""
    if context.invoked_subcommand is not None:
        studies.refuse_early(context)
        return
    studies.check_out(out)
    prompt = o.prompt(model, text, file, ids)
    lens = o.open_lens(model, "float32", device)
    from ssmlens.analyses import lyapunov as study

    with output.progress(json) as shown:
        budget = study.Budget(k=k, steps=steps)
        result = study.summary(lens, prompt, budget, seed=seed, resume=resume, progress=_seldom(shown))
    studies.save(result, out, "lyapunov", "summary")
    frame = result.table()[["level", "lyapunov", "low", "high", "control"]]
    rows: list[dict[Any, Any]] = frame.to_dict("records")
    if json:
        readings = {name: vars(reading) for name, reading in study.READING.items()}
        about = {k: result.settings[k] for k in ("tokens", "largest_gain", "parted", "rounding_parted")}
        studies.report(result, rows, out=out, json=True, head="", about=about | {"reading": readings})
        return
    print(f"{lens.name}: {result.settings['tokens']} tokens; rates in nats per token, with 95 % intervals")
    output.print_table(list(rows[0]), [list(row.values()) for row in rows])
    print(_LEGEND.format(**result.settings))
    for name, reading in study.READING.items():
        print(f"\n{name}: {reading.question}\n  says: {reading.says}\n  does not say: {reading.silent}")
    studies.wrote(out)


_LEGEND = """\
stack, closed: the largest exponent; control: the same with gates frozen. gain: log of the largest, {largest_gain:.3g}
within {largest_gain_horizon} tokens. divergence: slope of log KL; {parted:.0%} of {pairs} pairs parted after a
disturbance of {disturbance:g}, {rounding_parted:.0%} by rounding alone. No key-value cache: every layer is recurrent"""


@app.command()
def latent(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a stretch, for finite-time exponents.")] = None,
    out: studies.Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Exponents of each layer's states with the gates frozen: the mean of the log decay."""
    studies.check_out(out)
    prompt = o.prompt(model, text, file, ids)
    found = o.open_lens(model, dtype, device).trace(prompt).check()
    from ssmlens.analyses import lyapunov as study

    result = study.latent(found, window)
    studies.save(result, out, "lyapunov", "latent")
    frame, rows = result.table(), []
    for layer in result.coords["layer"]:
        part = frame[frame["layer"] == layer]
        value = part[result.name]
        quantiles = {name: float(value.quantile(q)) for name, q in (("90 %", 0.9), ("median", 0.5), ("10 %", 0.1))}
        spread = float(part["window_std"].median())
        rows.append(
            {"layer": int(layer), "largest": float(value.max()), **quantiles, "smallest": float(value.min())}
            | {"spread": spread}
        )
    head = (
        f"{found.settings['model']}: {len(found.tokens[0])} tokens; exponents in nats per token, over heads and states"
    )
    legend = (
        f"spread: of the exponents of stretches of {result.settings['window']} tokens, median over heads and states"
    )
    studies.report(result, rows, out=out, json=json, head=head, legend=_reading("latent", legend))


@app.command()
def stack(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    k: Exponents = 16,
    steps: Steps = None,
    discard: Discard = None,
    every: Interval = None,
    control: Control = True,
    seed: Seed = 0,
    resume: studies.Resume = None,
    out: studies.Out = None,
    dtype: Dtype = "float64",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Largest exponents of the whole model while its text is given, all layers and convolution windows."""
    studies.check_out(out)
    wide = _float(dtype)
    prompt = o.prompt(model, text, file, ids)
    lens = o.open_lens(model, "float32", device)
    from ssmlens.analyses import lyapunov as study

    with studies.step(json, "following perturbations") as step:
        result = study.stack(
            lens, prompt, k, steps=steps, discard=discard, every=every, dtype=wide, control=control, seed=seed,
            resume=resume, progress=_tenths(step),
        )  # fmt: skip
    studies.save(result, out, "lyapunov", "stack")
    names = {"exponent": "exponent", result.name: "nats/token", "low": "low", "high": "high", "vanished": "vanished"}
    names |= {"frozen_gates": "frozen gates", "other_start": "other start"}
    dimension = float(study.kaplan_yorke(result).value)
    legend = (
        "frozen gates: the same exponents with the gates frozen, their limit; other start: from other perturbations\n"
        f"Kaplan-Yorke dimension {dimension:g}"
    )
    head = f"{lens.name}: {result.settings['steps']} tokens after {result.settings['discard']}"
    studies.report(result, _rows(result, names), out=out, json=json, head=head, legend=_reading("stack", legend))


@app.command()
def gain(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    horizons: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens later.")] = "1,2,4,8,16,32",
    starts: Annotated[int, typer.Option(help="Tokens of the text that perturbations start from.")] = 4,
    seed: Seed = 0,
    resume: studies.Resume = None,
    out: studies.Out = None,
    dtype: Dtype = "float64",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """How much the most sensitive perturbation of the state has grown some tokens later."""
    studies.check_out(out)
    wide, later = _float(dtype), [_whole(x) for x in studies.numbers(horizons, "--horizons")]
    prompt = o.prompt(model, text, file, ids)
    lens = o.open_lens(model, "float32", device)
    from ssmlens.analyses import lyapunov as study

    with studies.step(json, "iterating") as step:
        result = study.transient_gain(
            lens, prompt, later, starts=starts, dtype=wide, seed=seed, resume=resume, progress=step
        )
    studies.save(result, out, "lyapunov", "gain")
    names = {"horizon": "tokens later", result.name: "gain", "median": "median", "smallest": "smallest"}
    names |= {"start": "at token", "change": "change"}
    legend = (
        f"gain: the largest over {len(result.settings['starts'])} starts, and where; change: in the last round\n"
        f"departure from normality of one step: {result.settings['henrici']:.3g} (Henrici)"
    )
    head = f"{lens.name}: {result.settings['tokens']} tokens, which are given; gain in the norm of the raw state"
    studies.report(result, _rows(result, names), out=out, json=json, head=head, legend=_reading("gain", legend))


@app.command()
def closed(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    k: Exponents = 4,
    steps: Annotated[int, typer.Option(help="Steps measured.")] = 500,
    discard: Annotated[int, typer.Option(help="Steps before, in which the loop settles.")] = 100,
    temperatures: Annotated[str, typer.Option(metavar="T,T,...", help="Of the softmax that is fed back.")] = "0.5,1,2",
    every: Every = 5,
    control: Control = True,
    seed: Seed = 0,
    resume: studies.Resume = None,
    out: studies.Out = None,
    dtype: Dtype = "float64",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Largest exponents of the model fed with its own expectation of the next token."""
    studies.check_out(out)
    wide, warm = _float(dtype), studies.numbers(temperatures, "--temperatures")
    prompt = o.prompt(model, text, file, ids)
    lens = o.open_lens(model, "float32", device)
    from ssmlens.analyses import lyapunov as study

    with studies.step(json, "generating") as step:
        result = study.closed_loop(
            lens, prompt, steps, k, temperatures=warm, discard=discard, every=every, dtype=wide, control=control,
            seed=seed, resume=resume, progress=_tenths(step),
        )  # fmt: skip
    studies.save(result, out, "lyapunov", "closed")
    names = {"temperature": "temperature", "exponent": "exponent", result.name: "nats/token", "low": "low"}
    names |= {"high": "high", "frozen_gates": "frozen gates", "other_start": "other start", "distinct": "distinct"}
    legend = (
        "frozen gates: exponents of the same orbit with its gates frozen; distinct: different likeliest tokens met\n"
        "positive: two nearby runs of this loop part exponentially"
    )
    head = f"{lens.name}: {steps} steps after {discard}, started by {result.settings['tokens']} tokens"
    studies.report(result, _rows(result, names), out=out, json=json, head=head, legend=_reading("closed", legend))


@app.command()
def divergence(
    model: o.Model = o.DEFAULT_MODEL,
    text: o.Text = None,
    file: o.File = None,
    ids: o.Ids = None,
    steps: Annotated[int, typer.Option(help="Tokens drawn.")] = 200,
    pairs: Annotated[int, typer.Option(help="Pairs of generations, each with its own chance.")] = 16,
    size: Annotated[float, typer.Option(help="Of the disturbance, as a share of each layer's state.")] = 0.01,
    temperature: Annotated[float, typer.Option(help="Of the draws.")] = 1.0,
    seed: Seed = 0,
    resume: studies.Resume = None,
    out: studies.Out = None,
    dtype: Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Whether two generations that share all chance draw the same tokens after a small disturbance."""
    studies.check_out(out)
    wide = _float(dtype)
    prompt = o.prompt(model, text, file, ids)
    lens = o.open_lens(model, "float32", device)
    from ssmlens.analyses import lyapunov as study

    with studies.step(json, "drawing", every=10) as step:
        result = study.divergence(
            lens, prompt, steps, pairs=pairs, size=size, temperature=temperature, dtype=wide, seed=seed,
            resume=resume, progress=step,
        )  # fmt: skip
    studies.save(result, out, "lyapunov", "divergence")
    names = {"step": "token", result.name: "differ", "low": "low", "high": "high", "parted": "parted", "kl": "KL"}
    names |= {"rounding": "rounding", "rounding_kl": "rounding KL"}
    rows = _rows(result, names)
    if not json:
        rows = [row for row in rows if row["token"] in {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, steps}]
    legend = (
        "differ: share of pairs with different tokens; parted: differed before; KL: of the next token, median, nats\n"
        f"rounding: the same of an undisturbed run row by row; slope of log KL {float(result.columns['rate']):.3g}"
    )
    head = f"{lens.name}: {pairs} pairs, state disturbed by {size:g} after {result.settings['tokens']} tokens"
    studies.report(result, rows, out=out, json=json, head=head, legend=_reading("divergence", legend))


def _rows(result: Result, names: dict[str, str]) -> list[dict[str, Any]]:
    """The result's table with these columns, renamed."""
    frame = result.table()
    whole = {"exponent", "horizon", "step", "start", "distinct"}
    rows = []
    for record in frame[[n for n in names if n in frame]].to_dict("records"):
        rows.append({names[str(n)]: int(x) if n in whole else float(x) for n, x in record.items()})
    return rows


def _reading(level: str, legend: str) -> str:
    from ssmlens.analyses.lyapunov import READING

    return f"{legend}\nsays: {READING[level].says}\ndoes not say: {READING[level].silent}"


def _float(dtype: str) -> torch.dtype:
    if dtype not in ("float64", "float32"):
        raise SsmlensError(f"--dtype is float64 or float32 here, got {dtype!r}")
    import torch

    found: torch.dtype = getattr(torch, dtype)
    return found


def _whole(x: float) -> int:
    if not x.is_integer() or x < 1:
        raise SsmlensError(f"--horizons takes whole numbers above 0, got {x:g}")
    return int(x)


def _tenths(step: Any) -> Any:
    """Progress told ten times: the runs call after every few tokens."""
    told = -1

    def call(done: int, total: int) -> None:
        nonlocal told
        if done * 10 // total != told:
            told = done * 10 // total
            step(done, total)

    return call


def _seldom(shown: Any) -> Any:
    calls: dict[str, Any] = {}

    def call(level: str, done: int, total: int) -> None:
        if level not in calls:
            calls[level] = _tenths(lambda d, t: shown(level, d, t))
        calls[level](done, total)

    return call
