"""Streams in chunks against one pass, resumed runs, and onsets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_mamba1, tiny_mamba2

import ssmlens
from ssmlens.analyses import capacity
from ssmlens.analyses.capacity import _stream
from ssmlens.errors import SsmlensError


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(250, (2, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", [tiny_mamba1, tiny_mamba2])
def test_every_token_is_counted_once(make: object) -> None:
    lens = ssmlens.load(make().double())  # type: ignore[operator]
    text = ids(50)
    found = capacity.collapse(lens, text, 16, bucket=8, chunk=16)
    law = lens.trace(text).logits.log_softmax(-1)
    loss = -law[:, :-1].gather(-1, text[:, 1:, None])[..., 0].mean(0)
    exact = torch.stack([loss[k : k + 8].mean() for k in range(0, 48, 8)] + [loss[48]])
    torch.testing.assert_close(found.value, exact, rtol=1e-9, atol=1e-9)
    assert found.coords["bucket"] == [8, 16, 24, 32, 40, 48, 50]
    assert ((found.columns["low"] <= found.value) & (found.value <= found.columns["high"])).all()


@pytest.mark.parametrize("make", [tiny_mamba1, tiny_mamba2])
def test_chunks_do_not_matter(make: object) -> None:
    lens = ssmlens.load(make().double())  # type: ignore[operator]
    text = ids(40)
    # Chunks of two tokens end inside the convolution's window.
    a, b = (capacity.collapse(lens, text, 10, bucket=2, chunk=c, by="head") for c in (2, 40))
    torch.testing.assert_close(a.value, b.value, rtol=1e-9, atol=1e-12)
    a, b = (capacity.collapse(lens, text, 10, bucket=2, chunk=c) for c in (2, 40))
    torch.testing.assert_close(a.control["restarted"], b.control["restarted"], rtol=1e-9, atol=1e-9)


def test_the_control_starts_anew() -> None:
    lens = ssmlens.load(tiny_mamba2().double())
    text = ids(36)
    found = capacity.collapse(lens, text, 12, bucket=6, chunk=18)
    parts = []
    for start in (0, 12, 24):
        law = lens.trace(text[:, start : start + 12]).logits.log_softmax(-1)
        following = text[:, start + 1 : start + 13]
        parts.append(-law[:, : following.shape[1]].gather(-1, following[..., None])[..., 0].mean(0))
    loss = torch.cat(parts)
    exact = torch.stack([loss[k : k + 6].mean() for k in range(0, 36, 6)])
    torch.testing.assert_close(found.control["restarted"], exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.value[:2], exact[:2], rtol=1e-9, atol=1e-9)
    assert not capacity.collapse(lens, text, 12, bucket=6, control=False).control


def test_states_are_those_of_one_pass() -> None:
    lens = ssmlens.load(tiny_mamba2().double())
    text = ids(24)
    found = capacity.collapse(lens, text, 8, bucket=4, chunk=8, smooth=1, by="head")
    assert found.dims == ("layer", "head", "bucket")
    trace = lens.trace(text)
    for k in range(3):
        states = trace[k].recurrence.states(range(3, 24, 4)).flatten(3)
        torch.testing.assert_close(found.value[k], states.var(-1).mean(0).mT, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(
            found.columns["median"][k], states.median(-1).values.mean(0).mT, rtol=1e-9, atol=1e-12
        )
        logs = trace[k].recurrence.log_decay[..., 0]
        decay = torch.stack([logs[:, t : t + 4].mean(1).exp().mean(0) for t in range(0, 24, 4)], dim=1)
        torch.testing.assert_close(found.columns["decay"][k], decay, rtol=1e-9, atol=1e-12)
    # The training length ends with the second bucket.
    torch.testing.assert_close(found.columns["factor"][..., 1], torch.ones(3, 8, dtype=torch.float64))


@pytest.mark.parametrize("where", ["ledger", "state"])
def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    lens, text = ssmlens.load(tiny_mamba2()), ids(40)
    whole = capacity.collapse(lens, text, 16, bucket=8, chunk=8)
    keep, calls = _stream._keep, []

    def killed(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            if where == "state":
                keep(*arguments)  # type: ignore[arg-type]
            raise KeyboardInterrupt
        keep(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(_stream, "_keep", killed)
    with pytest.raises(KeyboardInterrupt):
        capacity.collapse(lens, text, 16, bucket=8, chunk=8, resume=tmp_path / "run")
    monkeypatch.setattr(_stream, "_keep", keep)
    seen: list[int] = []
    again = capacity.collapse(
        lens, text, 16, bucket=8, chunk=8, resume=tmp_path / "run", progress=lambda done, total: seen.append(done)
    )
    assert seen == ([24, 32, 40] if where == "ledger" else [32, 40])
    assert torch.equal(again.value, whole.value)
    assert torch.equal(again.control["restarted"], whole.control["restarted"])
    done: list[int] = []
    capacity.collapse(lens, text, 16, bucket=8, chunk=8, resume=tmp_path / "run", progress=lambda d, t: done.append(d))
    assert done == []
    with pytest.raises(SsmlensError, match="other settings"):
        capacity.collapse(lens, ids(40, 1), 16, bucket=8, chunk=8, resume=tmp_path / "run")


def test_a_lost_state_starts_again(tmp_path: Path) -> None:
    lens, text = ssmlens.load(tiny_mamba2()), ids(24)
    first = capacity.collapse(lens, text, 8, bucket=8, chunk=8, resume=tmp_path / "run")
    (tmp_path / "run.state").unlink()
    assert torch.equal(capacity.collapse(lens, text, 8, bucket=8, chunk=8, resume=tmp_path / "run").value, first.value)


def test_short_prompts_are_repeated() -> None:
    lens = ssmlens.load(tiny_mamba2())
    found = capacity.collapse(lens, [7], 8, 32, bucket=8)
    exact = capacity.collapse(lens, torch.full((1, 32), 7), 8, bucket=8)
    assert torch.equal(found.value, exact.value)


def test_onsets_by_hand() -> None:
    loss = torch.tensor([3.0, 2.5, 2.4, 2.6, 3.1, 3.2, 2.0])
    factor = torch.tensor([[9.0, 1, 1, 2, 2, 4, 4], [1, 1, 1, 1, 1, 1, 1]])
    found = capacity.collapse_onset(loss, factor, 1, [10, 20, 30, 40, 50, 60, 70])
    assert found == {"loss_onset": 50, "state_onset": 60, "onset": 60}
    never = capacity.collapse_onset(loss, factor.clamp(max=2), 1)
    assert never == {"loss_onset": 4, "state_onset": float("inf"), "onset": float("inf")}
    later = capacity.collapse_onset(loss, factor, 5)
    assert later["state_onset"] == 6


def test_refusals() -> None:
    lens = ssmlens.load(tiny_mamba2())
    with pytest.raises(ValueError, match="two buckets"):
        capacity.collapse(lens, ids(10), 8, bucket=8)
    with pytest.raises(ValueError, match="bucket is 1 to train_length"):
        capacity.collapse(lens, ids(100), 8, bucket=16)
    with pytest.raises(ValueError, match="choose one of bucket, head"):
        capacity.collapse(lens, ids(100), 16, by="layer")
