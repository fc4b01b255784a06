"""Mamba-1's scan with its softplus, bias, skip and gate in one kernel, against the same formulas in float64."""

from __future__ import annotations

import pytest
import torch
from scan_cases import relative_error
from tolerances import TOL
from torch import Tensor
from torch.nn import functional as F

from ssmlens.kernels import naive
from ssmlens.kernels.fused.selective import selective_scan
from ssmlens.kernels.fused.walk import Plan
from ssmlens.kernels.inputs import ScanInputs

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = ("D", "z", "delta_bias", "initial", "reset")


def pieces(t: int, b: int = 2, h: int = 5, n: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    return {
        "u": normal(b, t, h),
        "delta": 4 * normal(b, t, h),
        "A": -normal(h, n).abs(),
        "B": normal(b, t, n),
        "C": normal(b, t, n),
        "D": normal(h),
        "z": 3 * normal(b, t, h),
        "delta_bias": normal(h),
        "initial": normal(b, h, n),
        "reset": torch.rand(b, t, generator=rng) < 0.2,
    }


def truth(given: dict[str, Tensor], softplus: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, final state and every state in float64, one formula at a time."""
    exact = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    step = exact["delta"] + exact.get("delta_bias", torch.zeros(()))
    if softplus:
        step = F.softplus(step)
    x = ScanInputs(
        value=exact["u"][..., None],
        write=exact["B"][:, :, None],
        read=exact["C"][:, :, None],
        dt=step,
        A=exact["A"],
        initial=exact["initial"][:, :, None] if "initial" in exact else None,
        reset=exact.get("reset"),
    )
    y = naive.run(x)[0][..., 0]
    if "D" in exact:
        y = y + exact["D"] * exact["u"]
    if "z" in exact:
        y = y * F.silu(exact["z"])
    states = naive.states(x)[:, :, :, 0]
    return y, states[:, -1], states


def moved(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.to(DEVICE) for k, v in given.items()}


def close(found: Tensor | None, true: Tensor) -> None:
    assert found is not None
    assert relative_error(found.cpu(), true) < TOL[torch.float32]


@pytest.mark.parametrize(("t", "softplus"), [(1, True), (11, False), (11, True)])
@pytest.mark.parametrize("left_out", [(), OPTIONS, *((name,) for name in OPTIONS)], ids=str)
def test_everything_around_the_scan(left_out: tuple[str, ...], softplus: bool, t: int):
    given = {k: v for k, v in pieces(t).items() if k not in left_out}
    if not softplus:
        given["delta"] = given["delta"].abs()
        given.pop("delta_bias", None)
    found = selective_scan(**moved(given), delta_softplus=softplus, at="all")
    for one, true in zip(found, truth(given, softplus)):
        close(one, true)


@pytest.mark.parametrize("segments", [1, 3])
def test_chosen_states_and_segments(segments: int):
    given = pieces(11, b=1)
    y, final, states = truth(given, True)
    at = [-1, 0, 7, 0]
    for asked in (at, torch.tensor(at)):
        found = selective_scan(**moved(given), delta_softplus=True, at=asked, plan=Plan(4, 1, 4, segments))
        close(found.y, y)
        close(found.final, final)
        close(found.states, states[:, at])
    assert selective_scan(**moved(given), delta_softplus=True).states is None


def test_softplus_keeps_its_digits_at_either_end():
    """The step itself is the state after one token that writes 1."""
    delta = torch.tensor([-30.0, -10, -3, -1, -0.01, 0, 0.01, 1, 3, 10, 19.99, 20.01, 50, 1e4])[None, None]
    ones, h = torch.ones_like(delta), delta.shape[-1]
    B = torch.ones(1, 1, 1)
    given = moved({"u": ones, "delta": delta, "A": torch.zeros(h, 1), "B": B, "C": B})
    found = selective_scan(**given, delta_softplus=True).y.cpu().double()
    true = F.softplus(delta.double())
    assert ((found - true).abs() / true).max() < TOL[torch.float32]


def test_memory_as_a_mixer_leaves_it():
    """u and z with time last in memory, B and C as columns of one projection, in bfloat16."""
    given = pieces(11, dtype=torch.bfloat16)
    y, final, _ = truth(given, True)
    strided = dict(given)
    for name in ("u", "z"):
        strided[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    strided["B"], strided["C"] = torch.cat([given["B"], given["C"]], -1).split(4, -1)
    found = selective_scan(**moved(strided), delta_softplus=True)
    close(found.y, y)
    close(found.final, final)


def test_several_groups():
    given = pieces(9, h=6)
    grouped = (
        given
        | {k: given[k].reshape(2, 9, 2, 2) for k in ("B", "C")}
        | {"A": given["A"][:, :2], "initial": given["initial"][..., :2]}
    )
    found = selective_scan(**moved(grouped), delta_softplus=True)
    for i in range(2):
        heads = slice(3 * i, 3 * i + 3)
        part = {k: v[..., heads] for k, v in grouped.items() if k in ("u", "delta", "z", "D", "delta_bias")}
        part |= {"A": grouped["A"][heads], "initial": grouped["initial"][:, heads], "reset": grouped["reset"]}
        part |= {k: grouped[k][:, :, i] for k in ("B", "C")}
        close(found.y[:, :, heads], truth(part, True)[0])


@pytest.mark.parametrize(
    ("name", "shape"),
    [("u", (2, 3)), ("delta", (2, 3, 4)), ("D", (3,)), ("z", (2, 3, 4)), ("delta_bias", (1,)), ("initial", (2, 5))],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...]):
    given = pieces(3) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"{name} (is|has)"):
        selective_scan(**given)
