"""The fused walk against the float64 loop: outputs, states, final state and norms of every kind of recurrence."""

from __future__ import annotations

import pytest
import torch
from scan_cases import DECAYS, Case, make, relative_error
from tolerances import TOL

from ssmlens.kernels import naive
from ssmlens.kernels.fused import walk
from ssmlens.kernels.fused.walk import Plan
from ssmlens.kernels.inputs import ScanInputs

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "one channel": {"h": 4, "p": 1, "g": 1},
    "one channel, groups": {"h": 6, "p": 1, "g": 2, "n": 3, "read_groups": 3},
    "several channels": {"h": 4, "p": 3, "g": 2},
    "one state": {"h": 5, "p": 1, "g": 5, "n": 1},
    "full tiles": {"h": 2, "p": 16, "g": 1, "n": 8},
}
SHAPE = list(SHAPES.values())
# Lengths around the tokens that are fetched ahead, one after the other through every decay and shape.
CASES = [
    *(
        Case(t=t, b=1 + i % 2, decay=decay, initial=True, reset=True, **SHAPE[(i + j) % len(SHAPE)])
        for i, t in enumerate((1, 63, 64, 65))
        for j, decay in enumerate(DECAYS)
        if t in (1, 65) or i % 2 == j % 2
    ),
    *(
        Case(t=11, b=1, decay=decay, scale=scale, **SHAPE[(i + j) % len(SHAPE)])
        for i, scale in enumerate((1e-6, 50.0))
        for j, decay in enumerate(DECAYS)
    ),
    *(Case(t=t, b=1, decay=decay, initial=True, reset=t == 12, erase=True) for decay in DECAYS for t in (5, 12)),
    Case(t=1000, h=8, p=1, g=1, n=16, decay="dt*A state", b=1, initial=True),
]


def on_device(x: ScanInputs) -> ScanInputs:
    return x.map(lambda z: z.to(DEVICE))


def truth(x: ScanInputs) -> tuple[torch.Tensor, ScanInputs]:
    """Every state in float64, of the numbers as they are rounded."""
    exact = x.cast(torch.float64)
    return naive.states(exact), exact


