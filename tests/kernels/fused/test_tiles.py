"""Fused tiles of the implicit attention against the loop's matrix in float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from scan_cases import DECAYS, Case, make, relative_error
from tolerances import TOL
from torch import Tensor

from ssmlens.kernels import attention, naive
from ssmlens.kernels.fused import tile_clock, tiles
from ssmlens.kernels.fused.tiles import Tuning
from ssmlens.kernels.inputs import ScanInputs

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = TOL[torch.float32]

SHAPES = (
    {"h": 2, "p": 1, "g": 1, "n": 16, "b": 1},
    {"h": 6, "p": 2, "g": 2, "n": 3, "read_groups": 3, "b": 1},
    {"h": 2, "p": 1, "g": 2, "n": 1, "b": 2},
)
REDUCED = {
    "mean": lambda m: m.mean(1),
    "mean_abs": lambda m: m.abs().mean(1),
    "max_abs": lambda m: m.abs().amax(1),
    "norm": lambda m: m.square().sum(1).sqrt(),
}
SMALL = [Case(t=t, decay=d, reset=t == 33, initial=True, **s) for t in (1, 33) for d in DECAYS for s in SHAPES]
EDGES = [
    *(Case(t=t, decay="dt*A state", **SHAPES[0]) for t in (63, 64, 65)),
    *(Case(t=65, decay=d, reset=True, **SHAPES[2]) for d in DECAYS),
    *(Case(t=65, decay=d, scale=s, h=1, p=1, g=1, n=3, b=1) for d in DECAYS for s in (1e-6, 50.0)),
    *(Case(t=65, decay=d, h=1, p=1, g=1, n=34, b=1) for d in DECAYS),
]
LONG = [
    Case(t=500, h=2, p=1, g=1, n=16, decay="dt*A state", b=1, scale=0.05),
    Case(t=1000, h=1, p=4, g=1, n=16, decay="dt*A head", b=1, scale=0.02),
]


@functools.cache
def truth(case: Case) -> Tensor:
    """The matrix in float64 of inputs that float32 holds exactly; the loop's, or the tiles' tested against it."""
    x = make(case, torch.float32).cast(torch.float64)
    return (naive.attention if case.t <= 100 else attention.dense)(x).to(DEVICE)


def moved(case: Case, dtype: torch.dtype = torch.float32) -> ScanInputs:
    return make(case, dtype).map(lambda z: z.to(DEVICE))


def mean_distance(m: Tensor) -> Tensor:
    place = torch.arange(m.shape[-1], dtype=torch.float64, device=m.device)
    return ((place[:, None] - place) * m.abs()).sum(-1) / m.abs().sum(-1)


@pytest.mark.parametrize("case", [*SMALL, *EDGES, LONG[1]], ids=str)
def test_dense(case: Case):
    found = tiles.dense(moved(case))
    assert found.dtype == torch.float32
    assert not found.triu(1).any()
    assert relative_error(found, truth(case)) < TOLERANCE


@pytest.mark.parametrize("how", REDUCED)
@pytest.mark.parametrize("case", [*SMALL[::7], *EDGES[2::6]], ids=str)
def test_reduce(case: Case, how: str):
    found = tiles.reduce(moved(case), how)
    assert not found.triu(1).any()
    assert relative_error(found, REDUCED[how](truth(case))) < TOLERANCE


def test_reduce_long():
    case = LONG[0]
    assert relative_error(tiles.reduce(moved(case), "mean_abs"), REDUCED["mean_abs"](truth(case))) < TOLERANCE


@pytest.mark.parametrize("case", [*SMALL[1::5], *EDGES[1::4]], ids=str)
def test_distance(case: Case):
    # A ratio of two sums over the row, each with the error of its entries relative to the largest of them.
    assert relative_error(tiles.distance(moved(case)), mean_distance(truth(case))) < 4 * TOLERANCE


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 64), (60, 130), (130, 140), (5, 5)])
@pytest.mark.parametrize("decay", DECAYS[1:3])
def test_rows(decay: str, start: int, stop: int):
    case = Case(t=140, h=1, p=1, g=1, n=2, decay=decay, b=1)
    found = tiles.rows(moved(case), start, stop)
    assert relative_error(found, truth(case)[:, :, start:stop, :stop]) < TOLERANCE


TUNINGS = {
    "shares": Tuning(parts=2),
    "more shares than heads": Tuning(parts=9, unroll=0),
    "small blocks": Tuning(block=32, unroll=2),
    "large blocks": Tuning(block=128),
    "small corners": Tuning(small=8, precision="tf32x3"),
    "states at once": Tuning(step=32, precision="ieee"),
}


@pytest.mark.parametrize(
    ("decay", "name"),
    [("dt*A state", name) for name in TUNINGS] + [("dt*A head", "shares"), ("log head", "states at once")],
)
def test_tunings(decay: str, name: str):
    case, tuning = Case(t=66, h=2, p=1, g=1, n=18, decay=decay, b=1), TUNINGS[name]
    x, true = moved(case), truth(case)
    assert relative_error(tiles.reduce(x, "mean_abs", tuning), REDUCED["mean_abs"](true)) < TOLERANCE
    if "shares" not in name:  # which only reductions have
        assert relative_error(tiles.dense(x, tuning), true) < TOLERANCE
        assert relative_error(tiles.distance(x, tuning), mean_distance(true)) < 4 * TOLERANCE


@pytest.mark.parametrize("decay", DECAYS)
def test_half_precision_inputs_are_upcast(decay: str):
    x = make(Case(t=67, h=2, p=1, g=1, n=3, decay=decay, b=1), torch.bfloat16)
    true = naive.attention(x.cast(torch.float64)).to(DEVICE)
    x = x.map(lambda z: z.to(DEVICE))
    assert relative_error(tiles.dense(x), true) < TOLERANCE
    assert relative_error(tiles.reduce(x, "norm"), REDUCED["norm"](true)) < TOLERANCE


@pytest.mark.parametrize("decay", ["dt*A head", "log state"])
def test_views_are_read_as_they_are(decay: str):
    """Time and batch exchanged in memory, every second state, one decay for all heads."""
    case = Case(t=65, h=2, p=1, g=1, n=3, decay=decay, reset=True)
    x = moved(case)
    strided = {k: z if k == "A" else z.transpose(0, 1).contiguous().transpose(0, 1) for k, z in x.tensors().items()}
    strided |= {k: torch.stack([z, z + 1], -1)[..., 0] for k, z in strided.items() if k in ("read", "write", "dt")}
    y = ScanInputs(**strided)
    assert torch.equal(tiles.dense(y), tiles.dense(x))
    assert torch.equal(tiles.reduce(y, "mean"), tiles.reduce(x, "mean"))


def test_every_entry_is_exact_beside_huge_steps():
    """Steps from 1e-4 to 50 nats, in one block and across blocks: each entry, not only the largest."""
    rng = torch.Generator().manual_seed(0)
    dt = 10 ** (-4 + 5.7 * torch.rand(1, 200, 2, generator=rng, dtype=torch.float64)).float()
    one = torch.ones(1, 200, 1, 3)
    pieces = {"value": dt[..., None], "write": one, "read": one}
    for case in ({"dt": dt, "A": -one[0, :2, 0]}, {"dt": dt, "A": -one[0, :2, 0, :1]}, {"log_decay": -dt[..., None]}):
        x = ScanInputs(**pieces, **case)
        true = attention.dense(x.cast(torch.float64)).to(DEVICE)
        x = x.map(lambda z: z.to(DEVICE))
        seen = true > 1e-30
        assert seen.sum() > 1000
        assert (tiles.dense(x)[seen].double() / true[seen] - 1).abs().max() < 1e-5


def test_rates_and_steps_at_the_end_of_the_dtype():
    """A step of zero keeps everything, a rate of zero too; any other step of these forgets everything; no NaN."""
    for decay in ("dt*A state", "dt*A head"):
        x = make(Case(t=67, h=2, p=1, g=1, n=3, decay=decay, b=1), torch.float32)
        assert x.A is not None
        assert x.dt is not None
        dt = x.dt.index_fill(1, torch.tensor([4, 65]), 0.0).index_fill(1, torch.tensor([20]), 1e30)
        A = torch.full_like(x.A, torch.finfo(torch.float32).min).index_fill(0, torch.tensor([1]), 0.0)
        x = x.replace(A=A, dt=dt, write=x.write.index_fill(1, torch.tensor([20]), 0.0))
        true = naive.attention(x).to(DEVICE)
        x = x.map(lambda z: z.to(DEVICE))
        assert relative_error(tiles.dense(x), true) < TOLERANCE
        assert relative_error(tiles.reduce(x, "max_abs"), true.abs().amax(1)) < TOLERANCE


@pytest.mark.parametrize("decay", DECAYS)
def test_a_reset_cuts_exactly(decay: str):
    x = moved(Case(t=67, h=2, p=1, g=1, n=3, decay=decay, b=1, scale=1e-6))
    cut = torch.zeros(1, 67, dtype=torch.bool, device=DEVICE)
    cut[:, [3, 40, 66]] = True
    found = tiles.dense(x.replace(reset=cut))
    for at in (3, 40, 66):
        assert not found[:, :, at:, :at].any()
    assert found[:, :, 66:, 66:].any()
    assert torch.equal(tiles.reduce(x.replace(reset=cut), "max_abs"), found.abs().amax(1))


@pytest.mark.parametrize("decay", ["log head", "log state"])
def test_forgetting_everything(decay: str):
    x = moved(Case(t=67, h=2, p=1, g=1, n=3, decay=decay, b=1))
    assert x.log_decay is not None
    x = x.replace(log_decay=torch.full_like(x.log_decay, -torch.inf))
    found = tiles.dense(x)
    assert torch.equal(found, torch.diagonal_scatter(torch.zeros_like(found), found.diagonal(0, 2, 3), 0, 2, 3))
    assert not tiles.distance(x).any()


def test_a_row_of_zeros_has_no_distance():
    x = moved(Case(t=20, h=2, p=1, g=1, n=4, b=1))
    x = x.replace(read=x.read * (torch.arange(20, device=DEVICE) != 4)[:, None, None])
    found = tiles.distance(x)
    assert found[..., 4].isnan().all()
    assert not found[..., 5:].isnan().any()


def test_two_runs_agree_bitwise():
    x = moved(Case(t=70, h=5, p=1, g=1, n=4, decay="dt*A state", b=1))
    tuning = Tuning(parts=3)
    assert torch.equal(tiles.reduce(x, "mean", tuning), tiles.reduce(x, "mean", tuning))
    assert torch.equal(tiles.dense(x), tiles.dense(x))


def test_no_tokens():
    x = moved(Case(t=0))
    assert tiles.dense(x).shape == (2, 4, 0, 0)
    assert tiles.reduce(x, "norm").shape == (2, 0, 0)
    assert tiles.distance(x).shape == (2, 4, 0)


def test_clocks_restart_and_are_exact():
    """Sums of the two parts, and what is left of a block, against float64."""
    case = Case(t=100, h=3, p=1, g=1, n=4, decay="log state", b=2)
    table = tile_clock.clocks(moved(case), 64)
    assert (table.kind, table.blocks, table.padded) == (tile_clock.PER_STATE, 2, 128)
    steps = make(case, torch.float32).log_decay
    assert steps is not None
    halvings = -steps.double().masked_fill(steps == -torch.inf, 0.0).flatten(2).transpose(1, 2) / math.log(2)
    rise = halvings[..., :64].cumsum(-1)
    assert relative_error((table.rise.double() + table.rest.double())[..., :64].cpu(), rise) < 1e-7
    assert relative_error(table.fall[..., :64].cpu(), rise[..., -1:] - rise) < TOLERANCE
    assert relative_error(table.start[..., 2].cpu(), halvings.sum(-1)) < 1e-7
    assert table.count is not None
    assert (table.count[..., 2:4].cpu() == torch.tensor([0, 1])).all()
