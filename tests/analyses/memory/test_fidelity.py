"""Memory fidelity: closed forms, chance, held-out tokens, controls, resuming, and real models."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import memory_cases as cases
import pytest
import torch
from tiny import tiny_mamba1, tiny_mamba2, tiny_tokenizer

import ssmlens
from ssmlens.analyses import memory
from ssmlens.errors import SsmlensError
from ssmlens.recurrence import Recurrence

TINY = {
    "mamba1": partial(tiny_mamba1, hidden_size=16, state_size=4),
    "mamba2": partial(tiny_mamba2, hidden_size=16, num_heads=4, state_size=4),
}


def white(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaky(u: torch.Tensor, a: float | torch.Tensor) -> torch.Tensor:
    """h[t] = a h[t-1] + u[t], by the naive loop."""
    out, h = [], torch.zeros(u.shape[1:], dtype=torch.float64)
    for x in u:
        h = a * h + x
        out.append(h)
    return torch.stack(out)


def delay_line(u: torch.Tensor, delay: int) -> torch.Tensor:
    """(t, delay * d) the last ``delay`` inputs, mixed by a fixed invertible matrix."""
    lines = [torch.cat([torch.zeros(k, u.shape[1], dtype=u.dtype), u[: len(u) - k]]) for k in range(delay)]
    states = torch.cat(lines, 1)
    return states @ white(states.shape[1], states.shape[1], seed=9)


@pytest.mark.parametrize(("delay", "d"), [(1, 2), (5, 3), (12, 1)])
def test_a_delay_line_is_read_exactly_up_to_its_delay_and_at_chance_beyond(delay: int, d: int) -> None:
    u = white(3000, d)
    found = memory.fidelity(delay_line(u, delay), u, range(2 * delay + 2))
    inside = torch.tensor(found.coords["lag"]) < delay
    for name in ("net", "cosine", "low"):
        assert (found.columns[name][inside] > 1 - 1e-6).all()
    assert (found.value[inside] > 1 - 1e-9).all()
    assert found.value[~inside].abs().max() < 0.01
    assert found.columns["cosine"][~inside].abs().max() < 0.12  # 4 standard errors of 740 random signs
    assert found.control["chance"].abs().max() < 0.01
    assert found.columns["span"].item() == max(0, delay - 1)


def test_one_leaky_unit() -> None:
    a, lags = 0.9, [0, 1, 2, 4, 8, 16]
    u = white(60_000)
    found = memory.fidelity(leaky(u, a), u, lags)
    for r2, low, high, k in zip(found.value, found.columns["low"], found.columns["high"], lags):
        exact = (1 - a * a) * a ** (2 * k)
        # Sampling error of a squared correlation over 15,000 tokens that are correlated over 1 / (1 - a^2) of them.
        assert abs(r2.item() - exact) < 4 * math.sqrt(exact * (1 + a * a) / (1 - a * a) / 15_000)
        assert low < high
    inside = (found.columns["low"] <= torch.tensor([(1 - a * a) * a ** (2 * k) for k in lags])).sum()
    assert inside >= 5


def test_two_leaky_units_of_one_input_reach_their_joint_capacity() -> None:
    # Two units with decays a and b: R2 = p' inv(C) p, with C[i, j] = 1 / (1 - a_i a_j) and p = (a^k, b^k).
    a = torch.tensor([0.5, 0.9], dtype=torch.float64)
    u = white(30_000)
    states = leaky(u[:, None].expand(-1, 2), a)
    found = memory.fidelity(states, u, [0, 1, 2, 3, 5])
    gram = 1 / (1 - a[:, None] * a)
    for k, r2 in zip(found.coords["lag"], found.value.tolist()):
        p = a**k
        assert r2 == pytest.approx(float(p @ torch.linalg.solve(gram, p)), abs=0.015)


def test_noise_is_at_chance() -> None:
    for features, d in ((40, 5), (3, 1)):
        found = memory.fidelity(white(4000, features), white(4000, d, seed=1))
        assert found.value.abs().max() < 0.01
        assert found.columns["cosine"].abs().max() < 0.13
        assert found.columns["span"].item() == 0
        # The interval knows: the truth, zero, lies below its upper end at nearly every lag.
        assert (found.columns["high"] > -1e-3).double().mean() > 0.9


def test_noise_without_ridge_would_be_overfitted() -> None:
    # Nearly as many features as fitted tokens: the ridge of the folds keeps the held-out R2 at zero.
    found = memory.fidelity(white(400, 200), white(400, 3, seed=1), [0, 1, 2])
    assert found.value.abs().max() < 0.05


def test_autocorrelated_targets_are_told_by_the_token_itself() -> None:
    # States that know u[t] alone tell of u[t - k] what u[t] does, and nothing is left net of that.
    u = leaky(white(20_000, 3), 0.8)
    found = memory.fidelity(u, u, [0, 1, 2, 4])
    expected = torch.tensor([0.8 ** (2 * k) for k in (0, 1, 2, 4)], dtype=torch.float64)
    torch.testing.assert_close(found.value, expected, rtol=0, atol=0.04)
    torch.testing.assert_close(found.control["current"], found.value, rtol=0, atol=1e-3)
    assert found.columns["net"][0] == pytest.approx(1, abs=1e-6)
    assert found.columns["net"][1:].abs().max() < 0.01


def test_whole_numbers_are_classes() -> None:
    ids = torch.randint(5, (2000,), generator=torch.Generator().manual_seed(0))
    states = torch.nn.functional.one_hot(ids.roll(2), 5).double()
    found = memory.fidelity(states, ids, [0, 1, 2, 3])
    assert found.value[2] == pytest.approx(1, abs=1e-9)
    assert found.value[[0, 1, 3]].abs().max() < 0.02


def test_a_recurrence_is_read_by_its_values() -> None:
    # Decay 0: the state is the last write, and nothing else.
    values = white(1, 2000, 2, 3)
    ones = torch.ones(1, 2000, 1, 1, dtype=torch.float64)
    forgets = cases.ScanInputs(
        value=values, write=ones, read=ones, log_decay=torch.full((1, 2000, 2, 1), -1e4, dtype=torch.float64)
    )
    found = memory.fidelity(Recurrence(forgets), lags=[0, 1, 2])
    assert found.value[0] == pytest.approx(1, abs=1e-9)
    assert found.value[1:].abs().max() < 0.02
    # A decay shared by all of its heads: every value is a leaky unit.
    keeps = forgets.replace(log_decay=torch.full((1, 2000, 2, 1), math.log(0.7), dtype=torch.float64))
    found = memory.fidelity(Recurrence(keeps), lags=[0, 1, 2, 3])
    exact = torch.tensor([0.51 * 0.49**k for k in range(4)], dtype=torch.float64)
    torch.testing.assert_close(found.value, exact, rtol=0, atol=0.06)


def test_many_features_are_cut_to_the_axes_that_matter() -> None:
    u = white(1500, 4)
    wide = delay_line(u, 3) @ white(12, 1500, seed=5)
    found = memory.fidelity(wide + 1e-3 * white(1500, 1500, seed=6), u, range(5), rank=16)
    assert found.columns["explained"].item() > 0.999
    assert (found.value[:3] > 0.99).all()
    assert found.value[3:].abs().max() < 0.02


def test_a_large_common_mode_and_units_do_not_matter() -> None:
    u = white(3000, 2)
    states = delay_line(u, 3)
    shifted = 1e4 + 1e-3 * states
    a, b = (memory.fidelity(x, 7 - 100 * u, range(5)).value for x in (states, shifted))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_sequences_are_held_out_whole_and_padding_never_counts() -> None:
    u = white(12, 200, 2)
    states = torch.cat([u, u.roll(1, 1)], -1)
    found = memory.fidelity(states, u, [0, 1, 2])
    assert found.settings["held_out_tokens"] == 3 * 198
    assert found.settings["fitted_tokens"] == 9 * 198
    assert found.value[2].abs() < 0.05
    assert (found.value[:2] > 1 - 1e-9).all()


def test_the_summary_is_the_mean_over_the_past_with_its_interval() -> None:
    u = white(16, 100, 2)
    states = torch.cat([u.roll(k, 1) + 0.5 * white(16, 100, 2, seed=k + 3) for k in (0, 1, 3)], -1)
    found = memory.fidelity(states, u, [0, 1, 2, 3])
    for ending, net in (("", "net"), ("_r2", "net_r2")):
        mean = found.columns[f"etmf{ending}"].item()
        assert mean == pytest.approx(found.columns[net][1:].mean().item())
        assert found.columns[f"etmf{ending}_low"].item() < mean < found.columns[f"etmf{ending}_high"].item()
        assert found.columns[f"span{ending}"].item() == 3


def test_the_same_seed_gives_the_same_numbers_and_another_one_others() -> None:
    u = white(16, 100, 2)
    states = u.roll(1, 1) + 0.3 * white(16, 100, 2, seed=3)
    once, again, other = (memory.fidelity(states, u, [1], seed=s) for s in (0, 0, 1))
    assert torch.equal(once.value, again.value)
    assert torch.equal(once.columns["net_low"], again.columns["net_low"])
    assert not torch.equal(once.value, other.value)


@pytest.fixture(scope="module", params=TINY)
def trace(request: pytest.FixtureRequest) -> ssmlens.Trace:
    lens = ssmlens.load(TINY[request.param](), tokenizer=tiny_tokenizer(), dtype=torch.float64)
    ids = torch.randint(0, 256, (10, 60), generator=torch.Generator().manual_seed(0))
    return lens.trace(ids)


@pytest.mark.parametrize("features", ["state", "output", "residual"])
def test_a_trace_reads_the_embeddings_of_its_tokens(trace: ssmlens.Trace, features: str) -> None:
    found = memory.fidelity(trace, lags=[0, 1, 4], features=features)
    assert found.dims == ("layer", "lag")
    assert found.shape == (3, 3)
    assert found.settings["reads"] == "token embeddings"
    if features == "residual":
        # The residual stream before the first layer is the embedding.
        assert found.value[0, 0] > 0.95
        assert found.value[0, 1:].abs().max() < 0.1
        plain = memory.fidelity(trace, lags=[0], features=features, unit_norm=False)
        assert plain.value[0, 0] == pytest.approx(1, abs=1e-9)
    alone = memory.fidelity(trace, lags=[0, 1, 4], features=features, layers=[1])
    assert alone.coords["layer"] == [1]
    torch.testing.assert_close(alone.value[0], found.value[1])


def test_padding_is_as_if_it_were_not_there() -> None:
    lens = ssmlens.load(TINY["mamba2"](), tokenizer=tiny_tokenizer(), dtype=torch.float64)
    ids = torch.randint(0, 256, (9, 50), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[3, 40:] = 0
    padded = lens.trace(ids, attention_mask=mask)
    other = lens.trace(torch.where(mask.bool(), ids, 7), attention_mask=mask)
    a, b = (memory.fidelity(t, lags=[0, 2]) for t in (padded, other))
    torch.testing.assert_close(a.value, b.value, rtol=1e-6, atol=1e-9)
    assert a.settings["fitted_tokens"] + a.settings["held_out_tokens"] == 8 * 48 + 38


def test_an_interrupted_run_goes_on(trace: ssmlens.Trace, tmp_path: Path) -> None:
    whole = memory.fidelity(trace, lags=[0, 1])
    file = tmp_path / "run.jsonl"

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memory.fidelity(trace, lags=[0, 1], resume=file, progress=stop)
    kept = file.read_text()
    assert kept.count("\n") == 4  # settings, controls, two layers
    seen: list[tuple[int, int]] = []
    found = memory.fidelity(trace, lags=[0, 1], resume=file, progress=lambda *x: seen.append(x))
    assert file.read_text().startswith(kept)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(found.value, whole.value)
    assert torch.equal(found.columns["net_low"], whole.columns["net_low"])
    with pytest.raises(SsmlensError, match="other settings"):
        memory.fidelity(trace, lags=[0, 2], resume=file)


def test_a_lens_reads_prompts() -> None:
    lens = ssmlens.load(TINY["mamba1"](), tokenizer=tiny_tokenizer())
    text = "The key was under the mat, and nobody had looked there for years. " * 3
    found = memory.fidelity(lens, text, [0, 1])
    direct = memory.fidelity(lens.trace(text), lags=[0, 1])
    torch.testing.assert_close(found.value, direct.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(50, 2),), "pass targets"),
        ((torch.ones(50, 2), torch.ones(40, 2)), "one target for each state"),
        ((torch.ones(50, 2), white(50, 2)), "features do not vary"),
        ((white(50, 2), torch.ones(50, 2)), "targets do not vary"),
        ((white(50, 2), torch.ones(50, 2), [60]), "lags are whole numbers from 0 to 49"),
        ((white(50, 2), torch.ones(50, 2), [-1]), "lags are whole numbers"),
        ((white(30, 2), white(30, 2), [20]), "tokens are left"),
        ((white(50, 2), torch.full((50, 2), torch.nan)), "targets hold NaN"),
        ((torch.full((50, 2), torch.nan), white(50, 2)), "features hold NaN"),
        ((white(2, 3, 4, 5), white(50, 2)), r"states are \(t, n\)"),
    ],
)
def test_refusals(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory.fidelity(*arguments)


def test_refused_settings(trace: ssmlens.Trace) -> None:
    with pytest.raises(ValueError, match="unknown features"):
        memory.fidelity(trace, features="gate")
    with pytest.raises(ValueError, match="layer 7 was not traced"):
        memory.fidelity(trace, layers=[7])
    with pytest.raises(ValueError, match="held-out share"):
        memory.fidelity(white(200, 2), white(200, 2), held_out=1.5)
    with pytest.raises(ValueError, match="rank is a whole number"):
        memory.fidelity(white(200, 2), white(200, 2), rank=0)
    with pytest.raises(ValueError, match="only a whole trace"):
        memory.fidelity(trace[0], features="residual")
    lens = ssmlens.load(TINY["mamba1"](), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="prompt"):
        memory.fidelity(lens)
