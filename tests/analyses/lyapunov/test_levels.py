"""The levels of a model: against its decays, its dense Jacobian, and difference quotients of its own forward."""

from __future__ import annotations

import math
from pathlib import Path

import checkpoints
import pytest
import torch
from torch import Tensor

import ssmlens
from ssmlens.analyses import lyapunov
from ssmlens.analyses.lyapunov._closed import _loop, _start
from ssmlens.analyses.lyapunov._divergence import _kl, _rate
from ssmlens.analyses.lyapunov._model import Model
from ssmlens.errors import PromptError, SsmlensError
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.recurrence import Recurrence
from ssmlens.stepping import Stepper

SMALL = {
    "mamba1": {"hidden_size": 4, "state_size": 2, "time_step_rank": 2, "expand": 1},
    "mamba2": {"hidden_size": 4, "state_size": 3, "expand": 1, "num_heads": 2, "head_dim": 2, "n_groups": 1},
}


def small(family: str) -> ssmlens.Lens:
    return ssmlens.load(getattr(checkpoints, family)(**SMALL[family]))


def random_ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(37, (1, length), generator=torch.Generator().manual_seed(seed))


# Latent


def test_latent_is_the_mean_log_decay_of_real_tokens_alone() -> None:
    lens = small("mamba1")
    ids, mask = random_ids(40).repeat(2, 1), torch.ones(2, 40, dtype=torch.long)
    mask[1, 25:] = 0
    found = lyapunov.latent(lens.trace(ids, attention_mask=mask), window=5)
    alone = lens.trace(ids[1, :25])
    for k, mixer in enumerate(alone):
        decays = mixer.recurrence.log_decay[0]
        assert torch.allclose(found.value[k, 1], decays.mean(0), atol=1e-14, rtol=0)
        windows = decays.unflatten(0, (5, 5)).mean(1)
        assert torch.allclose(found.columns["window_std"][k, 1], windows.std(0, unbiased=False), atol=1e-13)
    assert found.dims == ("layer", "batch", "head", "state")
    assert bool((found.columns["low"] <= found.value).all() & (found.value <= found.columns["high"]).all())


def test_latent_of_shared_decays_counts_their_entries() -> None:
    found = lyapunov.latent(small("mamba2").trace(random_ids(30)))
    assert found.dims == ("layer", "batch", "head")
    assert set(found.columns["multiplicity"].flatten().tolist()) == {6.0}


def test_latent_of_resets_and_delta_rules() -> None:
    x = torch.ones(1, 6, 2, 1, dtype=torch.float64)
    reset = torch.tensor([[False, False, True, False, False, False]])
    inputs = ScanInputs(value=x, write=x[:, :, :1], read=x[:, :, :1], log_decay=-0.5 * x, reset=reset)
    found = lyapunov.latent(Recurrence(inputs))
    assert found.value.flatten().tolist() == [-math.inf, -math.inf]
    assert not any(bool(found.columns[name].isnan().any()) for name in ("low", "high", "standard_error"))
    delta = inputs.replace(reset=None, erase_read=x[:, :, :1], erase_write=x[:, :, :1])
    with pytest.raises(SsmlensError, match="delta rule"):
        lyapunov.latent(Recurrence(delta))
    with pytest.raises(SsmlensError, match="between 1 and the 6 tokens"):
        lyapunov.latent(Recurrence(inputs), window=7)


# Stack


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_whole_spectrum_of_a_stack_is_its_decays_and_its_windows(family: str) -> None:
    lens, ids = small(family), random_ids(250)
    net = Stepper(lens)
    size = net.initial().size
    found = lyapunov.stack(lens, ids, size, every=3, control=False, discard=50)
    windows = sum(s.stop - s.start for _, name, s in net.initial().parts if name == "conv")
    finite = found.value.isfinite()
    assert int((~finite).sum()) == windows
    assert not bool(found.value.isnan().any())
    frozen = found.control["frozen_gates"]
    assert torch.equal(frozen.isfinite(), finite)
    # Theory's own limit, met to a few thousandths after 200 tokens.
    assert float((found.value - frozen)[finite].abs().max()) < 0.04
    assert float((found.value - frozen)[finite].abs().median()) < 0.005
    trace = lens.trace(ids)
    decays = [m.recurrence.log_decay[0, 50:].mean(0) for m in trace]
    copies = [m.recurrence.head_dim * (m.recurrence.d_state if family == "mamba2" else 1) for m in trace]
    union = torch.cat([d.flatten().repeat_interleave(n) for d, n in zip(decays, copies, strict=True)])
    assert torch.allclose(frozen[finite], union.sort(descending=True).values, atol=1e-12)


