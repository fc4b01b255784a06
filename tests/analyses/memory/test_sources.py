"""The memory study on traces of real models: axes, provenance, refusals, batches, and the shipped models."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import memory_cases as cases
import pytest
import torch
from tiny import tiny_mamba1, tiny_mamba2, tiny_tokenizer

import ssmlens
from ssmlens import zoo
from ssmlens.analyses import memory
from ssmlens.analyses.memory import _assumes
from ssmlens.errors import ReconstructionError

MODELS = {"mamba1": tiny_mamba1, "mamba2": tiny_mamba2}
SENTENCES = ["The cat sat on the mat.", "It rained."]
STUDIES: dict[str, Callable[[Any], memory.Result]] = {
    "retention": partial(memory.retention, s=2, t=-1),
    "half_life": memory.half_life,
    "arithmetic": partial(memory.half_life, kind="arithmetic"),
    "forward": partial(memory.half_life, kind="forward"),
    "backward": partial(memory.half_life, kind="backward", at=[-1, 3]),
    "mean_distance": memory.mean_distance,
    "rows": partial(memory.mean_distance, rows=[1, -1], reduce="pooled"),
    "saturation": partial(memory.saturation, train_length=64),
    "onset_time": partial(memory.onset_time, train_length=64),
    "state_norm": partial(memory.state_norm, at=[-1, 3]),
    "states at": partial(memory.state_norm, at=[-1, 3], reduce="pooled"),
    "summary": memory.summary,
}


@pytest.fixture(scope="module", params=MODELS)
def lens(request: pytest.FixtureRequest) -> ssmlens.Lens:
    return ssmlens.load(MODELS[request.param](), tokenizer=tiny_tokenizer(), dtype=torch.float64)


@pytest.fixture(scope="module")
def trace(lens: ssmlens.Lens) -> ssmlens.Trace:
    return lens.trace(SENTENCES)


def numbers(result: memory.Result) -> dict[str, torch.Tensor]:
    return {"value": result.value, **result.columns, **result.control}


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_a_trace_stacks_its_layers(study: Callable[[Any], memory.Result], trace: ssmlens.Trace) -> None:
    result = study(trace)
    assert result.dims[:2] == ("layer", "batch")
    assert result.coords["layer"] == [0, 1, 2]
    assert result.settings["model"] == trace.settings["model"]
    assert result.settings["reconstruction_error"] == {str(k): e for k, e in trace.reconstruction_error.items()}
    for layer in (0, 1, 2):
        for source in (trace[layer], trace[layer].recurrence):
            alone = study(source)
            assert alone.dims == result.dims[1:]
            for name, x in numbers(alone).items():
                torch.testing.assert_close(numbers(result)[name][layer], x, rtol=0, atol=0, equal_nan=True)
        assert set(study(trace[layer]).table()["layer"]) == {layer}


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_a_padded_batch_equals_its_single_runs(
    study: Callable[[Any], memory.Result], lens: ssmlens.Lens, trace: ssmlens.Trace
) -> None:
    if study is memory.summary:
        study = partial(memory.summary, train_length=64)
    together = study(trace)
    for b, sentence in enumerate(SENTENCES):
        alone = study(lens.trace(sentence))
        for name, x in numbers(alone).items():
            ours = numbers(together)[name].expand(together.shape)[:, b]
            torch.testing.assert_close(ours, x.expand(alone.shape)[:, 0], rtol=1e-8, atol=1e-10, equal_nan=True)


def test_some_layers_only(lens: ssmlens.Lens) -> None:
    result = memory.half_life(lens.trace(SENTENCES[0], layers=[2]))
    assert result.coords["layer"] == [2]
    assert result.shape[0] == 1


def test_states_are_an_axis_only_where_they_differ(trace: ssmlens.Trace) -> None:
    per_state = trace[0].family == "mamba1"
    rec = trace[0].recurrence
    shape = (3, 2, rec.n_heads, *((rec.d_state,) if per_state else ()))
    assert memory.half_life(trace).shape == shape
    assert memory.half_life(trace, "forward", quantiles=[0.5]).shape == (*shape, 1)
    assert memory.mean_distance(trace).shape == (3, 2, rec.n_heads)


def test_the_summary_is_one_row_per_layer_and_text(trace: ssmlens.Trace) -> None:
    table = memory.summary(trace).table()
    assert list(zip(table["layer"], table["batch"])) == [(k, b) for k in range(3) for b in range(2)]
    assert table["observed_tokens"].tolist() == trace.lengths.tolist() * 3
    assert table["reconstruction_error"].tolist() == [e for e in trace.reconstruction_error.values() for _ in range(2)]
    assert (table["half_life_q10"] <= table["half_life"]).all()
    assert (table["half_life"] <= table["half_life_q90"]).all()
    lives = memory.half_life(trace).value.flatten(2)
    assert torch.equal(memory.summary(trace).value, lives.nanmedian(2).values)
    longer = (lives > trace.lengths[:, None]).double().mean(2)
    torch.testing.assert_close(torch.tensor(table["longer_than_text"].to_numpy()), longer.flatten())


def test_a_trace_that_does_not_describe_the_model_is_refused(trace: ssmlens.Trace) -> None:
    for error in (0.5, float("nan")):
        broken = dataclasses.replace(trace[1], reconstruction_error=error)
        wrong = dataclasses.replace(trace, mixers={**trace.mixers, 1: broken})
        for study in STUDIES.values():
            for source in (wrong, broken):
                with pytest.raises(ReconstructionError, match="layer 1 was rebuilt with relative error"):
                    study(source)


def test_a_trace_without_recurrences_is_refused(trace: ssmlens.Trace) -> None:
    with pytest.raises(ValueError, match="holds no recurrence"):
        memory.half_life(dataclasses.replace(trace, mixers={}))


def test_layers_of_different_sizes_leave_nan() -> None:
    from ssmlens.analyses._layers import Layers

    recs = {0: cases.random("per-state"), 3: cases.random("scalar")}
    layers = Layers(recs, stacked=True)
    parts = [{"value": torch.ones(2, 3, 4)}, {"value": 2 * torch.ones(2, 1, 1)}]
    value = layers.result(parts, ("batch", "head", "state"), name="x", units="1").value
    assert (value[0] == 1).all()
    # A decay that all states share is every state's.
    assert (value[1, :, 0] == 2).all()
    assert value[1, :, 1:].isnan().all()


def test_every_named_check_is_a_test() -> None:
    root = Path(__file__).resolve().parents[3]
    names = [x for x in vars(_assumes).values() if isinstance(x, str) and "::" in x]
    assert len(names) >= 6
    for check in names:
        path, test = check.rpartition("(")[2].rstrip(")").split("::")
        assert f"def {test}(" in (root / path).read_text()


def test_every_result_carries_its_doubt(trace: ssmlens.Trace) -> None:
    for study in STUDIES.values():
        result = study(trace)
        assert result.assumes
        assert result.control
        assert result.checked_by
        assert result.units in ("tokens", "1", "state")


def test_public_functions_are_documented() -> None:
    for name in memory.__all__:
        thing = getattr(memory, name)
        if inspect.isfunction(thing):
            assert "Args:" in thing.__doc__
            assert "Returns:" in thing.__doc__


def test_every_public_name_is_on_a_page() -> None:
    root = Path(__file__).resolve().parents[3]
    pages = "".join((root / page).read_text() for page in ("docs/studies/memory.md", "analyses/README.md"))
    for name in memory.__all__:
        if inspect.isfunction(getattr(memory, name)):
            assert f"`{name}`" in pages or f"### {name}(" in pages or f"and {name}(" in pages


def test_the_commands_of_the_page_exist() -> None:
    from typer.main import get_command

    from ssmlens.cli.memory_commands import app

    page = (Path(__file__).resolve().parents[3] / "docs" / "studies" / "memory.md").read_text()
    named = set(re.findall(r"`(?:ssmlens )?memory (\w+)", page))
    assert named == set(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", zoo.names())
def test_shipped_models(name: str) -> None:
    lens = ssmlens.load(name)
    trace = lens.trace(zoo.passage(name))
    table = memory.summary(trace, train_length=256).table()
    assert len(table) == len(lens.layers)
    assert (table["half_life"] > 0).all()
    assert table["mean_distance"].between(0, int(trace.lengths[0]) - 1).all()
    assert table["saturation"].between(0, 1).all()
    # The mean over time of the decays at every token, from the recurrence's own log decay.
    rec = trace[0].recurrence
    slow = torch.log(torch.tensor(2.0)) / -rec.log_decay.double().mean(1)
    torch.testing.assert_close(memory.half_life(trace[0]).value, slow.reshape(memory.half_life(trace[0]).shape))
