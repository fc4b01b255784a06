"""What a trace file keeps, and how damage and failure show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import gap
from safetensors import safe_open
from safetensors.torch import save_file
from tolerances import RECONSTRUCTION

import ssmlens
from ssmlens.errors import CheckpointError, SsmlensError

IDS = [3, 17, 0, 36, 5, 5, 21]


@pytest.fixture(scope="module")
def lens() -> ssmlens.Lens:
    return ssmlens.load(checkpoints.mamba2())


@pytest.fixture(scope="module")
def trace(lens: ssmlens.Lens) -> ssmlens.Trace:
    return lens.trace(IDS)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [True, False])
def test_a_file_keeps_everything_bitwise(family: str, dtype: torch.dtype, weights: bool, tmp_path: Path) -> None:
    lens = ssmlens.load(getattr(checkpoints, family)(use_bias=True), dtype=dtype)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    trace = lens.trace(torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), attention_mask=mask)
    path = tmp_path / "a.trace"
    trace.save(path, weights=weights)
    again = ssmlens.Trace.load(str(path))
    assert_equal_traces(trace, again)
    for mixer in again:
        assert bool(mixer.parameters) == weights
        if weights:
            # Weights read from a file lie elsewhere in memory, and sums run in another order.
            limit = RECONSTRUCTION[dtype] / 10
            assert gap(mixer.rebuild(), trace[mixer.layer].rebuild()) <= limit
            assert gap(mixer.front()[0], trace[mixer.layer].front()[0]) <= limit
        else:
            with pytest.raises(SsmlensError, match=r"weights=True"):
                mixer.rebuild()
    again.save(path, weights=weights)
    assert_equal_traces(trace, ssmlens.Trace.load(path))
    assert [p.name for p in tmp_path.iterdir()] == ["a.trace"]


def assert_equal_traces(one: ssmlens.Trace, two: ssmlens.Trace) -> None:
    for name in ("tokens", "layers", "settings", "reconstruction_error", "tolerance"):
        assert getattr(one, name) == getattr(two, name), name
    pairs = [(getattr(one, n), getattr(two, n)) for n in ("ids", "logits", "lengths")]
    pairs += list(zip(one.residuals, two.residuals, strict=True))
    assert [m.layer for m in one] == [m.layer for m in two]
    for a, b in zip(one, two):
        assert (a.family, dict(a.config)) == (b.family, dict(b.config))
        ours, theirs = a.recurrence.inputs.tensors(), b.recurrence.inputs.tensors()
        assert ours.keys() == theirs.keys()
        pairs += [(ours[k], theirs[k]) for k in ours]
        pairs += [(a.gate, b.gate), (a.input, b.input), (a.output, b.output), (a.recurrence.D, b.recurrence.D)]
        pairs += [(a.recurrence.real_lengths, b.recurrence.real_lengths)]
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_a_file_holds_no_pickle_and_keeps_bfloat16(tmp_path: Path) -> None:
    ssmlens.load(checkpoints.mamba1(), dtype=torch.bfloat16).trace(IDS).save(tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.get_tensor("mixers.0.scan.value").dtype == torch.bfloat16
        assert all(isinstance(json.loads(x), (list, dict)) for k, x in file.metadata().items() if k != "format")


def damaged(path: Path, **metadata: str | None) -> None:
    with safe_open(path, "pt") as file:
        header = {**file.metadata(), **metadata}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={k: v for k, v in header.items() if v is not None})


@pytest.mark.parametrize("size", [0, 4, 20, 1000, -1])
def test_a_cut_file_is_refused(size: int, trace: ssmlens.Trace, tmp_path: Path) -> None:
    path = tmp_path / "a"
    trace.save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="damaged"):
        ssmlens.Trace.load(path)


@pytest.mark.parametrize("name", ["tokens", "layers", "mixers", "settings", "tensors"])
@pytest.mark.parametrize("text", [None, "{", "null", "[[]]"])
def test_a_damaged_header_is_refused(name: str, text: str | None, trace: ssmlens.Trace, tmp_path: Path) -> None:
    path = tmp_path / "a"
    trace.save(path)
    damaged(path, **{name: text})
    if (name, text) == ("tokens", "[[]]"):
        assert ssmlens.Trace.load(path).tokens == [[]]
        return
    with pytest.raises(CheckpointError, match="no whole trace"):
        ssmlens.Trace.load(path)


@pytest.mark.parametrize("name", ["logits", "residuals.2", "mixers.0.D", "mixers.1.scan.dt", "mixers.0.gate"])
def test_a_lost_tensor_is_noticed(name: str, trace: ssmlens.Trace, tmp_path: Path) -> None:
    path = tmp_path / "a"
    trace.save(path)
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys() if k != name}  # noqa: SIM118
    save_file(tensors, path, metadata=header)
    with pytest.raises(CheckpointError, match="no whole trace"):
        ssmlens.Trace.load(path)


def test_files_that_are_no_trace(trace: ssmlens.Trace, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    for path, words in (
        (tmp_path / "other", "no trace of format"),
        (tmp_path / "none", "the file does not exist"),
        (tmp_path, "it is a folder"),
    ):
        with pytest.raises(CheckpointError, match=words):
            ssmlens.Trace.load(path)


def test_a_failed_save_leaves_the_old_file(
    lens: ssmlens.Lens, trace: ssmlens.Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    trace.save(path)
    old = path.read_bytes()

    def full(tensors: Any, filename: Path, metadata: Any = None) -> None:
        filename.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(CheckpointError, match=r"cannot be written to .*No space left"):
            lens.trace([1, 2]).save(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert_equal_traces(ssmlens.Trace.load(path), trace)


def test_places_that_cannot_be_written(trace: ssmlens.Trace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "no" / "a", tmp_path / "file" / "a", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be written"):
            trace.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"
