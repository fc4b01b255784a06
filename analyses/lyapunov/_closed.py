"""Level 3: the model fed with its own output, as a smooth map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._result import Result
from ssmlens.analyses.lyapunov import _benettin as benettin
from ssmlens.analyses.lyapunov._checkpoint import digest
from ssmlens.analyses.lyapunov._model import NO_CACHE, FrozenGates, Model
from ssmlens.analyses.lyapunov._spectrum import spectrum
from ssmlens.analyses.lyapunov._statistics import BLOCKS, block_means, bootstrap
from ssmlens.analyses.lyapunov._tangent import carried, load_forward_mode
from ssmlens.errors import PromptError, SsmlensError
from ssmlens.lens import Lens

__all__ = ["TEMPERATURES", "closed_loop"]

TEMPERATURES = (0.5, 1.0, 2.0)


def closed_loop(
    source: Lens | Callable[..., Any],
    state: Any,
    steps: int = 500,
    k: int = 4,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    discard: int = 100,
    every: int = 5,
    dtype: torch.dtype = torch.float64,
    control: bool = True,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Result:
    """Lyapunov exponents of generation, with the output fed back as the next input.

    The derivative through a drawn token is 0 or undefined. A language model is therefore closed smoothly: its next
    input is the expectation of the next token's embedding, sum_v softmax(logits / temperature)_v E_v. Low
    temperatures come near to greedy decoding, whose derivative is 0 almost everywhere; high ones wash the feedback
    out. Read the exponents as a curve over the temperature, and `divergence` for drawn tokens.

    A forecaster with a continuous output needs no such device: pass its closed map, and this is `spectrum`.

    Args:
        source: a lens, or a map from (state, output) to itself.
        state: the text that a lens reads first (the last token starts the loop); the first state of a map.
        steps: measured steps.
        k: exponents.
        temperatures: of the softmax, above 0; for a lens alone.
        discard: steps before the measurement.
        every: steps between two re-orthonormalisations; for a lens.
        dtype: of a lens's model.
        control: also follow a second frame of tangents.
        seed: of the tangents.
        resume: a file that keeps the run; one per temperature, with the temperature in its name.
        progress: called with the steps done and the steps there are.
        **options: of `spectrum`, for a map.

    Returns:
        For a lens value (temperature, exponent) in nats per token, with ``standard_error``, ``low``, ``high`` (95 %,
        bootstrap of 20 blocks), and the controls ``frozen_gates``: the exponents that the same orbit's frozen gates
        would have, ``other_start``, and ``distinct``: how many different tokens were the likeliest one during the
        measured steps (1: the loop has come to rest). For a map as `spectrum`.

    Raises:
        SsmlensError: for temperatures that are not above 0, or an orbit that diverges.
    """
    if not isinstance(source, Lens):
        if not callable(source):
            raise SsmlensError(f"closed_loop takes a lens or a map, not {type(source).__name__}")
        return spectrum(
            source, state, steps, k, discard=discard, every=every, control=control, seed=seed,
            resume=resume, progress=progress, **options,
        )  # fmt: skip
    if options:
        raise TypeError(f"closed_loop of a lens takes no {', '.join(options)}")
    warm = [float(x) for x in temperatures]
    if not warm or not all(0 < x < float("inf") for x in warm) or len(set(warm)) < len(warm):
        raise SsmlensError("temperatures are different numbers above 0, at least one")
    load_forward_mode()
    model = Model.of(source, state, dtype)
    if model.length < 2:
        raise PromptError("the loop needs a text of two tokens at least")
    plan = benettin.Plan(k=k, discard=discard, steps=steps, every=every, seed=seed, control=control)
    start = _start(model)
    settings = {"study": "closed_loop", **model.settings(), "ids": digest(model.ids)}
    rows = []
    for number, temperature in enumerate(warm):

        def step_done(done: int, total: int, number: int = number) -> None:
            if progress is not None:
                progress(number * total + done, len(warm) * total)

        path = None if resume is None else _named(Path(resume), temperature)
        rows.append(_one(model, start, temperature, plan, settings, path, step_done))
    return _result(rows, warm, plan, settings)


def _one(
    model: Model,
    start: Tensor,
    temperature: float,
    plan: benettin.Plan,
    settings: dict[str, Any],
    resume: Path | None,
    progress: Callable[[int, int], None],
) -> dict[str, Tensor]:
    def advance(flat: Tensor, tangents: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        def ahead(x: Tensor) -> Tensor:
            for _ in range(count):
                x, _ = _loop(model, x, temperature)
            return x

        with torch.no_grad():
            return carried(ahead, flat, tangents)

    about = {**settings, "temperature": temperature}
    growth = benettin.run(benettin.Pushed(advance), start, plan, about, resume, progress)
    exponents = growth.logs.sum(0) / growth.lengths.sum()
    order = exponents.argsort(descending=True, stable=True)
    error, low, high = bootstrap(block_means(growth.logs, growth.lengths))
    frozen, distinct = _frozen(model, start, temperature, plan)
    row = {"value": exponents[order], "standard_error": error[order], "low": low[order], "high": high[order]}
    row["vanished"] = growth.vanished[order]
    row |= {"frozen_gates": frozen, "distinct": torch.full((plan.k,), float(distinct), dtype=torch.float64)}
    if growth.other is not None:
        row["other_start"] = growth.other.sort(descending=True).values
    return row


def _start(model: Model) -> Tensor:
    """The flat state after all but the last token, and that token's vector behind it, (n + d,)."""
    with torch.no_grad():
        state, _ = model.net.run(model.net.initial(), model.ids[:, :-1], logits="none")
        return torch.cat([state.flatten()[0], model.net.embed(model.ids[0, -1])])


