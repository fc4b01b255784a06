"""Half-lives: closed forms, plain loops, ties, padding and the ends of the scale."""

from __future__ import annotations

import math

import memory_cases as cases
import pytest
import torch
from tolerances import EXACT

from ssmlens.analyses import memory

LN2 = math.log(2)


def loop_forward(log_decay: list[float], s: int) -> float:
    """First t - s with at most half of the write at s left, one step at a time."""
    left = 1.0
    for t in range(s + 1, len(log_decay)):
        left *= math.exp(log_decay[t])
        if left <= 0.5:
            return t - s
    return math.inf


def loop_backward(log_decay: list[float], t: int) -> float:
    """Age at t of the youngest write of which at most half is left, one step at a time."""
    left = 1.0
    for s in range(t - 1, -1, -1):
        left *= math.exp(log_decay[s + 1])
        if left <= 0.5:
            return t - s
    return math.inf


LOOPS = {"forward": loop_forward, "backward": loop_backward}


def changed(rec: cases.Recurrence, **pieces: torch.Tensor) -> cases.Recurrence:
    return cases.Recurrence(rec.inputs.replace(**pieces), lengths=rec.lengths)


@pytest.mark.parametrize("a", [0.3, 0.9, 0.99, 0.9999])
def test_constant_decay(a: float) -> None:
    rec = cases.constant(a, 100_000)
    expected = LN2 / -math.log(a)
    assert memory.half_life(rec).value.item() == pytest.approx(expected, rel=EXACT)
    assert memory.half_life(rec, "arithmetic").value.item() == pytest.approx(expected, rel=1e-9)
    for kind, token in (("forward", 0), ("backward", -1)):
        exact = memory.half_life(rec, kind, at=[token], interpolate=True).value.item()
        whole = memory.half_life(rec, kind, at=[token]).value.item()
        # The clock is a sum of up to 1e5 steps, and the ends of the text are 1e5 * -log(a) nats apart.
        assert exact == pytest.approx(expected, rel=1e-10)
        assert whole == math.ceil(expected)


@pytest.mark.parametrize("k", [1, 2, 3, 10, 70, 500])
def test_exactly_one_half_counts_as_one_half(k: int) -> None:
    rec = cases.constant(0.5 ** (1 / k), 3 * k + 1)
    for kind in LOOPS:
        assert memory.half_life(rec, kind, at=[k]).value.item() == k
        assert memory.half_life(rec, kind, quantiles=[0.1]).value.item() == k


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("form", cases.FORMS)
def test_equals_a_plain_loop_at_every_token(form: str, kind: str) -> None:
    rec = cases.random(form, lengths=[23, 14])
    found = memory.half_life(rec, kind, at=range(23)).value.reshape(2, 23, rec.n_heads, -1)
    for b, t, h, n in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        log_decay = cases.decays(rec, b, h, n)
        if t < len(log_decay):
            assert found[b, t, h, n].item() == LOOPS[kind](log_decay, t)
        else:
            assert math.isnan(found[b, t, h, n].item())


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("form", cases.FORMS)
def test_quantiles_equal_a_plain_count(form: str, kind: str) -> None:
    rec = cases.random(form, lengths=[23, 14])
    shares = (0.1, 0.25, 0.5, 0.9, 1.0)
    result = memory.half_life(rec, kind, quantiles=shares)
    assert result.coords["quantile"] == list(shares)
    value = result.value.reshape(2, rec.n_heads, -1, len(shares))
    reached = result.columns["reached"].reshape(2, rec.n_heads, -1)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, reached.shape)).tolist():
        log_decay = cases.decays(rec, b, h, n)
        lives = sorted(LOOPS[kind](log_decay, t) for t in range(len(log_decay)))
        for i, q in enumerate(shares):
            enough = [x for k, x in enumerate(lives, 1) if k >= q * len(lives) - 1e-9]
            assert value[b, h, n, i].item() == enough[0]
        assert reached[b, h, n].item() == pytest.approx(sum(map(math.isfinite, lives)) / len(lives))


@pytest.mark.parametrize("form", cases.FORMS)
def test_means_equal_a_plain_loop(form: str) -> None:
    rec = cases.random(form, lengths=[23, 14])
    shape = (2, rec.n_heads, cases.states(rec))
    geometric = memory.half_life(rec).value.reshape(shape)
    arithmetic = memory.half_life(rec, "arithmetic").value.reshape(shape)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        log_decay = cases.decays(rec, b, h, n)
        count = len(log_decay)
        assert geometric[b, h, n].item() == pytest.approx(LN2 / (-sum(log_decay) / count), rel=EXACT)
        mean = sum(math.exp(x) for x in log_decay) / count
        assert arithmetic[b, h, n].item() == pytest.approx(LN2 / -math.log(mean), rel=EXACT)
    assert (arithmetic > geometric).all()  # Jensen: the mean of the decays overstates memory


