"""``ssmlens capacity memory | processing | load``: a model driven by random inputs, and the law of its storage."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from ssmlens.cli import options as o
from ssmlens.cli import output, studies
from ssmlens.cli.capacity_output import assumptions, emit, rows_of, save
from ssmlens.cli.studies import sentences
from ssmlens.cli.studies import whole_numbers as numbers

if TYPE_CHECKING:
    from ssmlens.analyses._result import Result
    from ssmlens.lens import Lens

__all__ = ["bits", "load", "memory", "processing"]

Layer = Annotated[int | None, typer.Option(help="Layer; by default the last one with a recurrence.")]
Lags = Annotated[str, typer.Option(metavar="N,N,...", help="Largest lag of degree 1, 2, 3...")]
Samples = Annotated[int, typer.Option(help="Random inputs that drive the model.")]
Features = Annotated[int, typer.Option(help="Random directions of the state that are read.")]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]


def memory(
    model: o.Model = o.DEFAULT_MODEL,
    layer: Layer = None,
    lags: Annotated[int, typer.Option(help="Largest lag.")] = 100,
    noise: Annotated[float, typer.Option(help="Noise on the features, as a share of their variance.")] = 0.0,
    samples: Samples = 6000,
    features: Features = 256,
    frozen: Annotated[bool, typer.Option(help="Hold dt, B and C of the layer at their means.")] = False,
    seed: Seed = 0,
    out: studies.Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Linear memory capacity of a layer's state for random inputs along the embeddings' first component."""
    studies.check_out(out)
    from ssmlens.analyses import capacity as study

    lens = o.open_lens(model, dtype, device)
    layer = o.ssm_layer(lens, layer)
    with sentences():
        states, inputs = study.drive(lens, layer, samples, features=features, frozen=frozen, seed=seed)
        result = _named(study.memory_capacity(states, inputs, lags, noise=noise, seed=seed), lens, layer, frozen)
    save(result, out, "memory_capacity")
    about = {"model": lens.name, "layer": layer, "samples": samples, "total": float(result.value.sum())}
    about |= {k: float(result.columns[k].reshape(-1)[0]) for k in ("total_held_out", "total_low", "total_high")}
    if json:
        emit(result, about, out, True, {}, "", "")
        return
    shown = [0, 1, 2, 3, 4, 5, *(k for k in (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256) if k <= lags)]
    frame = result.table().set_index("lag").loc[[k for k in shown if k <= lags]].reset_index()
    print(
        f"{lens.name} layer {layer}: MC {about['total']:.3g} of at most {float(result.control['rank']):.0f}, held out "
        f"{about['total_held_out']:.3g} (95 %: {about['total_low']:.3g} to {about['total_high']:.3g}); noise {noise:g}"
    )
    names = {"lag": "lag", "memory_capacity": "MC", "held_out": "held out", "low": "low", "high": "high"}
    names |= {"information": "nats", "chance": "chance", "shuffled": "shuffled"}
    output.print_table(list(names.values()), rows_of(frame, names), left=())
    assumptions(result, out)


