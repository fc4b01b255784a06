"""What a demanding user hands in: strides of zero, NaN, several groups, empty batches, foreign modes and defaults."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from scan_cases import DECAYS, Case, make, relative_error
from tolerances import TOL
from torch import Tensor

from ssmlens.kernels import attention, attention_mass, backend, contributions, naive, scan
from ssmlens.kernels.contributions import Terms
from ssmlens.kernels.fused import dispatch, lines, selfcheck, ssd, tiles, walk
from ssmlens.kernels.inputs import ScanInputs, expand_groups

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32 = torch.float32
# One channel per head, and several that go to the matrix units.
KINDS = [
    Case(t=9, h=4, p=1, g=2, n=3, read_groups=4, decay="dt*A state", b=1),
    Case(t=9, h=4, p=8, g=4, n=3, read_groups=2, decay="dt*A head", b=1),
]


def on_device(x: ScanInputs) -> ScanInputs:
    return x.map(lambda z: z.to(DEVICE))


def close(found: Tensor, true: Tensor) -> None:
    assert found.dtype == F32
    assert relative_error(found.cpu(), true) < TOL[F32]


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_tensors_that_are_one_number_in_memory(case: Case) -> None:
    """Every piece expanded along time and heads: strides of zero everywhere."""
    x = make(case, F32)
    flat = {k: z[:1, :1, :1].expand_as(z) for k, z in x.tensors().items() if k not in ("A", "initial")}
    x = x.replace(**flat, A=x.A[:1].expand_as(x.A), reset=torch.ones(1, 1, dtype=torch.bool).expand(1, 9))
    for reset in (x.reset, None):
        given = x.replace(reset=reset)
        true, final = naive.run(given.cast(torch.float64))
        moved = given.map(lambda z: z.to(DEVICE)).replace(**{k: z.to(DEVICE) for k, z in flat.items()})
        y, last = scan.run(moved, impl="triton")
        close(y, true)
        close(last, final)
        matrix = naive.attention(given.cast(torch.float64))
        close(attention.dense(moved, impl="triton"), matrix)
        close(attention.row(moved, 8, impl="triton"), matrix[:, :, 8])


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_a_gradient_through_expanded_inputs(case: Case) -> None:
    x = make(case, F32)
    slopes = []
    for impl in ("naive", "triton"):
        given = x.cast(torch.float64) if impl == "naive" else on_device(x)
        one = given.read[:, :, :1].clone().requires_grad_()
        y, _ = scan.run(given.replace(read=one.expand_as(given.read)), impl=impl)
        slopes.append(torch.autograd.grad(y.sum(), one)[0].cpu())
    assert relative_error(slopes[1], slopes[0]) < TOL[F32]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("p", [1, 8])
def test_a_reset_of_the_first_token_forgets_the_initial_state(p: int, decay: str) -> None:
    x = make(Case(t=5, h=2, p=p, g=1, n=3, decay=decay, initial=True, b=1), F32)
    first = torch.zeros(1, 5, dtype=torch.bool)
    first[:, 0] = True
    y, final = scan.run(on_device(x.replace(reset=first)), impl="triton")
    true, last = naive.run(x.replace(initial=None).cast(torch.float64))
    close(y, true)
    close(final, last)


def poisoned_pieces(x: ScanInputs, at: int) -> Iterator[tuple[str, ScanInputs]]:
    """Each piece with a NaN, as a GPU makes them (all bits set), in token ``at`` of head or group 0."""
    bad = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(F32)[0]
    for name, z in x.tensors().items():
        spoiled = z.clone()
        if name == "A":
            spoiled[0, 0] = bad
        else:
            spoiled[:, at, 0] = bad
        yield name, x.replace(**{name: spoiled})


def entries(x: ScanInputs) -> Tensor:
    """M (b, h, t, s) entry by entry, from what belongs to it alone; exactly 0 across a token that forgets everything.

    The loop multiplies every NaN by zeros, which makes NaN of entries that have nothing to do with it.
    """
    read, write, decay = expand_groups(x.read, x.n_heads), x.full_write(), x.full_log_decay()
    out = torch.zeros(x.batch, x.n_heads, x.length, x.length, dtype=x.dtype)
    for t in range(x.length):
        for s in range(t + 1):
            between = decay[:, s + 1 : t + 1]
            entry = (read[:, t] * between.sum(1).exp() * write[:, s]).sum(-1)
            out[..., t, s] = entry.masked_fill((between == -torch.inf).any(1)[..., 0], 0.0)
    return out


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("case", [*KINDS, Case(t=9, h=2, p=8, g=1, decay="log head", b=1)], ids=str)
def test_nan_stays_nan(case: Case) -> None:
    """A NaN is in every number that it belongs to, and in nothing above the diagonal."""
    x, at = make(case, F32), 4
    for name, spoiled in poisoned_pieces(x, at):
        matrix = entries(spoiled.cast(torch.float64)).isnan()
        assert matrix.any() or name == "value", name
        moved = on_device(spoiled)
        found = attention.dense(moved, impl="triton").cpu()
        assert found[matrix].isnan().all(), name
        if case.p == 1:
            assert not found.triu(1).any(), name
        for t in (at, 8):
            assert attention.row(moved, t, impl="triton").cpu()[matrix[:, :, t]].isnan().all(), name
        assert attention.column(moved, at, impl="triton").cpu()[matrix[..., at]].isnan().all(), name
        largest = attention.reduce(moved, "max_abs", impl="triton").cpu()
        assert largest[matrix.any(1)].isnan().all(), name
        y, final = scan.run(moved, impl="triton")
        true, last = naive.run(spoiled.cast(torch.float64))
        assert y.cpu()[true.isnan()].isnan().all(), name
        assert final.cpu()[last.isnan()].isnan().all(), name


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_contributions_of_nan_are_nan(case: Case) -> None:
    x, at, e = make(case, F32), 4, case.h * case.p
    ones = {"sources": torch.ones(1, 2, 9, e), "gate": torch.ones(1, 9, e), "weight": torch.ones(3, e)}
    for name, spoiled in poisoned_pieces(x, at):
        if name == "value":
            continue
        true = contributions.norms(Terms(spoiled, **ones), impl="chunked").isnan()
        moved = Terms(on_device(spoiled), **{k: z.to(DEVICE) for k, z in ones.items()})
        found = contributions.norms(moved, impl="triton").cpu()
        assert found[true].isnan().all(), name


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_empty_batches(case: Case) -> None:
    x = on_device(make(case, F32)).map(lambda z: z if z.shape[0] == case.h else z[:0])
    y, final = scan.run(x, impl="triton")
    assert (y.shape, final.shape) == ((0, 9, case.h, case.p), (0, case.h, case.p, 3))
    assert scan.states(x, [2], impl="triton").shape == (0, 1, case.h, case.p, 3)
    assert scan.statistics(x, impl="triton").norm.shape == (0, 9, case.h)
    assert attention.dense(x, impl="triton").shape == (0, case.h, 9, 9)
    assert attention.reduce(x, "norm", impl="triton").shape == (0, 9, 9)
    assert attention.row(x, 2, impl="triton").shape == (0, case.h, 9)
    assert attention.distance(x, [2], impl="triton").shape == (0, case.h, 1)
    for rows in ([2], None):
        count = 9 if rows is None else 1
        assert attention.quantile(x, 0.5, rows).shape == (0, case.h, count)
        assert attention.topk(x, 2, rows)[1].shape == (0, case.h, count, 2)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_inference_mode_and_tensors_made_in_it(case: Case) -> None:
    x = make(case, F32)
    true, _ = naive.run(x.cast(torch.float64))
    with torch.inference_mode():
        made = on_device(x.map(torch.clone))
        close(scan.run(made, impl="triton")[0], true)
        close(attention.apply(made, made.value), true)
    close(scan.run(made, impl="triton")[0], true)
    close(attention.dense(made, impl="triton"), naive.attention(x.cast(torch.float64)))


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_other_defaults_change_nothing(case: Case) -> None:
    """Scratch tables are float32 whatever a program has made the default dtype."""
    x = make(case, F32)
    matrix = naive.attention(x.cast(torch.float64))
    place = torch.arange(9.0, dtype=torch.float64)
    distance = ((place[:, None] - place) * matrix.abs()).sum(-1) / matrix.abs().sum(-1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        moved = on_device(x)
        close(scan.run(moved, impl="triton")[0], naive.run(x.cast(torch.float64))[0])
        close(attention.dense(moved, impl="triton"), matrix)
        close(attention.reduce(moved, "mean_abs", impl="triton"), matrix.abs().mean(1))
        assert relative_error(attention.distance(moved, impl="triton").cpu(), distance) < 4 * TOL[F32]
        assert relative_error(lines.distance(moved, [8]).cpu(), distance[..., 8:]) < 4 * TOL[F32]
    finally:
        torch.set_default_dtype(before)


def test_the_check_of_the_device_works_in_any_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call may come from inference mode, autocast, or a program with other defaults."""
    device = torch.device(DEVICE)
    monkeypatch.setattr(selfcheck, "TOKENS", 3)
    monkeypatch.setattr(selfcheck, "FAMILIES", {selfcheck.ONE: (2, 1, 8, 8), selfcheck.UNITS: (2, 32, 16, 1)})
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        checks = [selfcheck.Check(*both) for both in product(selfcheck.FAMILIES, ("scan", "gradients"))]
        assert all(z.dtype == F32 for check in checks for z in selfcheck._case_for(check).tensors().values())
        with torch.inference_mode(), torch.autocast(DEVICE, dtype=torch.bfloat16):
            for check in checks:
                assert selfcheck.complaint_about.__wrapped__(device, check) is None
    finally:
        torch.set_default_dtype(before)


