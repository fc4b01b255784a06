"""The implicit attention as an operator: which heads and rows exist, what is too large, and inference mode."""

from __future__ import annotations

from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import gap

import ssmlens
from ssmlens.errors import MemoryLimitError, SsmlensError
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.recurrence import Recurrence

IDS = [3, 17, 0, 36, 5, 5, 21]


@pytest.fixture(scope="module", params=["mamba1", "mamba2"])
def rec(request: pytest.FixtureRequest) -> Recurrence:
    return ssmlens.load(getattr(checkpoints, request.param)()).trace(IDS)[0].recurrence


def long(tokens: int, batch: int = 1) -> Recurrence:
    """1536 heads over many tokens that take no memory: every piece is one number, expanded."""
    one = torch.ones(1, 1, 1, 1)
    shared = one.expand(batch, tokens, 1, 1)
    value = one.expand(batch, tokens, 1536, 1)
    return Recurrence(ScanInputs(value=value, write=shared, read=shared, log_decay=-value))


def test_what_is_too_large_is_refused_before_it_is_allocated() -> None:
    attention = long(2048).attention
    with pytest.raises(MemoryLimitError) as caught:
        attention.dense()
    assert str(caught.value) == (
        "dense() of 1536 heads x 2048 x 2048 float32 needs 25.8 GB (limit 2.0 GB): "
        "pass heads=..., use row(t), reduce(how) or apply(x)"
    )
    with pytest.raises(MemoryLimitError, match=r"dense\(\) of 2 x 1 heads x 100000 x 100000 float32 needs 80.0 GB"):
        long(100_000, batch=2).attention.dense(heads=0)
    with pytest.raises(MemoryLimitError, match=r"^reduce\(\) of 100000 x 100000 float32 needs 40.0 GB .*: use row"):
        long(100_000).attention.reduce("mean")
    assert issubclass(MemoryLimitError, SsmlensError)


def test_the_limit_counts_the_bytes_of_the_result(rec: Recurrence) -> None:
    attention, square = rec.attention, 8 * len(IDS) ** 2
    assert attention.dense(limit=square * rec.n_heads).shape == attention.shape
    assert attention.dense(heads=[0], limit=square).shape == (1, 1, 7, 7)
    assert attention.reduce("norm", limit=square).shape == (1, 7, 7)
    for call in (
        lambda: attention.dense(limit=square * rec.n_heads - 1),
        lambda: attention.dense(heads=[0, 1], limit=square),
        lambda: attention.T.reduce("norm", limit=square - 1),
    ):
        with pytest.raises(MemoryLimitError):
            call()


@pytest.mark.parametrize("heads", [2, [2], (-1, 0), slice(1, 3), torch.tensor([3, 1]), range(2)])
def test_heads_in_every_form(heads: Any, rec: Recurrence) -> None:
    full = rec.attention.dense()
    chosen = [heads] if isinstance(heads, int) else heads if isinstance(heads, slice) else [int(h) for h in heads]
    assert torch.allclose(rec.attention.dense(heads=heads), full[:, chosen], rtol=0, atol=1e-13)
    assert torch.allclose(rec.attention.reduce("mean", heads=heads), full[:, chosen].mean(1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("heads", [99, [0, -99], [], slice(50, None)])
def test_heads_that_do_not_exist(heads: Any, rec: Recurrence) -> None:
    for call in (rec.attention.dense, lambda heads: rec.attention.reduce("mean", heads)):
        with pytest.raises(IndexError, match=f"this layer has heads 0 to {rec.n_heads - 1}"):
            call(heads)


@pytest.mark.parametrize("t", [7, -8])
def test_rows_that_do_not_exist(t: int, rec: Recurrence) -> None:
    for call in (rec.attention.row, rec.attention.column, rec.attention.T.row):
        with pytest.raises(IndexError, match=f"position {t} is outside the 7 tokens"):
            call(t)


@pytest.mark.parametrize("traced_inside", [True, False])
@pytest.mark.parametrize("used_inside", [True, False])
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_inference_mode_changes_nothing(family: str, traced_inside: bool, used_inside: bool) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)())
    truth = lens.trace(IDS)[0].recurrence
    with torch.inference_mode(traced_inside):
        rec = lens.trace(IDS).check()[0].recurrence
    with torch.inference_mode(used_inside):
        y = truth.value + 1
        found = (rec.run(), rec.states(), rec.attention.apply(y), rec.attention.T.apply(y), rec.attention.row(3))
    expected = truth.attention
    y = truth.value + 1
    wanted = (truth.run(), truth.states(), expected.apply(y), expected.T.apply(y), expected.row(3))
    for ours, theirs in zip(found, wanted, strict=True):
        assert gap(ours, theirs) <= 1e-14


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_padding_reads_nothing(family: str) -> None:
    mask = torch.ones(2, len(IDS))
    mask[1, 4:] = 0
    trace = ssmlens.load(getattr(checkpoints, family)()).trace(torch.tensor([IDS, IDS]), attention_mask=mask)
    rec = trace[0].recurrence
    assert not rec.run()[1, 4:].any()
    assert not rec.attention.dense()[1, :, 4:].any()
    assert not rec.attention.reduce("norm")[1, 4:].any()
    assert rec.run()[0, 4:].any()
