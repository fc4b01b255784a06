"""The tap leaves no trace on the model: logits, globals, hooks, modes; after errors and among threads too."""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
from collections.abc import Callable
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import gap
from torch import nn

import ssmlens
from ssmlens.errors import SsmlensError
from ssmlens.tap import tapping

FAMILIES = ["mamba1", "falcon", "mamba2"]
IDS = [3, 17, 0, 36, 5, 5, 21, 9, 30, 2, 11]


def build(family: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    return getattr(checkpoints, family)(**config).to(dtype)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything of the model and of its modeling module that a tap could leave behind."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = {k: dict(v) for k, v in vars(module).items() if "hook" in k and isinstance(v, dict)}
        found[name] = (hooks, module.training, sorted(vars(module)))
    modeling = importlib.import_module(type(model).__module__)
    found["globals"] = {k: id(v) for k, v in vars(modeling).items()}
    found["weights"] = {k: (v.dtype, v.requires_grad, v.clone()) for k, v in model.named_parameters()}
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    first, second = dict(before), dict(after)
    weights, now = first.pop("weights"), second.pop("weights")
    assert first == second
    assert weights.keys() == now.keys()
    for name, (dtype, grad, x) in weights.items():
        assert now[name][:2] == (dtype, grad)
        assert torch.equal(now[name][2], x), name


def plain_logits(model: nn.Module, ids: list[int] = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


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
        patch.setattr(module._Recorder, "on_scan", fail)
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


def together(*jobs: Callable[[], None]) -> None:
    """Run the jobs in threads that start at once; the first error of any comes back here."""
    barrier, errors = threading.Barrier(len(jobs)), []

    def run(job: Callable[[], None]) -> None:
        try:
            barrier.wait(timeout=60)
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def same_trace(trace: ssmlens.Trace, expected: ssmlens.Trace) -> None:
    assert torch.equal(trace.logits, expected.logits)
    for k in range(len(expected.residuals)):
        assert torch.equal(trace.residual(k), expected.residual(k))
    for mixer in expected:
        ours = trace[mixer.layer]
        assert torch.equal(ours.output, mixer.output)
        for name, x in mixer.recurrence.inputs.tensors().items():
            assert torch.equal(ours.recurrence.inputs.tensors()[name], x), name


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_threads_do_not_see_each_other(family: str) -> None:
    """Two threads trace two models of one family, a third and a fourth run them untapped, all at the same time."""
    models = [build(family, seed=1), build(family, seed=2)]
    prompts = [IDS, IDS[::-1] + [7, 8]]
    lenses = [ssmlens.load(model) for model in models]
    traces = [lens.trace(ids) for lens, ids in zip(lenses, prompts)]
    plain = plain_logits(models[0], [1, 2, 3])
    before = [fingerprint(model) for model in models]

    def trace(i: int) -> None:
        for _ in range(6):
            same_trace(lenses[i].trace(prompts[i]), traces[i])

    def forward(i: int, ids: list[int], expected: torch.Tensor) -> None:
        for _ in range(15):
            assert torch.equal(plain_logits(models[i], ids), expected)

    together(
        lambda: trace(0),
        lambda: trace(1),
        lambda: forward(0, [1, 2, 3], plain),
        lambda: forward(1, prompts[1], traces[1].logits),
    )
    for model, state in zip(models, before):
        assert_same(state, fingerprint(model))


def test_threads_on_one_model_in_train_mode_leave_it_in_train_mode() -> None:
    model = build("mamba2").train()
    lens = ssmlens.load(model)
    expected = lens.trace(IDS)

    def trace() -> None:
        for _ in range(8):
            same_trace(lens.trace(IDS), expected)

    together(trace, trace, trace)
    assert all(module.training for module in model.modules())


def test_an_untapped_forward_inside_a_trace_of_another_thread_stays_out_of_it() -> None:
    """Made certain: the other thread runs the same model exactly while a trace is between two layers."""
    model = build("mamba1")
    lens = ssmlens.load(model)
    expected = lens.trace(IDS)
    started, main = [], threading.get_ident()

    def intrude(module: nn.Module, args: Any) -> None:
        if threading.get_ident() != main or started:
            return
        started.append(True)
        thread = threading.Thread(target=plain_logits, args=(model, [1, 2, 3]))
        thread.start()
        thread.join(timeout=60)

    model.backbone.layers[1].mixer.in_proj.register_forward_pre_hook(intrude)
    same_trace(lens.trace(IDS), expected)
    assert started


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


def test_loading_in_threads_puts_the_log_settings_back(tmp_path: Any) -> None:
    from transformers.utils import logging

    folder = checkpoints.transformers_folder(build("mamba1"), tmp_path / "m")
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()

    def load() -> None:
        for _ in range(4):
            ssmlens.load(folder)

    together(load, load, load)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


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