def test_stack_grows_as_its_dense_jacobians_do() -> None:
    lens, ids = small("mamba1"), random_ids(30)
    net = Stepper(lens)
    like = net.initial()
    x, product = like.flatten()[0], torch.eye(like.size, dtype=torch.float64)
    for t in range(30):
        J = torch.autograd.functional.jacobian(
            lambda y, t=t: net.step(like.unflatten(y[None]), ids[:, t])[0].flatten()[0], x
        )
        x, product = net.step(like.unflatten(x[None]), ids[:, t])[0].flatten()[0], J @ product
    found = lyapunov.stack(lens, ids, 3, discard=0, every=30, control=False)
    start = torch.linalg.qr(
        torch.randn(3, like.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).T
    )
    exact = torch.linalg.qr(product @ start[0])[1].diagonal().abs().log() / 30
    assert torch.allclose(found.value, exact.sort(descending=True).values, atol=1e-10)


def test_a_stopped_stack_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmlens.analyses.lyapunov._benettin.SAVE_SECONDS", 0.0)
    lens, ids, path = small("mamba2"), random_ids(60), tmp_path / "run"
    whole = lyapunov.stack(lens, ids, 4, every=5)

    def stop(done: int, total: int) -> None:
        if done >= 35:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lyapunov.stack(lens, ids, 4, every=5, resume=path, progress=stop)
    calls: list[int] = []
    again = lyapunov.stack(lens, ids, 4, every=5, resume=path, progress=lambda done, total: calls.append(done))
    assert calls[0] in (35, 40)
    assert torch.equal(again.value, whole.value)
    assert torch.equal(again.columns["high"], whole.columns["high"])
    with pytest.raises(SsmlensError, match=r"other settings \(ids\)"):
        lyapunov.stack(lens, random_ids(60, 1), 4, every=5, resume=path)


def test_stack_refusals() -> None:
    lens = small("mamba1")
    with pytest.raises(PromptError, match="but the text has 20"):
        lyapunov.stack(lens, random_ids(20), 2, steps=30)
    with pytest.raises(PromptError, match="that of one text, got 2"):
        lyapunov.stack(lens, random_ids(20).repeat(2, 1), 2)
    with pytest.raises(SsmlensError, match="k is at most the 40 dimensions"):
        lyapunov.stack(lens, random_ids(20), 41)


# Gain


def test_gain_of_a_model_is_that_of_its_dense_jacobian() -> None:
    lens, ids = small("mamba2"), random_ids(30)
    found = lyapunov.transient_gain(lens, ids, [1, 4, 8], starts=2, discard=5, iterations=100)
    net = Stepper(lens)
    like = net.initial()
    assert found.settings["starts"] == [5, 22]
    for h, gain in zip((1, 4, 8), found.value, strict=True):
        norms = []
        for at in (5, 22):
            state, _ = net.run(like, ids[:, :at], logits="none")
            J = torch.autograd.functional.jacobian(
                lambda y, at=at, h=h: net.advance(like.unflatten(y[None]), net.embed(ids[:, at : at + h]))[0].flatten()[
                    0
                ],
                state.flatten()[0],
            )
            norms.append(float(torch.linalg.matrix_norm(J, 2)))
        assert float(gain) == pytest.approx(max(norms), rel=2e-3)
    J1 = []
    for at in (5, 22):
        state, _ = net.run(like, ids[:, :at], logits="none")
        J = torch.autograd.functional.jacobian(
            lambda y, at=at: net.advance(like.unflatten(y[None]), net.embed(ids[:, at : at + 1]))[0].flatten()[0],
            state.flatten()[0],
        )
        J1.append(max(0.0, float(J.square().sum() - torch.linalg.eigvals(J).abs().square().sum())) ** 0.5)
    # Eight random vectors estimate the size of the Jacobian.
    assert found.settings["henrici"] == pytest.approx(sum(J1) / 2, rel=0.3)
    with pytest.raises(PromptError, match="need more than 30 tokens"):
        lyapunov.transient_gain(lens, ids, [30], discard=5)