def test_launches_go_to_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    guard = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda z: seen.append(z) or guard(z))
    one, many = (on_device(make(case, F32)).slice(0, 4) for case in KINDS)
    terms = Terms(one, *(torch.ones(s, device=DEVICE) for s in ((1, 1, 4, 4), (1, 4, 4), (2, 4))))
    for name, x, call in (
        ("walk", one, lambda x: walk.forward(x)),
        ("matrix units", many, lambda x: ssd.forward(x)),
        ("dense", one, tiles.dense),
        ("reduce", one, lambda x: tiles.reduce(x, "mean")),
        ("distance", one, tiles.distance),
        ("row", one, lambda x: lines.row(x, 3)),
        ("column", one, lambda x: lines.column(x, 3)),
        ("mean distance", one, lambda x: lines.distance(x, [3])),
    ):
        seen.clear()
        call(x)
        assert seen, name
        assert seen[0] is x.value, name
    seen.clear()
    contributions.norms(terms, impl="triton")
    assert any(z is not one.value for z in seen)  # those of an operand
    for case, x in zip(KINDS, (one, many), strict=True):
        y, _ = scan.run(x.replace(value=x.value.requires_grad_()), impl="triton")
        seen.clear()
        torch.autograd.grad(y.sum(), x.value)
        assert seen, case


