"""KL of a model with a rounded state: against plain float64 steps, exact cases, and a run killed half-way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stepper import step_through
from tiny import tiny_mamba1, tiny_mamba2, tiny_tokenizer

import ssmlens
from ssmlens.analyses import precision
from ssmlens.analyses.precision import _divergence
from ssmlens.errors import PromptError, SsmlensError

IDS = [(7 * k * k + 3) % 251 for k in range(30)]


def lens_of(make, dtype=torch.float64):
    return ssmlens.load(make().to(dtype))


def plain_kl(model, ids, change) -> torch.Tensor:
    """KL(t) of the plainly stepped model against itself with ``change(layer, state)`` carried on."""

    def hook(name, layer, t, value):
        return change(layer, value) if name == "carried" else value

    exact, short = (step_through(model, ids, h).log_softmax(-1) for h in (None, hook))
    return (exact.exp() * (exact - short)).sum(-1)  # good to 1e-15


@pytest.mark.parametrize("name", ["bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("make", [tiny_mamba1, tiny_mamba2])
def test_equals_a_model_stepped_in_plain_float64(make, name: str) -> None:
    lens, to = lens_of(make), precision.format_of(name)
    found = precision.divergence(lens, IDS, [name], variants=("all",))
    expected = plain_kl(lens.model, IDS, lambda layer, h: precision.rounded(h, to))
    assert torch.allclose(found.value[0, 0, 0], expected, rtol=1e-6, atol=2e-15)
    assert expected.max() > 1e-12
    assert found.value[0, 0, 0, 0] == 0  # the first token reads no rounded state
    assert found.control["own_forward"].max() < 1e-24


def test_only_the_slow_heads_are_rounded() -> None:
    lens, to = lens_of(tiny_mamba2), precision.format_of("float8_e5m2")
    masks = precision.slowest(lens.trace(IDS), 0.25)
    assert sum(int(x.sum()) for x in masks) == 6  # of 24
    found = precision.divergence(lens, IDS, [to], variants=("slow", "rest"), share=0.25)
    for i, keep in enumerate((masks, [~x for x in masks])):
        expected = plain_kl(
            lens.model, IDS, lambda k, h, keep=keep: torch.where(keep[k][:, None], precision.rounded(h, to), h)
        )
        assert torch.allclose(found.value[0, i, 0], expected, rtol=1e-6, atol=2e-15)


@pytest.mark.parametrize("make", [tiny_mamba1, tiny_mamba2])
def test_slowest_are_those_with_the_longest_half_lives(make) -> None:
    trace = lens_of(make).trace(IDS)
    masks = precision.slowest(trace, 0.1)
    nats = [-m.recurrence.log_decay.mean((0, 1)) for m in trace]
    assert all(mask.shape == x.shape for mask, x in zip(masks, nats))
    slow = torch.cat([x[mask] for x, mask in zip(nats, masks)])
    fast = torch.cat([x[~mask] for x, mask in zip(nats, masks)])
    assert len(slow) == round(0.1 * (len(slow) + len(fast)))
    assert slow.max() <= fast.min()


def test_a_state_in_its_own_format_changes_nothing() -> None:
    found = precision.divergence(
        lens_of(tiny_mamba2, torch.float32), IDS, ["float32"], variants=("all", "slow"), conv=True
    )
    assert torch.equal(found.value, torch.zeros_like(found.value))
    assert bool((found.columns["agreement"] == 1).all())
    assert found.control["own_forward"].max() < 1e-9
    assert bool(found.control["short_weights"].isnan().all())


def test_the_window_is_rounded_when_asked() -> None:
    lens = lens_of(tiny_mamba2)
    values = [precision.divergence(lens, IDS, ["fp8"], variants=("all",), conv=c).value for c in (False, True)]
    assert not torch.equal(*values)


def test_padding_is_nan_and_changes_nothing() -> None:
    lens = ssmlens.load(tiny_mamba1().double(), tokenizer=tiny_tokenizer())
    rows = ["The red box is K7. The red box", "Nothing in it."]
    both = precision.divergence(lens, rows, ["bf16"], variants=("all",))
    for row, text in enumerate(rows):
        one, length = precision.divergence(lens, text, ["bf16"], variants=("all", "slow")), len(text)
        assert torch.allclose(both.value[:, 0, row, :length], one.value[:, 0, 0], rtol=1e-6, atol=2e-15)
        assert bool(both.value[:, 0, row, length:].isnan().all())
        assert both.columns["loss_change"][0, 0, row].isfinite().sum() == length - 1


def test_short_weights_are_the_model_in_that_format() -> None:
    lens = lens_of(tiny_mamba2, torch.float32)
    found = precision.divergence(lens, IDS, ["bfloat16", "fp8"], variants=("all",))
    short = ssmlens.load(tiny_mamba2().to(torch.bfloat16)).trace(IDS).logits[0].double().log_softmax(-1)
    exact = lens.trace(IDS).logits[0].double().log_softmax(-1)
    expected = (exact.exp() * (exact - short)).sum(-1)
    ours = found.control["short_weights"]
    assert ours[0, 0, 0].mean().item() == pytest.approx(expected.mean().item(), rel=0.3)
    assert bool(ours[1].isnan().all())


def test_killed_half_way_it_goes_on(tmp_path, monkeypatch) -> None:
    lens, file = lens_of(tiny_mamba2, torch.float32), tmp_path / "run.jsonl"
    settings = {"dtypes": ["bfloat16", "float16"], "variants": ("all", "stochastic")}
    whole = precision.divergence(lens, IDS, **settings)

    def stop(done: int, total: int) -> None:
        assert total == 60
        if done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precision.divergence(lens, IDS, **settings, resume=file, progress=stop)
    runs, inner = [], _divergence._run
    monkeypatch.setattr(
        _divergence, "_run", lambda net, trace, to, *rest: runs.append(to.name) or inner(net, trace, to, *rest)
    )
    done = precision.divergence(lens, IDS, **settings, resume=file)
    assert runs == ["float16"]
    assert torch.equal(done.value, whole.value)
    with pytest.raises(SsmlensError, match=r"other settings \(share\)"):
        precision.divergence(lens, IDS, **settings, resume=file, share=0.2)


@pytest.mark.parametrize("name", ["mamba1-recall", "mamba2-recall"])
def test_shipped_models_against_float32_itself(name: str) -> None:
    found = precision.divergence(ssmlens.load(name), ssmlens.zoo.passage(name), ["fp8"], variants=("all", "rest"))
    assert found.columns["mean"].min() > 1e3 * found.control["own_forward"].mean()


def test_on_a_long_text_the_slow_heads_count_for_more_than_as_many_others() -> None:
    lens = ssmlens.load("mamba2-english")
    text = (Path(ssmlens.zoo.__file__).parent / "passages" / "persuasion.txt").read_text(encoding="utf-8")[:1200]
    found = precision.divergence(lens, text, ["bfloat16"], variants=("slow", "random"))
    mean = dict(zip(found.coords["rounded"], found.columns["mean"][0, :, 0, 0].tolist()))
    assert mean["slow"] > 3 * mean["random"] > 0
    assert float(found.control["own_forward"].mean()) < 1e-3 * mean["slow"]
    assert bool((found.columns["mean_low"] <= found.columns["mean"]).all())
    assert bool((found.columns["mean_high"] >= found.columns["mean"]).all())


def test_one_format_needs_no_list() -> None:
    lens = lens_of(tiny_mamba2)
    one, listed = (precision.divergence(lens, IDS, x, variants=("all",)) for x in ("bfloat16", ["bfloat16"]))
    assert torch.equal(one.value, listed.value)


def test_refusals() -> None:
    lens = lens_of(tiny_mamba2)
    with pytest.raises(SsmlensError, match="variants are all, slow, random, rest, stochastic, at least one"):
        precision.divergence(lens, IDS, variants=("half",))
    with pytest.raises(SsmlensError, match="share lies between 0 and 1, got 1"):
        precision.divergence(lens, IDS, share=1)
    with pytest.raises(SsmlensError, match="unknown number format"):
        precision.divergence(lens, IDS, ["int4"])
    with pytest.raises(PromptError):
        precision.divergence(lens, [])