def processing(
    model: o.Model = o.DEFAULT_MODEL,
    layer: Layer = None,
    lags: Lags = "50,15,8",
    samples: Samples = 6000,
    features: Features = 128,
    seed: Seed = 0,
    out: studies.Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Information processing capacity by degree, with the layer's own gates and with frozen ones (selectivity tax)."""
    studies.check_out(out)
    most = numbers(lags, "--lags") or []
    from ssmlens.analyses import capacity as study

    lens = o.open_lens(model, dtype, device)
    layer = o.ssm_layer(lens, layer)
    with sentences():
        states, inputs = study.drive(lens, layer, samples, features=features, seed=seed)
        held, _ = study.drive(lens, layer, samples, features=features, frozen=True, seed=seed)
        result = _named(study.selectivity_tax(states, held, inputs, lags=most), lens, layer, False)
    save(result, out, "processing")
    about = {"model": lens.name, "layer": layer, "samples": samples}
    names = {"degree": "degree", "selective": "selective", "frozen": "gates frozen", "selectivity_tax": "tax"}
    names |= {"selective_total": "total", "frozen_total": "total frozen", "rank": "at most"}
    legend = "capacity by degree of the function of past inputs; tax: what frozen gates have more of"
    emit(result, about, out, json, names, f"layer {layer}, {samples} random inputs", legend)


def load(
    d_state: Annotated[int, typer.Option(help="State size n of a head.")] = 16,
    channels: Annotated[int, typer.Option(help="Channels p of a head.")] = 64,
    vocabulary: Annotated[int, typer.Option(help="Values to choose from.")] = 1024,
    pairs: Annotated[str | None, typer.Option(metavar="N,N,...", help="Loads; default: 1/8 to 4 K*.")] = None,
    decay: Annotated[float, typer.Option(help="Of the state per pair.")] = 1.0,
    age: Annotated[int, typer.Option(help="Pairs written after the one asked for.")] = 0,
    simulate: Annotated[int, typer.Option(help="Trials of a simulation; 0 for none.")] = 2000,
    seed: Seed = 0,
    out: studies.Out = None,
    json: o.Json = False,
) -> None:
    """Hebbian load law: pairs that a head recalls when it holds them as a plain sum of outer products."""
    studies.check_out(out)
    loads = numbers(pairs, "--pairs")
    from ssmlens.analyses import capacity as study

    with sentences():
        result = study.hebbian_load(
            d_state, channels, vocabulary, loads, decay=decay, age=age, simulate=simulate, seed=seed
        )
    save(result, out, "hebbian_load")
    names = {"pairs": "pairs", "load": "of K*", "recall_accuracy": "predicted", "simulated": "simulated"}
    names |= {"low": "low", "high": "high", "chance": "chance"}
    half = float(result.columns["half_load"])
    about = {"d_state": d_state, "channels": channels, "vocabulary": vocabulary, "half_load": half}
    emit(result, about, out, json, names, f"K* = {half:.4g} pairs", "low to high: 95 % of the simulation")


def bits(
    model: o.Model = "organism-copy",
    lengths: Annotated[str, typer.Option(metavar="N,N,...", help="Symbols of a string.")] = "2,4,8,12,16,20,24,32",
    symbols: Annotated[int, typer.Option(help="Different symbols.")] = 16,
    trials: Annotated[int, typer.Option(help="Random strings of each length.")] = 200,
    level: Annotated[float, typer.Option(help="Share of whole strings that counts as copied.")] = 0.9,
    seed: Seed = 0,
    out: studies.Out = None,
    dtype: o.Dtype = "float32",
    device: o.Device = "cpu",
    json: o.Json = False,
) -> None:
    """Bits that a copying model holds: the longest random string it copies whole, against the bits of its state."""
    studies.check_out(out)
    wanted = numbers(lengths, "--lengths") or []
    from ssmlens.analyses import capacity as study

    lens = o.open_lens(model, dtype, device)
    with sentences(), output.progress(json) as step:
        result = study.copied_bits(
            lens, wanted, symbols, trials=trials, level=level, seed=seed,
            progress=lambda done, total: step("copying strings", done, total),
        )  # fmt: skip
    save(result, out, "copied_bits")
    names = {"length": "symbols", "copy_accuracy": "whole", "low": "low", "high": "high", "each": "each symbol"}
    names |= {"chance": "chance", "bound": "bound"}
    keys = ("effective_length", "effective_bits", "effective_bits_low", "effective_bits_high", "efficiency")
    found = {k: float(result.columns[k].reshape(-1)[0]) for k in keys}
    held = result.settings["elements"] * result.settings["bits"]
    head = (
        f"{found['effective_bits']:.4g} bits ({found['effective_bits_low']:.4g} to {found['effective_bits_high']:.4g})"
    )
    head += f" of {held} that the state has, {found['effective_length']:.3g} symbols at {level:.0%}"
    emit(result, {"model": lens.name, **found}, out, json, names, head, "bound: the most that so many bits allow")


def _named(result: Result, lens: Lens, layer: int, frozen: bool) -> Result:
    about = {"model": f"{lens.name}, layer {layer}{', gates frozen' if frozen else ''}"}
    return replace(result, settings={**result.settings, **about, "layer": layer, "fingerprint": lens.fingerprint})
