"""Traces: prompts of every type, layers, bounds and checks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from tiny import tiny_tokenizer

import ssmlens
from ssmlens.errors import LayerError, PromptError, ReconstructionError

IDS = [3, 17, 0, 36, 5, 5, 21]
PROMPTS: dict[str, Any] = {
    "tuple": tuple(IDS),
    "long": torch.tensor(IDS),
    "a row": torch.tensor([IDS]),
    "int32": torch.tensor(IDS, dtype=torch.int32),
    "uint8": torch.tensor(IDS, dtype=torch.uint8),
    "numpy ints": list(np.array(IDS)),
    "not contiguous": torch.tensor([[i, 1] for i in IDS])[:, 0],
    "transposed": torch.tensor([[i] for i in IDS]).T,
}
WRONG: dict[str, tuple[Any, str]] = {
    "empty list": ([], "empty"),
    "empty tuple": ((), "empty"),
    "empty tensor": (torch.zeros(0, dtype=torch.long), "empty"),
    "no columns": (torch.zeros(2, 0, dtype=torch.long), "empty"),
    "empty text": ("", "empty"),
    "an empty text": (["a", ""], "prompt 1 of 2 is empty"),
    "floats": (torch.tensor([1.0]), "float32"),
    "bools": (torch.tensor([True]), "bool"),
    "complex": (torch.tensor([1 + 0j]), "complex"),
    "scalar": (torch.tensor(1), "integer ids"),
    "three axes": (torch.zeros(1, 1, 1, dtype=torch.long), "integer ids"),
    "bool in a list": ([True, False], "a prompt is"),
    "float in a list": ([1.0], "a prompt is"),
    "ids and text": ([1, "a"], "a prompt is"),
    "nested lists": ([[1, 2], [3]], "a prompt is"),
    "bytes": (b"ab", "a prompt is"),
    "None": (None, "a prompt is"),
    "a number": (3, "a prompt is"),
    "an array": (np.array([1, 2]), "a prompt is"),
    "too large": ([1, 258], "258 is outside the vocabulary: ids are 0 to 257"),
    "huge": ([10**30], "outside the vocabulary"),
    "negative": (torch.tensor([[1, -1]]), "-1 is outside"),
}


@pytest.fixture(scope="module")
def lens() -> ssmlens.Lens:
    return ssmlens.load(checkpoints.mamba2(vocab_size=258), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def trace(lens: ssmlens.Lens) -> ssmlens.Trace:
    return lens.trace(IDS)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_every_type_mean_the_same(name: str, lens: ssmlens.Lens, trace: ssmlens.Trace) -> None:
    other = lens.trace(PROMPTS[name])
    assert torch.equal(other.ids, torch.tensor([IDS]))
    assert other.ids.dtype == torch.long
    assert torch.equal(other.logits, trace.logits)


def test_a_text_is_its_tokens(lens: ssmlens.Lens) -> None:
    trace = lens.trace("añ b")
    assert trace.tokens == [["a", "�", "�", " ", "b"]]
    assert trace.ids.tolist() == [tiny_tokenizer().encode("añ b")]
    assert torch.equal(trace.logits, lens.trace(trace.ids).logits)
    assert lens.trace(["añ b"]).tokens == trace.tokens


@pytest.mark.parametrize("name", WRONG)
def test_wrong_prompts_are_refused_in_a_sentence(name: str, lens: ssmlens.Lens) -> None:
    prompt, words = WRONG[name]
    with pytest.raises(PromptError, match=words) as caught:
        lens.trace(prompt)
    assert "\n" not in str(caught.value)


def test_text_without_a_tokenizer_is_refused() -> None:
    bare = ssmlens.load(checkpoints.mamba1())
    with pytest.raises(PromptError, match="no tokenizer"):
        bare.trace("abc")
    assert bare.trace([1, 2]).tokens == [["1", "2"]]


def test_the_padded_vocabulary_has_no_text_but_works() -> None:
    lens = ssmlens.load(checkpoints.mamba1(vocab_size=264), tokenizer=tiny_tokenizer())
    assert len(lens.trace([65, 263]).tokens[0]) == 2


@pytest.mark.parametrize("family", ["mamba1", "falcon", "mamba2"])
@pytest.mark.parametrize("scan", ["model", "fast"])
def test_one_token(family: str, scan: str) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)())
    trace = lens.trace([7], scan=scan).check()
    rec = trace[0].recurrence
    assert trace.logits.shape == (1, 1, 37)
    assert rec.attention.dense().shape == (1, rec.n_heads, 1, 1)
    assert torch.allclose(rec.states()[:, 0], rec.final_state(), rtol=0, atol=1e-14)
    assert torch.equal(rec.attention.distance(), torch.zeros(1, rec.n_heads, 1, dtype=torch.float64))
    assert torch.allclose(rec.run(), rec.attention.apply(rec.value) + rec.skip, rtol=0, atol=1e-14)


def test_chosen_layers(lens: ssmlens.Lens, trace: ssmlens.Trace) -> None:
    for scan in ("model", "fast"):
        some = lens.trace(IDS, layers=[1], scan=scan)
        assert [m.layer for m in some] == [1]
        assert list(some.reconstruction_error) == [1]
        assert len(some.residuals) == 3
        assert torch.allclose(some[1].recurrence.run(), trace[1].recurrence.run(), rtol=0, atol=1e-12)
        with pytest.raises(LayerError, match="layer 0 was not traced: this trace has recurrences at layers 1"):
            some[0]
    assert len(lens.trace(IDS, layers=[])) == 0
    assert [m.layer for m in lens.trace(IDS, layers=(1, 0, 1))] == [0, 1]
    assert [m.layer for m in lens.trace(IDS, layers=np.array([1]))] == [1]


@pytest.mark.parametrize("layers", [[2], [-1], [0, 7], [0.5], ["0"], 1])
def test_layers_that_do_not_exist(layers: Any, lens: ssmlens.Lens) -> None:
    with pytest.raises(LayerError, match=r"choose from layers 0-1|a list of layer indices"):
        lens.trace(IDS, layers=layers)


@pytest.mark.parametrize("layer", [2, -1, "0", None, 0.5])
def test_mixers_that_do_not_exist(layer: Any, trace: ssmlens.Trace) -> None:
    with pytest.raises(KeyError, match="does not exist: this trace has recurrences at layers 0, 1") as caught:
        trace[layer]
    assert not str(caught.value).startswith(("'", '"'))


def test_a_layer_without_recurrence_is_named(trace: ssmlens.Trace) -> None:
    layers = (*trace.layers, ssmlens.LayerInfo(2, "attention", None, "backbone.layers.2"))
    with pytest.raises(LayerError, match="layer 2 is attention and has no recurrence: choose from 0, 1"):
        replace(trace, layers=layers)[2]


@pytest.mark.parametrize("k", [-1, 3, 100, "0", 0.0])
def test_residuals_that_do_not_exist(k: Any, trace: ssmlens.Trace) -> None:
    with pytest.raises(LayerError, match="choose 0 to 2"):
        trace.residual(k)


def test_residuals_add_up(trace: ssmlens.Trace) -> None:
    for k in range(2):
        assert torch.equal(trace.residual(k) + trace[k].output, trace.residual(k + 1))


def test_unknown_scan(lens: ssmlens.Lens) -> None:
    with pytest.raises(ValueError, match="auto, model, fast"):
        lens.trace(IDS, scan="slow")


@pytest.mark.parametrize("error", [1e-9, float("inf"), float("nan")])
def test_check_refuses_errors_above_the_tolerance(error: float, trace: ssmlens.Trace) -> None:
    assert trace.check() is trace
    assert trace.tolerance == 1e-10
    wrong = replace(trace, mixers={0: trace[0], 1: replace(trace[1], reconstruction_error=error)})
    with pytest.raises(ReconstructionError, match="layer 1"):
        wrong.check()
    with pytest.raises(ReconstructionError):
        trace.check(tolerance=0.0)
    if error == error and error < 1:
        assert wrong.check(tolerance=1e-8) is wrong


BREAKS = {
    "in_proj": "mamba1",
    "out_proj": "mamba1",
    "norm": "mamba2",
    "conv1d": "mamba2",
}


@pytest.mark.parametrize("part", BREAKS)
def test_an_unfaithful_rebuild_shows(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When one weight that ssmlens reads is not the one that the model uses, the error says so."""
    from ssmlens import models

    lens = ssmlens.load(getattr(checkpoints, BREAKS[part])())
    kind = "mamba_selective_scan" if BREAKS[part] == "mamba1" else "mamba2_chunk_scan"
    family = models.FAMILIES[kind]

    def describe(mixer: Any) -> Any:
        parameters, config = family.describe(mixer)
        name = f"{part}.weight"
        return {**parameters, name: parameters[name] * 1.001}, config

    layers = {k: (name, m, replace(family, describe=describe)) for k, (name, m, _) in lens._mixers.items()}
    monkeypatch.setitem(vars(lens), "_mixers", layers)
    monkeypatch.setitem(models.FAMILIES, kind, replace(family, describe=describe))
    for scan in ("model", "fast"):
        errors = lens.trace(IDS, scan=scan).reconstruction_error
        assert min(errors.values()) > 1e-5, (scan, errors)


@pytest.mark.parametrize("part", ["A_log", "out_proj.weight", "in_proj.weight"])
def test_nan_in_a_forward_is_reported_not_hidden(part: str) -> None:
    model = checkpoints.mamba2()
    lens = ssmlens.load(model)
    with torch.no_grad():
        model.get_parameter(f"backbone.layers.1.mixer.{part}").view(-1)[0] = float("nan")
    trace = lens.trace(IDS)
    assert trace.reconstruction_error[0] <= 1e-10
    assert trace.reconstruction_error[1] != trace.reconstruction_error[1]
    with pytest.raises(ReconstructionError, match=r"layer 1 .* nan"):
        trace.check()