@pytest.mark.parametrize("n", [2, 3, 16])
@pytest.mark.parametrize("form", ["per-state", "scalar"])
def test_dividing_dt_by_n_multiplies_the_half_life_by_n(form: str, n: int) -> None:
    rec = cases.random(form)
    slower = memory.half_life(changed(rec, dt=rec.inputs.dt / n)).value
    torch.testing.assert_close(slower, n * memory.half_life(rec).value, rtol=EXACT, atol=0)


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("n", [2, 5])
def test_each_token_as_n_tokens_of_an_nth_of_dt_multiplies_every_half_life_by_n(n: int, kind: str) -> None:
    rec = cases.random("per-state", batch=1)

    def stretch(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(n, dim=1)

    pieces = {k: x if k == "A" else stretch(x) for k, x in rec.inputs.tensors().items()}
    slow = cases.Recurrence(cases.ScanInputs(**{**pieces, "dt": pieces["dt"] / n}))
    once = memory.half_life(rec, kind, at=range(23), interpolate=True).value
    # The last of the n tokens stands where the whole token stood.
    many = memory.half_life(slow, kind, at=[n * t + n - 1 for t in range(23)], interpolate=True).value
    reached = once.isfinite()
    assert reached.any()
    torch.testing.assert_close(many[reached], n * once[reached], rtol=1e-10, atol=0)
    if kind == "forward":
        assert (many.isfinite() == reached).all()


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_a_token_with_dt_zero_forgets_nothing(kind: str) -> None:
    rec, at = cases.random("per-state", batch=1), 11

    def insert(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :at], torch.zeros_like(x[:, :1]), x[:, at:]], 1)

    longer = cases.Recurrence(
        cases.ScanInputs(**{k: x if k == "A" else insert(x) for k, x in rec.inputs.tensors().items()})
    )
    before = memory.half_life(rec, kind, at=range(23)).value[0]
    tokens = torch.tensor([t + (t >= at) for t in range(23)])
    after = memory.half_life(longer, kind, at=tokens.tolist()).value[0]
    # Each half-life starts and ends at the same tokens as before: it is longer by the inserted one if it spans it.
    sign = 1 if kind == "forward" else -1
    start = torch.arange(23)[:, None, None]
    old_end, new_end = start + sign * before, tokens[:, None, None] + sign * after
    # Looking back, the inserted token itself is the youngest that old, where it used to be the one before it.
    assert torch.equal(new_end, old_end + (old_end >= (at if kind == "forward" else at - 1)))
    kept, still = memory.retention(rec, 5, 20).value, memory.retention(longer, 5, 21).value
    torch.testing.assert_close(kept, still, rtol=EXACT, atol=0)
    # Averaged over time the same nats are spread over one more token.
    mean, spread = memory.half_life(rec).value, memory.half_life(longer).value
    torch.testing.assert_close(spread, mean * 24 / 23, rtol=EXACT, atol=0)


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("kind", memory.KINDS)
def test_a_padded_batch_equals_its_single_runs(form: str, kind: str) -> None:
    rec = cases.random(form, batch=3, lengths=[23, 1, 9])
    together = memory.half_life(rec, kind)
    for b in range(3):
        alone = memory.half_life(cases.single(rec, b), kind)
        torch.testing.assert_close(together.value[b], alone.value[0], rtol=EXACT, atol=0)
        for name, x in {**alone.columns, **alone.control}.items():
            ours = {**together.columns, **together.control}[name]
            torch.testing.assert_close(ours[b], x[0], rtol=EXACT, atol=0)


@pytest.mark.parametrize("kind", memory.KINDS)
def test_what_never_decays_has_an_infinite_half_life(kind: str) -> None:
    for rec in (cases.constant(1.0, 9), changed(cases.random("scalar"), A=torch.zeros(3, 1, dtype=torch.float64))):
        assert (memory.half_life(rec, kind).value == math.inf).all()


@pytest.mark.parametrize("kind", memory.KINDS)
def test_one_token(kind: str) -> None:
    value = memory.half_life(cases.constant(0.5, 1), kind).value
    # One step halves; but no write in this text has another token to be halved at.
    assert (value == (1.0 if kind in ("mean", "arithmetic") else math.inf)).all()


def test_tiny_and_huge_decays() -> None:
    assert memory.half_life(cases.constant(1 - 1e-13, 50)).value.item() == pytest.approx(LN2 / 1e-13, rel=1e-3)
    rec = cases.random("per-state", batch=1)
    dt = rec.inputs.dt.clone()
    dt[:, 10] = 1e30
    huge = changed(rec, dt=dt)
    assert (memory.half_life(huge).value < 1e-27).all()
    ahead = memory.half_life(huge, "forward", at=range(23)).value[0]
    assert (ahead[:10] <= 10 - torch.arange(10)[:, None, None]).all()
    # After the huge step the clock still tells small ones apart.
    rest = memory.half_life(cases.Recurrence(rec.inputs.slice(10, 23)), "forward", at=range(13)).value[0]
    assert torch.equal(ahead[10:], rest)


def test_minus_infinity_forgets_at_once() -> None:
    rec = cases.random("explicit", batch=1)
    log_decay = rec.inputs.log_decay.clone()
    log_decay[:, 10] = -torch.inf
    gone = changed(rec, log_decay=log_decay)
    assert (memory.half_life(gone).value == 0).all()
    assert (memory.half_life(gone, "forward", at=[9]).value == 1).all()
    assert (memory.half_life(gone, "backward", at=[10]).value == 1).all()


