"""The model as a map: against the model's own forward, over chunk boundaries, and its derivatives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import gap
from tiny import tiny_mamba2
from torch import Tensor

import ssmlens
from ssmlens.errors import PromptError, UnsupportedModelError
from ssmlens.kernels import scan
from ssmlens.stepping import Chunk, State, Stepper

EXACT = 1e-10

# torch compiles its own forward-mode rules with torch.jit the first time that they are asked for.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba1": ("mamba1", {}),
    "mamba1, all biases, relu": ("mamba1", {"use_bias": True, "hidden_act": "relu"}),
    "mamba1, one tap, no conv bias, untied": (
        "mamba1",
        {"conv_kernel": 1, "use_conv_bias": False, "tie_word_embeddings": False},
    ),
    "falcon": ("falcon", {"use_bias": True}),
    "mamba2": ("mamba2", {}),
    "mamba2, dt limits, bias": ("mamba2", {"time_step_limit": (0.4, 1.1), "use_bias": True}),
    "mamba2, one group, tanh": ("mamba2", {"n_groups": 1, "hidden_act": "tanh", "time_step_limit": (0.9, math.inf)}),
}


def lens_of(name: str) -> ssmlens.Lens:
    family, config = CASES[name]
    return ssmlens.load(getattr(checkpoints, family)(**config))


def random_ids(batch: int, length: int, vocabulary: int = 37, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CASES)
def test_steps_and_chunks_are_the_models_own_forward(name: str) -> None:
    lens, ids = lens_of(name), random_ids(2, 23)
    truth = lens.trace(ids, scan="model")
    net = Stepper(lens)
    state, stepped = net.initial(2), []
    for t in range(ids.shape[1]):
        state, logits = net.step(state, ids[:, t])
        stepped.append(logits)
    assert gap(torch.stack(stepped, 1), truth.logits) <= EXACT
    for k, own in enumerate(state.layers):
        assert gap(own.h, truth[k].recurrence.final_state()) <= EXACT
    # Chunks of one and of two tokens end inside the convolution's window of three.
    for chunk in (1, 2, 5, 23, 100):
        after, logits = net.run(net.initial(2), ids, chunk=chunk)
        assert gap(logits, truth.logits) <= EXACT
        assert gap(after.flatten(), state.flatten()) <= EXACT


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
def test_a_state_carried_over_any_cut_gives_the_whole_run(name: str) -> None:
    net, ids = Stepper(lens_of(name)), random_ids(1, 9)
    _, whole = net.run(net.initial(), ids)
    for cut in range(1, 9):
        state, _ = net.run(net.initial(), ids[:, :cut], logits="none")
        _, rest = net.run(state, ids[:, cut:])
        assert gap(rest, whole[:, cut:]) <= EXACT


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize("layout", ["transformers", "native"])
def test_both_checkpoint_layouts(family: str, layout: str, tmp_path: Path) -> None:
    model = getattr(checkpoints, family)(vocab_size=32, tie_word_embeddings=True)
    if layout == "native":
        folder = checkpoints.native_folder(model, tmp_path / "m", vocab_size=29)
    else:
        folder = checkpoints.transformers_folder(model, tmp_path / "m")
    lens, ids = ssmlens.load(folder, dtype="float64"), random_ids(1, 12, 29)
    net = Stepper(lens)
    assert gap(net.run(net.initial(), ids, chunk=5)[1], lens.trace(ids).logits) <= EXACT


@pytest.mark.parametrize("name", ["mamba1-english", "mamba2-english", "mamba1-recall", "mamba2-recall"])
def test_shipped_models_in_float32(name: str) -> None:
    lens = ssmlens.load(name)
    ids = random_ids(1, 40, lens.vocab_size)
    net = Stepper(lens)
    assert gap(net.run(net.initial(), ids, chunk=16)[1], lens.trace(ids, scan="model").logits) <= 2e-5


def test_another_dtype_than_the_lens() -> None:
    lens, ids = ssmlens.load(tiny_mamba2()), random_ids(1, 30)
    exact = ssmlens.load(tiny_mamba2(), dtype="float64").trace(ids, scan="model").logits
    wide = Stepper(lens, torch.float64)
    state, logits = wide.run(wide.initial(), ids)
    assert logits.dtype == state.layers[0].h.dtype == torch.float64
    assert gap(logits, exact) <= EXACT
    narrow = Stepper(lens, torch.bfloat16)
    state, logits = narrow.run(narrow.initial(), ids)
    assert (state.layers[0].h.dtype, state.layers[0].conv.dtype) == (torch.float32, torch.bfloat16)
    assert 1e-4 < gap(logits, exact) < 3e-2


@pytest.mark.parametrize("name", CASES)
def test_forward_derivative_is_the_difference_quotient(name: str) -> None:
    net = Stepper(lens_of(name))
    start, _ = net.run(net.initial(), random_ids(1, 7), logits="none")
    vectors = net.embed(random_ids(1, 3, seed=2))

    def ahead(flat: Tensor) -> tuple[Tensor, Tensor]:
        state, residual = net.advance(start.unflatten(flat), vectors)
        return state.flatten(), net.logits(residual)

    at, size = start.flatten(), 1e-5
    direction = torch.randn(at.shape, generator=torch.Generator().manual_seed(1), dtype=at.dtype)
    direction /= direction.norm()
    _, ours = torch.func.jvp(ahead, (at,), (direction,))
    for exact, up, down in zip(ours, ahead(at + size * direction), ahead(at - size * direction), strict=True):
        assert gap(exact, (up - down) / (2 * size)) <= 1e-7


def test_reverse_agrees_with_forward_mode_and_with_many_tangents_at_once() -> None:
    net = Stepper(lens_of("mamba2"))
    start, _ = net.run(net.initial(), random_ids(1, 5), logits="none")

    def ahead(flat: Tensor) -> Tensor:
        return net.step(start.unflatten(flat), torch.tensor([3]))[0].flatten()

    at = start.flatten()
    tangents = torch.randn(4, *at.shape, generator=torch.Generator().manual_seed(1), dtype=at.dtype)
    together = torch.func.vmap(lambda v: torch.func.jvp(ahead, (at,), (v,))[1])(tangents)
    cotangent = torch.randn(at.shape, generator=torch.Generator().manual_seed(2), dtype=at.dtype)
    (back,) = torch.func.vjp(ahead, at)[1](cotangent)
    for v, out in zip(tangents, together, strict=True):
        assert (
            torch.equal(out, torch.func.jvp(ahead, (at,), (v,))[1])
            or gap(out, torch.func.jvp(ahead, (at,), (v,))[1]) < 1e-13
        )
        assert float((out * cotangent).sum()) == pytest.approx(float((v * back).sum()), rel=1e-10)


def test_steps_from_vectors_are_steps_from_tokens() -> None:
    net = Stepper(lens_of("mamba1"))
    ids = torch.tensor([4, 9])
    a, b = net.step(net.initial(2), ids), net.step_vectors(net.initial(2), net.embed(ids))
    assert torch.equal(a[1], b[1])
    assert torch.equal(a[0].flatten(), b[0].flatten())


def test_nothing_is_changed_in_place() -> None:
    net = Stepper(lens_of("mamba2"))
    start, _ = net.run(net.initial(), random_ids(1, 5), logits="none")
    before = start.flatten().clone()
    net.step(start, torch.tensor([1]))
    net.run(start, random_ids(1, 9), chunk=4)
    assert torch.equal(start.flatten(), before)


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
def test_flat_states_come_back(name: str) -> None:
    net = Stepper(lens_of(name))
    state, _ = net.run(net.initial(3), random_ids(3, 6), logits="none")
    flat = state.flatten()
    assert flat.shape == (3, state.size)
    again = state.unflatten(flat)
    for ours, theirs in zip(again.layers, state.layers, strict=True):
        assert torch.equal(ours.h, theirs.h)
        assert torch.equal(ours.conv, theirs.conv)
    for k, part, where in state.parts:
        assert torch.equal(flat[:, where], getattr(state.layers[k], part).flatten(1))
    assert state.parts[-1][2].stop == state.size
    assert state.unflatten(flat[:1]).batch == 1
    doubled = state.map(lambda x: 2 * x)
    assert isinstance(doubled, State)
    assert torch.equal(doubled.flatten(), 2 * flat)
    with pytest.raises(ValueError, match="a flat state is"):
        state.unflatten(flat[:, 1:])


def test_observers_see_every_chunk() -> None:
    lens, ids = lens_of("mamba1"), random_ids(2, 10)
    net, seen = Stepper(lens), []
    final, none = net.run(net.initial(2), ids, chunk=4, logits="none", observe=seen.append)
    assert none is None
    assert [(c.start, c.stop) for c in seen] == [(0, 4), (4, 8), (8, 10)]
    assert all(isinstance(c, Chunk) and c.logits is None for c in seen)
    assert seen[1].before is seen[0].after
    assert seen[-1].after is final
    trace = lens.trace(ids)
    for k, mixer in enumerate(trace):
        inside = torch.cat([scan.states(c.scans[k]) for c in seen], dim=1)
        assert gap(inside, mixer.recurrence.states()) <= EXACT
    seen.clear()
    _, last = net.run(net.initial(2), ids, chunk=4, logits="last", observe=seen.append)
    assert gap(torch.cat([c.logits for c in seen], dim=1), trace.logits) <= EXACT
    assert gap(last, trace.logits[:, -1]) <= EXACT
    assert gap(net.run(net.initial(2), ids, chunk=4, logits="last")[1], trace.logits[:, -1]) <= EXACT


def test_bad_input_is_refused() -> None:
    lens = lens_of("mamba1")
    net = Stepper(lens)
    with pytest.raises(PromptError, match="from 0 to 36"):
        net.step(net.initial(), torch.tensor([37]))
    with pytest.raises(PromptError, match="whole numbers"):
        net.step(net.initial(), torch.tensor([0.5]))
    with pytest.raises(PromptError, match="at least one token"):
        net.run(net.initial(), torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="does not fit 2 rows"):
        net.step(net.initial(1), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="logits is one of all, last, none"):
        net.run(net.initial(), torch.tensor([[1]]), logits="some")
    with pytest.raises(ValueError, match="chunk is at least 1"):
        net.run(net.initial(), torch.tensor([[1]]), chunk=0)
    with pytest.raises(ValueError, match="floating dtype"):
        Stepper(lens, torch.int64)


def test_a_layer_of_another_kind_is_refused() -> None:
    lens = lens_of("mamba1")
    lens.__dict__["layers"] = (lens.layers[0], ssmlens.trace.LayerInfo(1, "other", None, "backbone.layers.1"))
    with pytest.raises(UnsupportedModelError, match="layer 1 is no Mamba mixer"):
        Stepper(lens)