# Closed loop


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_closed_loop_is_the_spectrum_of_its_map(family: str) -> None:
    lens, ids = small(family), random_ids(12)
    found = lyapunov.closed_loop(lens, ids, 10, 3, temperatures=[0.3, 2.0], discard=5, every=5)
    model = Model.of(lens, ids, torch.float64)
    for i, temperature in enumerate((0.3, 2.0)):
        exact = lyapunov.spectrum(
            lambda x, T=temperature: _loop(model, x, T)[0], _start(model), 10, 3, discard=5, every=5
        )
        assert torch.allclose(found.value[i], exact.value, atol=1e-9)
        assert torch.allclose(found.control["other_start"][i], exact.control["other_start"], atol=1e-9)
    assert bool((found.control["frozen_gates"] < 0).all())


def test_closed_loop_is_what_the_model_does_with_its_expectation() -> None:
    lens, ids = small("mamba1"), random_ids(12)
    model = Model.of(lens, ids, torch.float64)
    x = _start(model)
    after, logits = _loop(model, x, 0.7)
    net = model.net
    state, plain = net.run(net.initial(), ids)
    assert torch.allclose(logits, plain[:, -1], atol=1e-12)
    assert torch.allclose(after[: state.size], state.flatten()[0], atol=1e-12)
    assert torch.allclose(after[state.size :], torch.softmax(plain[0, -1] / 0.7, 0) @ net.embedding, atol=1e-12)


def test_feedback_can_undo_contraction() -> None:
    """A selective recurrence that only forgets, closed by a strong tanh feedback: some draws of it are chaotic."""
    g = torch.Generator().manual_seed(2)
    n, p = 4, 16
    W, B, C = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((p, p), (n, p), (n, p)))
    A = -torch.arange(1, n + 1, dtype=torch.float64)
    D = torch.randn(p, p, generator=g, dtype=torch.float64) / p**0.5

    def closed(x: Tensor) -> Tensor:
        h, u = x[: p * n].view(p, n), x[p * n :]
        dt = torch.nn.functional.softplus(D @ u - 1)
        h = torch.exp(dt[:, None] * A) * h + dt[:, None] * u[:, None] * (B @ u / p**0.5)
        y = h @ (C @ u / p**0.5)
        return torch.cat([h.flatten(), torch.tanh(4 * W @ (y + 0.5 * u) / p**0.5)])

    start = torch.randn(p * n + p, generator=g, dtype=torch.float64)
    found = lyapunov.closed_loop(closed, start, 150, 1, discard=100, control=False)
    assert float(found.columns["low"][0]) > 0
    twin = lyapunov.two_trajectory(closed, start, 150, discard=100)
    assert float(twin.value) == pytest.approx(float(found.value[0]), abs=0.02)


