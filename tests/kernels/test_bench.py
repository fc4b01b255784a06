"""The benchmark's command line at tiny sizes, and that its gate closes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ssmlens.kernels import bench, scan


def test_every_op_runs_behind_its_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "bench.json"
    assert bench.main(["--small", "--repeats", "2", "--json", str(file)]) == 0
    rows = {row["op"]: row for row in json.loads(file.read_text())}
    assert list(rows) == list(bench.OPS)
    out = capsys.readouterr().out
    for name, row in rows.items():
        assert name in out
        assert 0 < row["best_ms"] <= row["median_ms"]
        half = name.endswith("bfloat16")
        assert 0 < row["error"] <= bench.GATE[torch.bfloat16 if half else torch.float32]
        assert row["dtype"] == ("bfloat16" if half else "float32")
        assert row["threads"] == torch.get_num_threads()
        assert row["repeats"] == 2
        assert "t=40" in row["shape"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype):
    row, _ = bench.measure("mamba1-backward", *bench.sizes("mamba1-backward", small=True), dtype=dtype, repeats=1)
    assert row.error <= bench.GATE[dtype]


@pytest.mark.parametrize("op", ["mamba1", "mamba2", "mamba2-states", "dense"])
def test_peers_compute_the_same(op: str):
    from ssmlens.kernels import peers

    _, x = bench.measure(op, *bench.sizes(op, small=True), repeats=1)
    assert all(t > 0 for t in peers.times(op, x, 1, bench.timed).values())
    found = {"dense": ["vectorised"], "mamba2-states": ["loop over t"]}.get(op, ["transformers"])
    assert list(peers._peers(op, x)) == found
    with torch.no_grad():
        theirs = peers._peers(op, x)[found[0]]()
        ours = bench.OPS[op].prepare(x)()[0]
    assert isinstance(theirs, torch.Tensor)
    if op == "mamba1":
        theirs = theirs.transpose(1, 2)[..., None]
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() < 1e-4 * ours.abs().max()


def test_a_trace_is_timed_against_the_models_own_forward(capsys: pytest.CaptureFixture[str]):
    assert bench.main(["trace", "--small", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "trace-mamba1" in out
    assert "trace-mamba2" in out
    assert "ratio" in out


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    right = scan.run
    monkeypatch.setattr(scan, "run", lambda x, **k: (right(x, **k)[0] * (1 + 1e-4), right(x, **k)[1]))
    assert bench.main(["mamba1", "--small"]) == 2
    captured = capsys.readouterr()
    assert "mamba1 is wrong: relative error" in captured.err
    assert not captured.out


@pytest.mark.parametrize(("arguments", "sentence"), [(["nonsense"], "unknown op"), (["--repeats", "0"], "at least 1")])
def test_bad_arguments(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]):
    assert bench.main(arguments) == 2
    assert sentence in capsys.readouterr().err
