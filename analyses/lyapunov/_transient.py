"""Level 2: transient gain of a model on a text, of a matrix, or of any map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmlens.analyses._ledger import Ledger
from ssmlens.analyses._result import Result
from ssmlens.analyses.lyapunov._checkpoint import digest
from ssmlens.analyses.lyapunov._gain import Section, largest_gain, squared_size
from ssmlens.analyses.lyapunov._model import NO_CACHE, Model, Prompt
from ssmlens.analyses.lyapunov._spectrum import Inputs, drive
from ssmlens.analyses.lyapunov._tangent import load_forward_mode, plain_step, widest
from ssmlens.errors import PromptError, SsmlensError
from ssmlens.lens import Lens

__all__ = ["HORIZONS", "transient_gain"]

HORIZONS = (1, 2, 4, 8, 16, 32, 64)
"""Steps over which the gain is taken by default."""

PROBES = 8
"""Random vectors behind the size of a model's Jacobian."""

Stretches = Callable[[int], tuple[Section, float]]
"""Number of the start to its section, and the sum of the squared eigenvalues of its first step (NaN: not known)."""


def transient_gain(
    source: Lens | Tensor | Callable[..., Any],
    state: Any = None,
    horizons: Sequence[int] = HORIZONS,
    *,
    starts: int = 8,
    discard: int | None = None,
    inputs: Inputs | None = None,
    dtype: torch.dtype = torch.float64,
    iterations: int = 40,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """G(tau): by how much the most sensitive perturbation has grown tau steps later, in the norm of the raw state.

    Negative exponents say that perturbations die in the end; a product of contracting but non-normal maps may still
    enlarge them first, in a deep model from layer to layer. Exponents cannot show it, G does.

    Args:
        source: a lens (the whole model while its text is given), a square matrix (x -> M x), or a map.
        state: the text of a lens; the first state of a map's orbit; not used for a matrix.
        horizons: the steps tau.
        starts: times of the orbit that perturbations start from, evenly spread; 1 for a matrix.
        discard: steps before the first start; by default an eighth of a text or 0.
        inputs: what drives a map, as for `spectrum`.
        dtype: of a lens's model.
        iterations: most rounds of the power iteration for a horizon.
        seed: of its first vectors.
        resume: a file that keeps the finished horizons.
        progress: called with the parts done and the parts there are.

    Returns:
        Value (horizon,): the largest G(tau) over the starts, a lower bound up to ``change``, the relative change in
        the iteration's last round. Columns ``median`` and ``smallest`` over the starts, ``start``: the step that the
        largest began at. ``settings["non_normality"]`` is the largest value of all, and ``settings["henrici"]``
        Henrici's departure of one step from normality, the mean over the starts (estimated for a lens, absent for
        maps). The control ``spectral`` is the gain of a normal map with the same eigenvalues (matrices only).

    Raises:
        SsmlensError: for horizons that do not fit into the text or the inputs.
    """
    horizons = sorted({int(h) for h in horizons})
    if not horizons or horizons[0] < 1:
        raise SsmlensError("horizons are whole numbers above 0, at least one")
    if starts < 1 or iterations < 2:
        raise SsmlensError(f"starts is at least 1 and iterations at least 2, got {starts} and {iterations}")
    load_forward_mode()
    if isinstance(source, Lens):
        at, stretch, settings, assumes = _of_lens(source, state, horizons[-1], starts, discard, dtype)
    elif isinstance(source, Tensor):
        at, stretch, settings, assumes = _of_matrix(source)
    else:
        at, stretch, settings, assumes = _of_map(source, state, horizons[-1], starts, discard or 0, inputs)
    settings |= {"study": "transient_gain", "iterations": iterations, "seed": seed, "starts": at}
    ledger = Ledger(resume, settings)
    sections: dict[int, tuple[Section, float]] = {}
    total, found = len(at) * len(horizons), []
    for number in range(len(at)):

        def section(number: int = number) -> tuple[Section, float]:
            if number not in sections:
                sections.clear()
                sections[number] = stretch(number)
            return sections[number]

        rows = []
        for tau in horizons:
            rows.append(ledger.get(f"{number}/{tau}", partial(_one, section, tau, iterations, seed)))
            if progress is not None:
                progress(number * len(horizons) + len(rows), total)
        departure = ledger.get(f"{number}/henrici", lambda: _henrici(*section(), seed))
        found.append((rows, departure))
    return _result(source, horizons, at, found, settings, assumes)


def _one(section: Callable[[], tuple[Section, float]], tau: int, iterations: int, seed: int) -> list[float]:
    gain, change, _ = largest_gain(section()[0], tau, iterations, seed)
    return [float(gain[0]), float(change[0])]


def _henrici(section: Section, eigenvalues: float, seed: int) -> float:
    """Square root of |J|_F^2 minus the sum of the squared eigenvalues."""
    if eigenvalues != eigenvalues:
        return float("nan")
    return max(0.0, float(squared_size(section, PROBES, seed)[0]) - eigenvalues) ** 0.5


def _result(
    source: Any,
    horizons: list[int],
    at: list[int],
    found: list[tuple[list[list[float]], float]],
    settings: dict[str, Any],
    assumes: tuple[str, ...],
) -> Result:
    numbers = torch.tensor([rows for rows, _ in found], dtype=torch.float64)  # (starts, horizons, 2)
    gains, changes = numbers.unbind(-1)
    value, where = gains.max(0)
    control = {}
    if isinstance(source, Tensor):
        radius = torch.linalg.eigvals(source.detach().to(torch.complex128)).abs().max().cpu()
        control["spectral"] = radius ** torch.tensor(horizons, dtype=torch.float64)
        M = source.detach().double().cpu()
        eigenvalues = torch.linalg.eigvals(M).abs().square().sum()
        settings = {**settings, "henrici": max(0.0, float(M.square().sum() - eigenvalues)) ** 0.5}
    else:
        departures = [x for _, x in found if x == x]
        settings = {**settings, "henrici": sum(departures) / len(departures) if departures else None}
    return Result(
        name="transient_gain",
        value=value,
        dims=("horizon",),
        units="1",
        coords={"horizon": horizons},
        columns={
            "median": gains.median(0).values,
            "smallest": gains.min(0).values,
            "start": torch.tensor(at, dtype=torch.float64)[where],
            "change": changes.max(0).values,
        },
        control=control,
        settings={**settings, "non_normality": float(value.max())},
        assumes=assumes,
        checked_by="[[.9, 5], [0, .8]] gains 13.478 in 6 steps: tests/analyses/lyapunov/test_gain.py",
    )


_NORM = "all numbers of the state count alike, whatever their units: another norm gives another gain"


def _of_matrix(M: Tensor) -> tuple[list[int], Stretches, dict[str, Any], tuple[str, ...]]:
    if M.ndim != 2 or M.shape[0] != M.shape[1] or not M.is_floating_point():
        raise SsmlensError(f"a matrix is a square floating tensor, got {M.dtype} {tuple(M.shape)}")
    power = M.detach().double()

    def advance(x: Tensor, first: int, count: int) -> Tensor:
        for _ in range(count):
            x = x @ power.T
        return x

    section = Section(advance, power.new_zeros(1, len(power)))
    return [0], lambda number: (section, float("nan")), {"matrix": digest(M)}, (_NORM,)


def _of_map(
    function: Callable[..., Any], state: Any, longest: int, starts: int, discard: int, inputs: Inputs | None
) -> tuple[list[int], Stretches, dict[str, Any], tuple[str, ...]]:
    if state is None:
        raise SsmlensError("a map needs the state that its orbit starts from")
    at = [discard + i * longest for i in range(starts)]
    u = drive(inputs, at[-1] + longest)
    x = widest(function, state, u(0))
    step, orbit = plain_step(function, x, u(0)), {}
    with torch.no_grad():
        now = x
        for t in range(at[-1] + 1):
            if t in at:
                orbit[t] = now
            now = step(now, u(t)) if t < at[-1] else now

    def stretch(number: int) -> tuple[Section, float]:
        begin = at[number]

        def advance(flat: Tensor, first: int, count: int) -> Tensor:
            state = flat[0].view(x.shape)
            for t in range(first, first + count):
                state = step(state, u(begin + t))
            return state.reshape(1, -1)

        return Section(advance, orbit[begin].reshape(1, -1)), float("nan")

    settings = {"discard": discard, "start_state": digest(x), "dimensions": x.numel()}
    return at, stretch, settings, (_NORM, "the starts stand for the whole orbit: a rarer burst would be missed")


def _of_lens(
    lens: Lens, prompt: Prompt | None, longest: int, starts: int, discard: int | None, dtype: torch.dtype
) -> tuple[list[int], Stretches, dict[str, Any], tuple[str, ...]]:
    if prompt is None:
        raise PromptError("the transient gain of a model is taken along a text: give one")
    model = Model.of(lens, prompt, dtype)
    discard = model.length // 8 if discard is None else discard
    room = model.length - longest - discard
    if room < 0 or discard < 0:
        raise PromptError(f"{discard} discarded tokens and a horizon of {longest} need more than {model.length} tokens")
    at = sorted({discard + round(i * room / max(1, starts - 1)) for i in range(starts)})

    def stretch(number: int) -> tuple[Section, float]:
        begin = at[number]
        state = model.net.initial()
        with torch.no_grad():
            if begin:
                state, _ = model.net.run(state, model.ids[:, :begin], logits="none")
        vectors = model.net.embed(model.ids[:, begin : begin + longest])

        def advance(flat: Tensor, first: int, count: int) -> Tensor:
            return model.forward(flat, vectors[:, first : first + count])

        eigenvalues = 0.0
        for x in model.net.scans(state, vectors[:, :1]):
            copies = x.head_dim * (x.d_state if x.full_log_decay().shape[-1] == 1 else 1)
            eigenvalues += copies * float((2 * x.full_log_decay()).exp().sum())
        return Section(advance, state.flatten()), eigenvalues

    settings = {**model.settings(), "ids": digest(model.ids), "discard": discard}
    return at, stretch, settings, (_NORM, "the text is given", "the starts stand for the whole text", NO_CACHE)