def _split(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Flat state (1, n) and input vector (1, d)."""
    size = model.like.size
    return x[None, :size], x[None, size:]


def _loop(model: Model, x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """State and vector (n + d,) one step later, and the logits (1, v) in between."""
    flat, vector = _split(model, x)
    after, logits = model.net.step_vectors(model.like.unflatten(flat), vector)
    expected = torch.softmax(logits / temperature, dim=-1).to(vector.dtype) @ model.net.embedding
    return torch.cat([after.flatten(), expected], dim=1)[0], logits


def _frozen(model: Model, start: Tensor, temperature: float, plan: benettin.Plan) -> tuple[Tensor, int]:
    """Exponents of the frozen gates along the measured orbit, and how many tokens were the likeliest of a step."""
    gates, seen, x = FrozenGates(), set(), start
    with torch.no_grad():
        for t in range(plan.discard + plan.steps):
            before = x
            x, logits = _loop(model, x, temperature)
            if t >= plan.discard:
                flat, vector = _split(model, before)
                gates.add(model.net.scans(model.like.unflatten(flat), vector[:, None]))
                seen.add(int(logits.argmax()))
    return gates.largest(plan.k), len(seen)


def _named(path: Path, temperature: float) -> Path:
    return path.with_name(f"{path.name}.temperature-{temperature:g}")


def _result(
    rows: list[dict[str, Tensor]], temperatures: list[float], plan: benettin.Plan, settings: dict[str, Any]
) -> Result:
    together = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    controls = ("frozen_gates", "other_start", "distinct")
    return Result(
        name="lyapunov_closed_loop",
        value=together.pop("value"),
        dims=("temperature", "exponent"),
        units="nats/token",
        coords={"temperature": temperatures, "exponent": list(range(1, plan.k + 1))},
        columns={name: x for name, x in together.items() if name not in controls},
        control={name: x for name, x in together.items() if name in controls},
        settings={
            **settings,
            **vars(plan),
            "interval": f"95 %, bootstrap of {BLOCKS} blocks of time",
        },
        assumes=(
            "the input is the expected embedding, which the model never saw in training: this loop is smooth, and "
            "sampling is not",
            "the orbit has settled; one that came to rest or into a cycle has the exponents of that cycle",
            NO_CACHE,
        ),
        checked_by="a closed map's spectrum and difference quotients: tests/analyses/lyapunov/test_closed.py",
    )
