"""Hard numbers: extreme steps and decays, long and batched prompts, gradients through a recurrence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import checkpoints
import pytest
import torch
from against import IDS, compare, mixer_gaps, truth_of
from checkpoints import gap
from torch import Tensor

import ssmlens
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.recurrence import Recurrence

EXACT = 1e-9
DT_BIAS = {"mamba1": "dt_proj.bias", "falcon": "dt_proj.bias", "mamba2": "dt_bias"}


def spoil(model: Any, name: str, change: Callable[[Tensor], Any]) -> None:
    """Exchange every weight whose name ends so."""
    with torch.no_grad():
        for key, x in model.named_parameters():
            if key.endswith(name):
                x.copy_(torch.as_tensor(change(x), dtype=x.dtype).expand_as(x))


EXTREMES: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "huge steps": ("dt", lambda x: 300.0),
    "steps at the edge of float64": ("dt", lambda x: -300.0),
    "one huge step among tiny ones": ("dt", lambda x: torch.linspace(-40, 40, x.numel())),
    "forgets at once": ("A_log", lambda x: 100.0),
    "never forgets": ("A_log", lambda x: -300.0),
    "every scale": ("A_log", lambda x: torch.linspace(-40, 12, x.numel()).reshape(x.shape)),
    "tiny activations": ("embeddings.weight", lambda x: x * 1e-30),
    "large activations": ("conv1d.weight", lambda x: x * 30),
    "no skip": (".D", lambda x: 0.0),
}


@pytest.mark.parametrize("family", ["mamba1", "falcon", "mamba2"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_weights_stay_exact(family: str, name: str) -> None:
    part, change = EXTREMES[name]
    model = getattr(checkpoints, family)()
    spoil(model, DT_BIAS[family] if part == "dt" else part, change)
    truth = truth_of(model)
    assert truth.logits.isfinite().all()
    lens = ssmlens.load(model)
    for scan in ("model", "fast"):
        compare(lens.trace(IDS, scan=scan).check(), truth, EXACT)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize("scan", ["model", "fast"])
def test_a_layer_that_writes_nothing(family: str, scan: str) -> None:
    """Steps of zero: nothing is written, rows of M are zero, and their mean distance is not a number."""
    config = {"time_step_limit": (0.0, 0.0)} if family == "mamba2" else {}
    model = getattr(checkpoints, family)(**config)
    spoil(model, DT_BIAS[family], lambda x: -800.0)
    trace = ssmlens.load(model).trace(IDS, scan=scan).check()
    rec = trace[0].recurrence
    assert float(rec.states().abs().sum()) == 0
    assert float(rec.attention.dense().abs().sum()) == 0
    assert bool(rec.attention.distance().isnan().all())
    assert torch.equal(rec.run(), rec.skip)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_decays_beyond_the_dtype(family: str) -> None:
    """exp(A_log) overflows in float32: the state forgets at once, and nothing that the recurrence gives is NaN."""
    model = getattr(checkpoints, family)().float()
    spoil(model, "A_log", lambda x: 100.0)
    ids, mask = torch.tensor([IDS, IDS]), torch.ones(2, len(IDS))
    mask[1, 4:] = 0
    rec = ssmlens.load(model).trace(ids, attention_mask=mask, scan="fast")[0].recurrence
    assert bool((rec.log_decay[0] < -1e30).all())
    assert float(rec.log_decay[1, 4:].abs().sum()) == 0
    rec = rec[:, :4]
    own = rec.value[..., None] * rec.write[..., None, :]
    assert gap(rec.states(), own) <= 1e-6
    assert gap(rec.run(), (own * rec.read[..., None, :]).sum(-1) + rec.skip) <= 1e-6
    M, diagonal = rec.attention.dense(), (rec.write * rec.read).sum(-1).mT
    assert gap(M, torch.diag_embed(diagonal)) <= 1e-6
    assert gap(rec.attention.row(2), M[:, :, 2]) <= 1e-6
    assert gap(rec.attention.column(1), M[..., 1]) <= 1e-6
    assert float(rec.attention.distance().abs().sum()) == 0


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_long_prompts(family: str) -> None:
    """Longer than a chunk of either implementation, and no multiple of one."""
    model = getattr(checkpoints, family)(num_hidden_layers=1, chunk_size=32) if family == "mamba2" else None
    model = model or checkpoints.mamba1(num_hidden_layers=1, hidden_size=4)
    ids = [int(i) for i in torch.randint(0, 37, (133,), generator=torch.Generator().manual_seed(0))]
    truth = truth_of(model, ids)
    lens = ssmlens.load(model)
    for scan in ("model", "fast"):
        compare(lens.trace(ids, scan=scan).check(), truth, EXACT)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_auto_is_fast_beyond_512_tokens(family: str) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)(num_hidden_layers=1))
    ids = torch.randint(0, 37, (523,), generator=torch.Generator().manual_seed(0))
    assert lens.trace(ids[:512]).settings["scan"] == "model"
    auto, model = lens.trace(ids).check(), lens.trace(ids, scan="model").check()
    assert (auto.settings["scan"], auto.settings["checked_tokens"]) == ("fast", 32)
    assert gap(auto.logits, model.logits) <= EXACT
    assert gap(auto[0].recurrence.final_state(), model[0].recurrence.final_state()) <= EXACT


@pytest.mark.parametrize("family", ["mamba1", "falcon", "mamba2"])
def test_rows_of_a_batch_are_their_own_runs(family: str) -> None:
    model = getattr(checkpoints, family)(use_bias=True)
    rows = [IDS, IDS[::-1], [7] * len(IDS)]
    trace = ssmlens.load(model).trace(torch.tensor(rows))
    for i, row in enumerate(rows):
        truth = truth_of(model, row)
        assert gap(trace.logits[i], truth.logits) <= EXACT
        for k, layer in enumerate(truth.layers):
            rec = trace[k].recurrence
            assert gap(rec.states()[i], layer.states) <= EXACT
            assert gap(rec.attention.dense()[i], layer.M) <= EXACT
            assert gap(rec.attention.distance()[i], layer.distance) <= EXACT


def test_mean_distance_of_constant_decay() -> None:
    """With constant decay a and constant write and read, row t has the mean of k a^k over 0..t."""
    t, a = 40, 0.8
    ones = torch.ones(1, t, 1, 1, dtype=torch.float64)
    rec = Recurrence(ScanInputs(value=ones, write=ones, read=ones, log_decay=ones * math.log(a)))
    weights = a ** torch.arange(t, dtype=torch.float64)
    k = torch.arange(t, dtype=torch.float64)
    expected = (weights * k).cumsum(0) / weights.cumsum(0)
    assert gap(rec.attention.distance()[0, 0], expected) <= 1e-12
    assert abs(float(rec.attention.distance(rows=[-1])) - a / (1 - a)) < 0.03


GRADIENT_PIECES = ["value", "write", "read", "dt", "A", "D"]


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_gradients_flow_through_a_recurrence(family: str) -> None:
    """run, states, final state, a later stretch and the attention, against finite differences, in every piece."""
    config = {"hidden_size": 4, "num_hidden_layers": 1, "state_size": 3}
    config |= {"num_heads": 4, "head_dim": 2} if family == "mamba2" else {"time_step_rank": 2, "expand": 1}
    rec = ssmlens.load(getattr(checkpoints, family)(**config)).trace([3, 17, 0, 5])[0].recurrence
    pieces = [(rec.D if n == "D" else getattr(rec.inputs, n)).clone().requires_grad_() for n in GRADIENT_PIECES]

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(GRADIENT_PIECES, tensors))
        D = given.pop("D")
        again = Recurrence(rec.inputs.replace(**given), D=D)
        att = again.attention
        return (
            again.run(),
            again.states(at=[-1, 1]),
            again.final_state(),
            again[:, 2:].run(),
            att.dense(),
            att.row(-1),
            att.column(1),
            att.apply(again.value),
            att.T.apply(again.value),
        )

    assert torch.autograd.gradcheck(outputs, pieces)
    grads = torch.autograd.grad(outputs(*pieces)[0].square().sum(), pieces)
    for name, grad in zip(GRADIENT_PIECES, grads):
        assert grad.isfinite().all(), name
        assert grad.abs().sum() > 0, name


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_implementations_agree(family: str) -> None:
    rec = ssmlens.load(getattr(checkpoints, family)()).trace(IDS)[1].recurrence
    for name in ("run", "states", "final_state"):
        naive, chunked = getattr(rec, name)(impl="naive"), getattr(rec, name)(impl="chunked")
        assert gap(chunked, naive) <= 1e-12
    with pytest.raises(ValueError, match="auto, naive, chunked"):
        rec.run(impl="fast")


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_stretches_of_time(family: str) -> None:
    model = getattr(checkpoints, family)()
    rec, truth = ssmlens.load(model).trace(IDS)[0].recurrence, truth_of(model).layers[0]
    n = len(IDS)
    for start, stop in [(0, n), (1, 4), (-3, None), (n - 1, n), (4, 4), (5, 2), (0, 0), (3, 99)]:
        a, b, _ = slice(start, stop).indices(n)
        part, b = rec[:, start:stop], max(a, b)
        assert part.length == b - a
        before = truth.states[a - 1] if a else torch.zeros_like(truth.states[0])
        assert gap(part.final_state()[0], truth.states[b - 1] if b > a else before) <= EXACT
        if b > a:
            assert gap(part.run()[0], truth.y[a:b]) <= EXACT
            assert gap(part.attention.dense()[0], truth.M[:, a:b, a:b]) <= EXACT
    again = rec[:, 2:9][:, 3:5]
    assert gap(again.run()[0], truth.y[5:7]) <= EXACT
    for wrong in (0, (0, 1), (slice(None), slice(None, None, 2)), (slice(None), slice(None, None, -1))):
        with pytest.raises(IndexError, match="slices of step 1"):
            rec[wrong]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_recurrences_compute_in_float32(dtype: torch.dtype) -> None:
    model = checkpoints.mamba1().to(dtype)
    mixer = ssmlens.load(model).trace(IDS)[0]
    gaps = mixer_gaps(mixer, truth_of(model).layers[0])
    assert max(gaps.values()) <= {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype], gaps
    rec = mixer.recurrence
    for x in (rec.run(), rec.states(), rec.final_state(), rec.log_decay, rec.write, rec.read, rec.skip):
        assert x.dtype == torch.float32
    assert rec.attention.dense().dtype == torch.float32