def test_packed_boundaries_end_a_write_but_are_no_decay_of_the_model() -> None:
    rec = cases.random("per-state")
    reset = torch.zeros(2, 23, dtype=torch.bool)
    reset[:, 10] = True
    packed = changed(rec, reset=reset)
    torch.testing.assert_close(memory.half_life(packed).value, memory.half_life(rec).value)
    assert (memory.half_life(packed, "forward", at=[9]).value == 1).all()


def test_groups_of_heads_are_searched_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rec = cases.random("per-state", lengths=[23, 14])
    whole = memory.half_life(rec, "backward")
    monkeypatch.setattr("ssmlens.analyses._layers.BLOCK_ENTRIES", 1)
    torch.testing.assert_close(memory.half_life(rec, "backward").value, whole.value, rtol=0, atol=0)


def test_the_delta_rule_is_declared_not_measured() -> None:
    rec = cases.random("explicit")
    erased = changed(rec, erase_read=rec.inputs.write, erase_write=rec.inputs.write)
    assert any("delta rule" in sentence for sentence in memory.half_life(erased).assumes)
    assert not any("delta rule" in sentence for sentence in memory.half_life(rec).assumes)


def test_refusals() -> None:
    rec = cases.random("scalar")
    with pytest.raises(ValueError, match="choose one of mean, arithmetic, forward, backward"):
        memory.half_life(rec, "median")
    with pytest.raises(ValueError, match="at most 1, got 90"):
        memory.half_life(rec, "forward", quantiles=[90])
    with pytest.raises(ValueError, match="no token was chosen"):
        memory.half_life(rec, "forward", at=[])
    with pytest.raises(ValueError, match="token -24 does not exist"):
        memory.half_life(rec, "forward", at=[-24])
    with pytest.raises(ValueError, match="pass a Trace, a MixerTrace or a Recurrence, not dict"):
        memory.half_life({})
    with pytest.raises(ValueError, match="this recurrence holds no tokens"):
        memory.half_life(cases.Recurrence(rec.inputs.slice(3, 3)))


@pytest.mark.parametrize(
    ("form", "name", "bad", "sentence"),
    [
        ("scalar", "dt", math.nan, "dt of this recurrence holds NaN"),
        ("scalar", "dt", -1.0, "dt of this recurrence is negative"),
        ("per-state", "A", math.nan, "A of this recurrence holds NaN"),
        ("per-state", "A", 0.1, "A of this recurrence is positive"),
        ("explicit", "log_decay", math.nan, "log_decay of this recurrence holds NaN"),
        ("explicit", "log_decay", 0.1, "log_decay of this recurrence is positive"),
    ],
)
def test_decays_that_are_none_are_refused(form: str, name: str, bad: float, sentence: str) -> None:
    rec = cases.random(form)
    piece = getattr(rec.inputs, name).clone()
    piece.view(-1)[0] = bad
    for study in (memory.half_life, memory.mean_distance, memory.summary):
        with pytest.raises(ValueError, match=sentence):
            study(changed(rec, **{name: piece}))


def test_padding_may_hold_anything() -> None:
    rec = cases.random("per-state", lengths=[23, 9])
    dt = rec.inputs.dt.clone()
    dt[1, 9:] = math.nan
    torch.testing.assert_close(memory.half_life(changed(rec, dt=dt)).value, memory.half_life(rec).value)


@pytest.mark.parametrize("length", [32766, 32767, 32768, 40_000])
@pytest.mark.parametrize("kind", LOOPS)
def test_texts_longer_than_a_short_integer(kind: str, length: int) -> None:
    result = memory.half_life(cases.constant(0.9, length), kind, quantiles=[0.5, 1.0])
    assert result.value.flatten().tolist() == [7, math.inf]  # 0.9^6 > 1/2 > 0.9^7
    assert result.columns["reached"].item() == pytest.approx(1 - 7 / length, rel=EXACT)


@pytest.mark.parametrize("study", [memory.half_life, memory.mean_distance, memory.summary])
def test_a_recurrence_with_gradients_gives_plain_numbers(study) -> None:
    rec = cases.random("per-state")
    learned = changed(rec, A=rec.inputs.A.clone().requires_grad_())
    result = study(learned)
    assert not result.value.requires_grad
    torch.testing.assert_close(result.value, study(rec).value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_half_lives_of_a_long_text_are_counted_as_well_as_sorted(kind: str) -> None:
    length = 2**15 + 100
    rec = cases.random("per-state", batch=1, length=length)
    counted = memory.half_life(rec, kind, quantiles=[0.01, 0.5, 0.9])
    every = memory.half_life(rec, kind, at=range(length)).value.sort(1).values
    picks = [math.ceil(q * length * (1 - 1e-12)) - 1 for q in (0.01, 0.5, 0.9)]
    torch.testing.assert_close(counted.value, every[:, picks].movedim(1, -1), rtol=0, atol=0)
