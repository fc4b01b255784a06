"""Laws that every recurrence obeys, whatever its shape: each law runs on each maker of inputs.

hypothesis chooses lengths, sizes, seeds and cuts; the inputs are float64, so a law holds to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scan_cases import Case, make, relative_error
from tolerances import TOL

from ssmlens.kernels import attention, scan
from ssmlens.kernels.inputs import ScanInputs

Maker = Callable[[int, int, int], ScanInputs]
Law = Callable[[ScanInputs, st.DataObject], None]

TIGHT = TOL[torch.float64]


def maker(**features: Any) -> Maker:
    def made(t: int, n: int, seed: int) -> ScanInputs:
        return make(Case(t=t, n=n, **features), seed=seed)

    return made


MAKERS: dict[str, Maker] = {
    "mamba1": maker(h=6, p=1, g=1, decay="dt*A state", initial=True),
    "mamba2": maker(h=4, p=3, g=2, decay="dt*A head", initial=True),
    "gla": maker(h=2, p=3, g=2, decay="log state", initial=True),
    "retention": maker(h=2, p=3, g=2, decay="log head"),
    "packed": maker(h=4, p=1, g=2, decay="dt*A state", reset=True, initial=True),
    "fast": maker(h=4, p=3, g=1, decay="dt*A head", scale=50.0, initial=True),
    "slow": maker(h=4, p=1, g=1, decay="dt*A state", scale=1e-6, initial=True),
    "delta": maker(h=2, p=3, g=2, decay="log head", erase=True, initial=True),
}


def draw_like(x: torch.Tensor, data: st.DataObject) -> torch.Tensor:
    seed = data.draw(st.integers(0, 2**16), label="seed of a vector")
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))


def causality(x: ScanInputs, data: st.DataObject) -> None:
    """What comes after t changes neither outputs nor states up to t."""
    cut = data.draw(st.integers(0, x.length - 1), label="t")
    future = {k: z.clone() for k, z in x.tensors().items()}
    for name in ("value", "write", "read", "dt", "log_decay"):
        if name in future:
            future[name][:, cut + 1 :] = -draw_like(future[name][:, cut + 1 :], data).abs() * (
                -1 if name == "dt" else 1
            )
    other = ScanInputs(**future)
    # Equal to rounding only: a product may sum its terms in another order when later ones change.
    assert relative_error(scan.run(other)[0][:, : cut + 1], scan.run(x)[0][:, : cut + 1]) < TIGHT
    assert relative_error(scan.states(other, [cut]), scan.states(x, [cut])) < TIGHT
    assert not attention.dense(x).triu(1).any()


def linearity(x: ScanInputs, data: st.DataObject) -> None:
    """Outputs are linear in the values and the initial state together."""
    other = x.replace(value=draw_like(x.value, data), initial=None if x.initial is None else draw_like(x.initial, data))
    a, b = 2.0, -0.5
    initial = None if x.initial is None or other.initial is None else a * x.initial + b * other.initial
    mixed = x.replace(value=a * x.value + b * other.value, initial=initial)
    for found, first, second in zip(scan.run(mixed), scan.run(x), scan.run(other), strict=True):
        size = max(1.0, float(first.abs().max() + second.abs().max()))
        assert (found - a * first - b * second).abs().max() < TIGHT * size


def matrix(x: ScanInputs, data: st.DataObject) -> None:
    """apply(v) is dense() @ v, and the run from a zero state is apply(value)."""
    v = draw_like(x.value, data)
    full = attention.dense(x)
    assert relative_error(attention.apply(x, v), torch.einsum("bhts,bshp->bthp", full, v)) < TIGHT
    assert relative_error(scan.run(x.replace(initial=None))[0], torch.einsum("bhts,bshp->bthp", full, x.value)) < TIGHT
    t = data.draw(st.integers(0, x.length - 1), label="t")
    scale = float(full.abs().max())
    assert (attention.row(x, t) - full[:, :, t]).abs().max() < TIGHT * scale
    assert (attention.column(x, t) - full[..., t]).abs().max() < TIGHT * scale


def adjoint(x: ScanInputs, data: st.DataObject) -> None:
    """<y, M v> = <M^T y, v>."""
    v, y = draw_like(x.value, data), draw_like(x.value, data)
    left, right = y * attention.apply(x, v), attention.adjoint(x, y) * v
    assert abs(float(left.sum() - right.sum())) < TIGHT * float(left.abs().sum() + right.abs().sum() + 1e-300)


def carry(x: ScanInputs, data: st.DataObject) -> None:
    """Two halves, the state handed over, are the whole; a prefix is the prefix of the whole."""
    cut = data.draw(st.integers(0, x.length), label="cut")
    whole, last = scan.run(x)
    head, state = scan.run(x.slice(0, cut))
    tail, end = scan.run(x.slice(cut, x.length).replace(initial=state))
    assert relative_error(torch.cat([head, tail], 1), whole) < TIGHT
    assert relative_error(end, last) < TIGHT
    if cut:
        assert relative_error(scan.states(x, [cut - 1])[:, 0], state) < TIGHT


def standing_still(x: ScanInputs, data: st.DataObject) -> None:
    """A token with dt = 0 (or decay 1 and nothing written or erased) leaves the state as it was."""
    at = data.draw(st.integers(0, x.length - 1), label="token")
    changes: dict[str, torch.Tensor | None] = {}
    for name in ("dt", "log_decay", "erase_read") if x.dt is not None else ("log_decay", "write", "erase_read"):
        piece = getattr(x, name)
        if piece is not None:
            changes[name] = piece.index_fill(1, torch.tensor([at]), 0.0)
    if x.reset is not None:
        changes["reset"] = x.reset.index_fill(1, torch.tensor([at]), False)
    still = x.replace(**changes)
    every = scan.states(still)
    first = x.initial if x.initial is not None else torch.zeros_like(every[:, 0])
    assert relative_error(every[:, at], every[:, at - 1] if at else first) < TIGHT
    assert relative_error(scan.run(still)[1], every[:, -1]) < TIGHT


def rows(x: ScanInputs, data: st.DataObject) -> None:
    """Batch rows do not mix."""
    y, final = scan.run(x)
    for i in range(x.batch):
        alone = x.map(lambda z: z)
        pieces = {k: z if k == "A" else z[i : i + 1] for k, z in alone.tensors().items()}
        y_alone, final_alone = scan.run(ScanInputs(**pieces))
        assert relative_error(y_alone, y[i : i + 1]) < TIGHT
        assert relative_error(final_alone, final[i : i + 1]) < TIGHT


def mass(x: ScanInputs, data: st.DataObject) -> None:
    """A quantile holds its share and one token less does not; the largest sources are the largest entries."""
    t = data.draw(st.integers(0, x.length - 1), label="t")
    q = data.draw(st.sampled_from([0.05, 0.5, 0.9, 1.0]), label="q")
    k = data.draw(st.integers(1, 5), label="k")
    line = attention.row(x, t).abs()
    values, sources = attention.topk(x, k, [t])
    best = line.topk(min(k, x.length), -1).values
    assert relative_error(values[:, :, 0, : best.shape[-1]].abs(), best) < TIGHT
    assert (sources <= t).all()
    total = line.sum(-1)
    reach = attention.quantile(x, q, [t])[..., 0]
    assert torch.equal(reach.isnan(), total == 0)
    age = (t - torch.arange(x.length)).expand_as(line)
    within = line.where((age >= 0) & (age <= reach[..., None]), 0.0).sum(-1)
    closer = line.where((age >= 0) & (age < reach[..., None]), 0.0).sum(-1)
    assert (within >= q * total * (1 - 1e-9)).all()
    assert ((closer <= q * total * (1 + 1e-9)) | (total == 0)).all()


def sizes(x: ScanInputs, data: st.DataObject) -> None:
    """Norms are those of the states; decay only shrinks a state, and a write adds at most its own norm."""
    found = scan.statistics(x)
    states = scan.states(x).norm(dim=(-2, -1))
    assert relative_error(found.norm, states) < TIGHT
    written = x.value.norm(dim=-1) * x.full_write().norm(dim=-1)
    assert (found.norm <= (found.kept + written) * (1 + 1e-9)).all()
    if not x.has_erase:
        assert (found.kept[:, 1:] <= states[:, :-1] * (1 + 1e-9)).all()


LAWS = {law.__name__: law for law in (causality, linearity, matrix, adjoint, carry, standing_still, rows, mass, sizes)}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("law", LAWS)
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(data=st.data())
def test_law(law: str, kind: str, data: st.DataObject):
    t = data.draw(st.one_of(st.integers(1, 20), st.sampled_from([16, 17, 64, 70])), label="t")
    n = data.draw(st.integers(1, 7), label="n")
    seed = data.draw(st.integers(0, 2**16), label="seed")
    LAWS[law](MAKERS[kind](t, n, seed), data)