def close(found: torch.Tensor | None, true: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert found is not None
    assert found.dtype == torch.float32
    assert relative_error(found.cpu(), true.cpu()) < TOL[dtype]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_walk_is_naive(case: Case):
    x = make(case, torch.float32)
    states, exact = truth(x)
    found = walk.forward(on_device(x), "all")
    y, final = naive.run(exact)
    close(found.y, y)
    close(found.final, final)
    close(found.states, states)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("p", [1, 3])
def test_segments_of_time(decay: str, p: int):
    """Cut into segments: their number, and tokens left over, change nothing."""
    for t, segments in ((3, 2), (14, 3)):
        x = make(Case(t=t, b=1, h=2, p=p, g=1, n=3, decay=decay, scale=0.3, initial=True, reset=t == 14), torch.float32)
        states, exact = truth(x)
        found = walk.forward(on_device(x), "all", plan=Plan(8, 1, 4, segments))
        y, final = naive.run(exact)
        close(found.y, y)
        close(found.final, final)
        close(found.states, states)


@pytest.mark.parametrize("plan", [Plan(8, 1, 4), Plan(8, 1, 12), Plan(8, 1, 4, 3), Plan(4, 2, 8)], ids=str)
def test_chosen_states(plan: Plan):
    x = make(Case(t=13, b=1, h=3, p=2, g=1, n=3, decay="dt*A head", initial=True), torch.float32)
    states, _ = truth(x)
    x = on_device(x)
    at = [12, 0, 9, 0, 3]
    close(walk.forward(x, at, want_output=False, plan=plan).states, states[:, at])
    for every in (3, 4, 13, 14):
        found = walk.forward(x, every=every, plan=plan)
        assert found.states is not None
        assert found.states.shape[1] == 13 // every
        close(found.states, states[:, every - 1 :: every])
    none = walk.forward(x, [], want_output=False, plan=plan)
    assert none.y is None
    assert none.states is not None
    assert none.states.shape == (1, 0, 3, 2, 3)
    close(none.final, states[:, -1])


@pytest.mark.parametrize(
    "case",
    [Case(t=11, p=1, b=1, reset=True), Case(t=6, b=1, p=3, decay="log state"), Case(t=6, b=1, erase=True)],
    ids=str,
)
def test_statistics_are_norms_of_the_states(case: Case):
    x = make(case, torch.float32)
    states, exact = truth(x)
    found = walk.statistics(on_device(x))
    # What is kept is the state of the same walk before its token is written.
    written = exact.value[..., None] * exact.full_write()[:, :, :, None]
    close(found.norm, states.flatten(3).norm(dim=-1))
    close(found.kept, (states - written).flatten(3).norm(dim=-1))


def test_statistics_from_segments():
    x = make(Case(t=21, b=1, p=1, h=3, g=1), torch.float32)
    found, again = walk.statistics(on_device(x), plan=Plan(4, 1, 4, 3)), walk.statistics(on_device(x))
    assert relative_error(found.norm, again.norm) < TOL[torch.float32]


@pytest.mark.parametrize("p", [1, 3])
def test_bfloat16_is_upcast_before_anything_is_computed(p: int):
    x = make(Case(t=17, b=1, p=p, decay="dt*A state", initial=True)).cast(torch.bfloat16)
    y, final = naive.run(x.cast(torch.float64))
    found = walk.forward(on_device(x))
    close(found.y, y)
    close(found.final, final)


@pytest.mark.parametrize("p", [1, 3])
def test_views_are_read_as_they_are(p: int):
    """Channels before time in memory, as a causal convolution leaves them; every other number; time reversed."""
    x = on_device(make(Case(t=11, b=2, p=p, decay="dt*A state", initial=True, reset=True), torch.float32))
    straight = walk.forward(x, "all")
    assert x.dt is not None
    assert x.reset is not None
    strided = x.replace(
        value=x.value.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        write=x.write.transpose(1, 3).contiguous().transpose(1, 3),
        read=torch.stack([x.read, x.read], -1)[..., 0],
        dt=x.dt.transpose(0, 1).contiguous().transpose(0, 1),
        reset=torch.stack([x.reset, ~x.reset], 1)[:, 0],
    )
    for found, true in zip(walk.forward(strided, "all"), straight):
        # On a GPU other strides are another program, which may add up in another order.
        torch.testing.assert_close(
            found, true, rtol=0 if DEVICE == "cpu" else 1e-6, atol=0 if DEVICE == "cpu" else 1e-6
        )


@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize("decay", ["dt*A head", "dt*A state"])
def test_rates_at_the_end_of_the_dtype(p: int, decay: str):
    """A step of zero keeps everything, any other forgets everything, and nothing is NaN."""
    x = make(Case(t=9, b=1, p=p, decay=decay, initial=True), torch.float32)
    assert x.A is not None
    assert x.dt is not None
    x = x.replace(A=torch.full_like(x.A, torch.finfo(torch.float32).min), dt=x.dt.index_fill(1, torch.tensor([4]), 0.0))
    states, _ = truth(x)
    close(walk.forward(on_device(x), "all").states, states)


def test_huge_step_keeps_the_digits_of_its_neighbours():
    x = make(Case(t=20, b=1, h=3, p=1, g=1, n=4, decay="dt*A state", scale=0.01), torch.float32)
    assert x.dt is not None
    x = x.replace(dt=x.dt.index_fill(1, torch.tensor([9]), 1e6))
    states, _ = truth(x)
    for segments in (1, 2):
        found = walk.forward(on_device(x), "all", plan=Plan(4, 1, 4, segments)).states
        assert found is not None
        for i in range(20):
            close(found[:, i], states[:, i])


def test_no_tokens_and_no_rows_of_the_batch():
    x = on_device(make(Case(t=0, p=1, initial=True), torch.float32))
    found = walk.forward(x, "all")
    assert found.y is not None
    assert found.states is not None
    assert found.y.shape == (2, 0, 4, 1)
    assert found.states.shape == (2, 0, 4, 1, 5)
    assert torch.equal(found.final, x.initial)
    assert not walk.forward(x.replace(initial=None)).final.any()


def test_two_runs_agree_bitwise():
    x = on_device(make(Case(t=13, b=1, p=1), torch.float32))
    plan = Plan(4, 1, 4, 3)
    for found, true in zip(walk.forward(x, "all", plan=plan), walk.forward(x, "all", plan=plan)):
        assert torch.equal(found, true)


def test_bad_choices_of_states():
    x = on_device(make(Case(t=6), torch.float32))
    with pytest.raises(ValueError, match="token positions 0 to 5"):
        walk.forward(x, [6])
    with pytest.raises(ValueError, match='None, "all" or token positions'):
        walk.forward(x, "some")
    with pytest.raises(ValueError, match="positive step"):
        walk.forward(x, every=0)
    with pytest.raises(ValueError, match="give picks or every"):
        walk.forward(x, "all", every=2)
