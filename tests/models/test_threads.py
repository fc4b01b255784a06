"""Threads that trace, run and load models at the same time do not see each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import checkpoints
import pytest
import torch
from footprint import IDS, assert_same, fingerprint, plain_logits, same_trace
from torch import nn

import ssmlens


def build(family: str, **config: Any) -> Any:
    return getattr(checkpoints, family)(**config).float()


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


def test_loading_in_threads_puts_the_log_settings_back(tmp_path: Any) -> None:
    from transformers.utils import logging

    folder = checkpoints.transformers_folder(build("mamba1"), tmp_path / "m")
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()

    def load() -> None:
        for _ in range(4):
            ssmlens.load(folder)

    together(load, load, load)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_overlapping_quiet_stretches_end_with_the_last() -> None:
    """As two threads interleave: the first to come in is the first to leave."""
    from transformers.utils import logging

    from ssmlens.quiet import quiet_transformers

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    first, second = quiet_transformers(), quiet_transformers()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
    second.__exit__(None, None, None)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