def test_closed_loop_goes_on_and_refuses(tmp_path: Path) -> None:
    lens, ids = small("mamba1"), random_ids(12)
    path = tmp_path / "loop"
    found = lyapunov.closed_loop(lens, ids, 10, 2, temperatures=[1.0, 0.5], discard=0, resume=path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["loop.temperature-0.5", "loop.temperature-1"]
    again = lyapunov.closed_loop(lens, ids, 10, 2, temperatures=[1.0, 0.5], discard=0, resume=path)
    assert torch.equal(found.value, again.value)
    for wrong in ([], [0.0], [1.0, 1.0], [math.inf]):
        with pytest.raises(SsmlensError, match="temperatures are different numbers above 0"):
            lyapunov.closed_loop(lens, ids, 10, temperatures=wrong)
    with pytest.raises(PromptError, match="two tokens"):
        lyapunov.closed_loop(lens, [3], 10)
    with pytest.raises(SsmlensError, match="takes a lens or a map"):
        lyapunov.closed_loop(3, ids)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes no window"):
        lyapunov.closed_loop(lens, ids, window=3)


# Divergence


def test_undisturbed_pairs_never_part_and_large_disturbances_do(tmp_path: Path) -> None:
    lens, ids = small("mamba2"), random_ids(12)
    calm = lyapunov.divergence(lens, ids, 30, pairs=4, size=1e-13, dtype=torch.float64)
    assert float(calm.columns["parted"][-1]) == 0 == float(calm.control["rounding_parted"][-1])
    assert float(calm.columns["kl"].max()) < 1e-12
    path = tmp_path / "run"
    wild = lyapunov.divergence(lens, ids, 60, pairs=8, size=3.0, resume=path)
    parted = wild.columns["parted"]
    assert float(parted[-1]) >= 0.5
    assert bool((parted.diff() >= 0).all())
    assert bool((wild.value <= parted).all())
    again = lyapunov.divergence(lens, ids, 60, pairs=8, size=3.0, resume=path)
    assert torch.equal(again.value, wild.value)
    with pytest.raises(SsmlensError, match="size is above 0"):
        lyapunov.divergence(lens, ids, 5, size=0.0)


def test_a_forgotten_disturbance_leaves_kl_falling() -> None:
    # While the tokens agree, KL is quadratic in the difference of the states: no slower than twice their exponent.
    lens, ids = small("mamba1"), random_ids(30)
    found = lyapunov.divergence(lens, ids, 60, pairs=8, size=1e-4, dtype=torch.float64)
    assert float(found.columns["parted"][-1]) == 0
    leading = float(lyapunov.latent(lens.trace(random_ids(300))).value.max())
    assert float(found.columns["rate"]) < 1.5 * leading < 0


def test_rate_and_kl_in_closed_form() -> None:
    t = torch.arange(40, dtype=torch.float64)
    kl = torch.stack([1e-6 * torch.exp(-0.3 * t), torch.full((40,), 1e-12, dtype=torch.float64)], 1)[..., None]
    differ = torch.zeros(40, 2, 1, dtype=torch.float64)
    assert float(_rate(kl, differ)) == pytest.approx(-0.3, abs=1e-12)
    # Where rounding or a different token takes over, nothing counts any more.
    kl[30:, 0] = 1e-11
    differ[35:, 0] = 1
    assert float(_rate(kl, differ)) == pytest.approx(-0.3, abs=1e-12)
    differ[1:, 0] = 1
    assert math.isnan(float(_rate(kl, differ)))
    p = torch.log_softmax(torch.randn(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 1)
    q = torch.log_softmax(p + torch.linspace(0, 1, 9), 1)
    assert torch.allclose(_kl(p, q), torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(1))
    shift = torch.randn(2, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    law = p.exp()
    small_shift = 1e-9 * (shift - (law * shift).sum(1, keepdim=True))
    exact = 0.5 * (law * small_shift**2).sum(1)
    assert torch.allclose(_kl(p, p + small_shift), exact, rtol=1e-4, atol=0)


# Summary


def test_summary_gathers_the_levels() -> None:
    lens, ids = small("mamba1"), random_ids(30)
    budget = lyapunov.Budget(k=2, steps=8, starts=1, horizon=4, pairs=2)
    told: list[str] = []
    found = lyapunov.summary(lens, ids, budget, progress=lambda level, done, total: told.append(level))
    assert found.coords["level"] == ["latent", "stack", "gain", "closed", "divergence"] == list(lyapunov.READING)
    assert list(dict.fromkeys(told)) == ["stack", "gain", "closed", "divergence"]
    assert float(found.value[0]) == float(lyapunov.latent(lens.trace(ids)).value.max())
    assert float(found.value[1]) == float(lyapunov.stack(lens, ids, 2).value[0])
    gain = lyapunov.transient_gain(lens, ids, [1, 2, 4], starts=1)
    assert float(found.value[2]) == pytest.approx(float(gain.value.max().log()))
    assert len(found.assumes) == 5