def test_more_sequences_than_a_launch_takes() -> None:
    x = make(Case(t=1, h=1, p=1, g=1, n=1, b=1), F32)
    x = x.map(lambda z: z if z is x.A else z.expand(70_000, *z.shape[1:]).to(DEVICE)).replace(A=x.A.to(DEVICE))
    with pytest.raises(ValueError, match="at most 65,535 sequences at a time, got 70,000"):
        scan.run(x, impl="triton")
    assert backend.resolve("auto", x) == "chunked"
    assert dispatch.refusal(x.map(lambda z: z[:65_535] if z.shape[0] == 70_000 else z)) is None


def test_rows_in_blocks_know_groups_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantiles from fused row blocks, cut by heads inside a group of write and across groups of read."""
    x = make(Case(t=20, h=6, p=1, g=2, n=3, read_groups=3, decay="dt*A state", b=1), F32)
    true = attention.quantile(x.cast(torch.float64), 0.5)
    monkeypatch.setattr(attention_mass, "resolve", lambda impl, z, work: "triton")
    monkeypatch.setattr(attention_mass, "_CPU_BLOCK", 700)
    monkeypatch.setattr(attention_mass, "_GPU_BLOCK", 700)
    assert torch.equal(attention.quantile(on_device(x), 0.5).double().cpu(), true)
