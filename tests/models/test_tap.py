"""The tap leaves no trace on the model: logits, globals, hooks, modes, after errors too."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import gap
from footprint import IDS, assert_same, fingerprint, plain_logits, same_trace
from torch import nn

import ssmlens
from ssmlens.errors import SsmlensError
from ssmlens.tap import tapping

FAMILIES = ["mamba1", "falcon", "mamba2"]


def build(family: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    return getattr(checkpoints, family)(**config).to(dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_bitwise_those_of_the_untapped_model(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype)
    expected, before = plain_logits(model), fingerprint(model)
    trace = ssmlens.load(model).trace(IDS, scan="model")
    assert torch.equal(trace.logits, expected)
    assert torch.equal(plain_logits(model), expected)
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_float64_lens_are_those_of_its_model(family: str) -> None:
    lens = ssmlens.load(build(family), dtype=torch.float64)
    before = fingerprint(lens.model)
    trace = lens.trace(IDS, scan="model")
    assert trace.logits.dtype == torch.float64
    assert torch.equal(trace.logits, plain_logits(lens.model))
    assert_same(before, fingerprint(lens.model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [True, False])
def test_modes_come_back_and_the_trace_runs_in_eval(family: str, training: bool) -> None:
    model = build(family).train(training)
    model.get_submodule("backbone.layers.1").train(not training)
    seen: list[bool] = []
    model.backbone.layers[0].register_forward_pre_hook(lambda m, args: seen.append(m.training))
    before = fingerprint(model)
    ssmlens.load(model).trace(IDS)
    assert seen == [False]
    assert_same(before, fingerprint(model))


class Failure(Exception):
    """Raised on purpose."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.out_proj", "lm_head"])
def test_an_exception_in_the_forward_leaves_nothing_behind(family: str, place: str) -> None:
    model = build(family).train()
    lens = ssmlens.load(model)
    expected = plain_logits(model.eval())
    model.train()

    def fail(module: nn.Module, args: Any) -> None:
        raise Failure(place)

    handle = model.get_submodule(place).register_forward_pre_hook(fail)
    before = fingerprint(model)
    with pytest.raises(Failure):
        lens.trace(IDS)
    assert_same(before, fingerprint(model))
    handle.remove()
    assert torch.equal(lens.trace(IDS).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_in_on_scan_leaves_nothing_behind(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmlens import lens as module

    model = build(family)
    lens, before = ssmlens.load(model), fingerprint(model)

    def fail(self: Any, call: Any) -> None:
        raise Failure

    with monkeypatch.context() as patch:
        patch.setattr(module.Recorder, "on_scan", fail)
        with pytest.raises(Failure):
            lens.trace(IDS)
    assert_same(before, fingerprint(model))
    assert torch.equal(lens.trace(IDS).logits, plain_logits(model))


def test_a_mixer_that_goes_around_the_scan_is_noticed() -> None:
    """A fused path, or a mixer whose forward somebody exchanged, must not give an empty trace in silence."""
    model = build("mamba2")
    mixer = model.backbone.layers[1].mixer
    mixer.forward = lambda hidden_states, **kwargs: hidden_states
    before = fingerprint(model)
    with pytest.raises(SsmlensError, match=r"layer 1 never passed the tap"):
        ssmlens.load(model).trace(IDS)
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_on_scan_returns_goes_on_into_the_model(family: str) -> None:
    model = build(family)
    lens = ssmlens.load(model)
    clean = plain_logits(model)

    def silent(call: Any) -> Any:
        result = call.run()
        return tuple(0 * x for x in result) if isinstance(result, tuple) else 0 * result

    with tapping(lens._mixers, silent):
        changed = plain_logits(model)
    assert gap(changed, clean) > 1e-3
    assert torch.equal(plain_logits(model), clean)


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_that_were_there_still_fire_and_stay(family: str) -> None:
    model = build(family)
    seen: list[str] = []
    mixer = model.backbone.layers[0].mixer
    mixer.register_forward_hook(lambda m, a, out: seen.append("mixer"))
    model.backbone.layers[-1].register_forward_pre_hook(lambda m, a, k: seen.append("layer"), with_kwargs=True)
    before = fingerprint(model)
    ssmlens.load(model).trace(IDS).check()
    assert seen == ["mixer", "layer"]
    assert_same(before, fingerprint(model))


def test_a_trace_inside_the_scan_of_another_trace() -> None:
    """The lock is re-entrant: what a callback traces is its own."""
    outer, inner = build("mamba2", seed=1), build("mamba2", seed=2)
    lens = ssmlens.load(inner)
    expected, clean = lens.trace(IDS), plain_logits(outer)

    def on_scan(call: Any) -> Any:
        same_trace(lens.trace(IDS), expected)
        return call.run()

    with tapping(ssmlens.load(outer)._mixers, on_scan) as tap:
        assert torch.equal(plain_logits(outer), clean)
    assert sorted(tap.fired) == [0, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float64_model_still_is_a_model(family: str, tmp_path: Any) -> None:
    """Copies, pickles, saving, generation and isinstance survive the exchange of the class."""
    plain = build(family)
    cls = type(plain)
    model = ssmlens.load(copy.deepcopy(plain), dtype=torch.float64).model
    expected = plain_logits(model)
    assert isinstance(model, cls)
    assert (type(model).__name__, type(model).__module__) == (cls.__name__, cls.__module__)
    assert torch.equal(plain_logits(copy.deepcopy(model)), expected)
    assert torch.equal(plain_logits(pickle.loads(pickle.dumps(model))), expected)
    model.save_pretrained(tmp_path / "m")
    # Weights read from a file lie elsewhere in memory, and sums run in another order.
    assert gap(ssmlens.load(tmp_path / "m", dtype="auto").trace(IDS).logits, expected) <= 1e-14
    ssmlens.load(model).trace(IDS)
    start = torch.tensor([IDS])
    assert torch.equal(
        model.generate(start, max_new_tokens=4, do_sample=False),
        plain.generate(start, max_new_tokens=4, do_sample=False),
    )
    assert torch.equal(plain_logits(model.float()), plain_logits(plain))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on_after_a_trace(family: str) -> None:
    """A trace neither freezes the weights nor follows them when they change."""
    model = build(family)
    trace = ssmlens.load(model).trace(IDS)
    y = trace[0].recurrence.run()
    assert not y.requires_grad
    model(input_ids=torch.tensor([IDS]), labels=torch.tensor([IDS])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert torch.equal(trace[0].recurrence.run(), y)


@pytest.mark.parametrize("name", ["return_dict", "use_cache"])
@pytest.mark.parametrize("family", FAMILIES)
def test_config_switches_of_the_model_do_not_matter(family: str, name: str) -> None:
    model = build(family)
    expected = plain_logits(model)
    setattr(model.config, name, False)
    assert torch.equal(ssmlens.load(model).trace(IDS).check().logits, expected)
