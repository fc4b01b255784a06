"""Times of the kernels, each behind a green correctness gate.

    python -m ssmlens.kernels.bench [OP ...] [--peers] [--json FILE]

For every op the numbers that were timed are first compared with the float64 loop of `naive`; a wrong result
ends the program before any time is printed. Then: median and best of repeated runs after a warm-up, peak memory
beyond the inputs, and the share of the time that reading every input and writing every output once would take
at this machine's measured copy speed. ``trace`` times a whole traced model against its own forward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import attention, naive, peers, scan
from .inputs import ScanInputs

__all__ = ["OPS", "Measurement", "main", "measure"]

GATE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest relative error against float64 with which a time is printed."""

# Heads and tokens on which an op is compared with the loop: heads do not mix, and a prefix is a prefix.
_HEADS, _TOKENS = 4, 48


@dataclass(frozen=True)
class Op:
    """One timed piece of work on one recurrence.

    Attributes:
        what: for the table.
        sizes: (b, t, h, p, n) on a CPU and on a GPU.
        prepare: inputs to the call that is timed; the call returns the tensors it made.
        error: inputs and those tensors to their relative error against the float64 loop.
    """

    what: str
    sizes: dict[str, tuple[int, int, int, int, int]]
    prepare: Callable[[ScanInputs], Callable[[], Sequence[Tensor]]]
    error: Callable[[ScanInputs, Sequence[Tensor]], float]


@dataclass(frozen=True)
class Measurement:
    """One row of the table; times in milliseconds, memory in bytes."""

    op: str
    what: str
    shape: str
    device: str
    dtype: str
    threads: int
    error: float
    median_ms: float
    best_ms: float
    repeats: int
    peak_bytes: int | None
    copy_share: float | None = None
    peers_ms: dict[str, float] = field(default_factory=dict)


def mamba(b: int, t: int, h: int, p: int, n: int, device: str, dtype: torch.dtype) -> ScanInputs:
    """Inputs like a released model's: p = 1 is Mamba-1 (decay per state), p > 1 Mamba-2 (decay per head)."""
    rng = torch.Generator().manual_seed(0)
    # softplus of a bias drawn as at initialisation: steps from 0.001 to 0.1.
    dt = torch.exp(torch.rand(b, t, h, generator=rng) * 4.6 - 6.9)
    A = -torch.arange(1.0, n + 1).expand(h, n) if p == 1 else -(1 + 15 * torch.rand(h, 1, generator=rng))
    pieces = {
        "value": torch.randn(b, t, h, p, generator=rng),
        "write": torch.randn(b, t, 1, n, generator=rng),
        "read": torch.randn(b, t, 1, n, generator=rng),
        "dt": dt,
        "A": A.contiguous(),
    }
    return ScanInputs(**{k: x.to(device, dtype) for k, x in pieces.items()})


def _forward(x: ScanInputs) -> Callable[[], Sequence[Tensor]]:
    return lambda: scan.run(x)


def _backward(x: ScanInputs) -> Callable[[], Sequence[Tensor]]:
    """Forward and backward; the gradients of value, dt and A, which heads do not share, come first."""
    pieces = {k: z.clone().requires_grad_() for k, z in x.tensors().items()}
    leaves = [pieces[k] for k in ("value", "dt", "A", "write", "read")]
    weight = torch.ones_like(scan.run(x.slice(0, 1))[0]).expand(x.value.shape)

    def call() -> Sequence[Tensor]:
        with torch.enable_grad():
            y, _ = scan.run(ScanInputs(**pieces))
            return torch.autograd.grad(y, leaves, weight)

    return call


def _relative(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).abs().max() / true.abs().max())


def _some_heads(x: ScanInputs) -> ScanInputs:
    return x.select_heads(slice(0, min(_HEADS, x.n_heads))).cast(torch.float64)


def _forward_error(x: ScanInputs, found: Sequence[Tensor]) -> float:
    some = _some_heads(x)
    y, final = naive.run(some)
    h = some.n_heads
    return max(_relative(found[0][:, :, :h], y), _relative(found[1][:, :h], final))


def _states_error(x: ScanInputs, found: Sequence[Tensor]) -> float:
    some = _some_heads(x)
    return _relative(found[0][:, :, : some.n_heads], naive.states(some))


def _backward_error(x: ScanInputs, found: Sequence[Tensor]) -> float:
    some = _some_heads(x)
    h = some.n_heads
    pieces = {k: z.clone().requires_grad_() for k, z in some.tensors().items()}
    with torch.enable_grad():
        y, _ = naive.run(ScanInputs(**pieces))
        value, dt, A = torch.autograd.grad(y.sum(), [pieces[k] for k in ("value", "dt", "A")])
    errors = (found[0][:, :, :h], value), (found[1][:, :, :h], dt), (found[2][:h], A)
    return max(_relative(a, b) for a, b in errors)


def _prefix(x: ScanInputs) -> ScanInputs:
    return x.slice(0, min(_TOKENS, x.length)).cast(torch.float64)


def _dense_error(x: ScanInputs, found: Sequence[Tensor]) -> float:
    some = _prefix(x)
    return _relative(found[0][:, :, : some.length, : some.length], naive.attention(some))


def _reduce_error(x: ScanInputs, found: Sequence[Tensor]) -> float:
    some = _prefix(x)
    return _relative(found[0][:, : some.length, : some.length], naive.attention(some).abs().mean(1))


def _row_error(x: ScanInputs, found: Sequence[Tensor]) -> float:
    """A row times the values is the output there."""
    some = _some_heads(x)
    y = naive.run(some)[0][:, -1]
    return _relative(torch.einsum("bhs,bshp->bhp", found[0][:, : some.n_heads].double(), some.value), y)


_MAMBA1 = {"cpu": (1, 1024, 1536, 1, 16), "cuda": (1, 2048, 5120, 1, 16)}
_MAMBA2 = {"cpu": (1, 1024, 24, 64, 128), "cuda": (1, 2048, 80, 64, 128)}
_SHORT = {"cpu": (1, 128, 1536, 1, 16), "cuda": (1, 1024, 1536, 1, 16)}
_LONG = {"cpu": (1, 1024, 1536, 1, 16), "cuda": (1, 4096, 1536, 1, 16)}

OPS = {
    "mamba1": Op("scan, y and final state", _MAMBA1, _forward, _forward_error),
    "mamba1-backward": Op("scan forward and backward", _MAMBA1, _backward, _backward_error),
    "mamba2": Op("scan, y and final state", _MAMBA2, _forward, _forward_error),
    "mamba2-backward": Op("scan forward and backward", _MAMBA2, _backward, _backward_error),
    "states": Op("every state", _LONG, lambda x: lambda: [scan.states(x)], _states_error),
    "dense": Op("attention, all heads", _SHORT, lambda x: lambda: [attention.dense(x)], _dense_error),
    "reduce": Op("attention, mean_abs", _LONG, lambda x: lambda: [attention.reduce(x, "mean_abs")], _reduce_error),
    "row": Op("last row of attention", _LONG, lambda x: lambda: [attention.row(x, x.length - 1)], _row_error),
}
"""What can be timed besides ``trace``."""

SMALL = {"p = 1": (1, 40, 24, 1, 4), "p > 1": (1, 40, 4, 8, 8)}
"""Sizes of ``--small``: a check that everything runs, not a measurement."""


def measure(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, repeats: int = 5, small: bool = False
) -> tuple[Measurement, ScanInputs]:
    """Gate one op, then time it.

    Raises:
        ValueError: unknown op, or a result further from float64 than `GATE` allows.
    """
    if name not in OPS:
        raise ValueError(f"unknown op {name!r}: choose from {', '.join([*OPS, 'trace'])}")
    op = OPS[name]
    sizes = op.sizes["cuda" if device.startswith("cuda") else "cpu"]
    if small:
        sizes = SMALL["p = 1" if sizes[3] == 1 else "p > 1"]
    x = mamba(*sizes, device, dtype)
    call = op.prepare(x)
    with torch.no_grad():
        # The first run: later ones find the memory that it left with the allocator.
        with peak_memory(device) as peak:
            found = call()
        # The gate upcasts what the op was given: rounding of the inputs is not an error of the kernel.
        error = op.error(x, found)
        if not error <= GATE[dtype]:
            raise ValueError(f"{name} is wrong: relative error {error:.1e} against float64 (limit {GATE[dtype]:.0e})")
        moved = sum(z.numel() * z.element_size() for z in [*x.tensors().values(), *found])
        del found
        times = timed(call, device, repeats)
    median = statistics.median(times)
    share = moved / copy_speed(device) * 1e3 / median
    b, t, h, p, n = sizes
    shape = f"b={b} t={t} h={h} p={p} n={n}"
    row = Measurement(
        name, op.what, shape, device_name(device), str(dtype).removeprefix("torch."), torch.get_num_threads(), error,
        median, min(times), repeats, peak[0] if peak else None, share,
    )  # fmt: skip
    return row, x


def timed(call: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Milliseconds of each run; the caller has warmed up."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@contextmanager
def peak_memory(device: str) -> Iterator[list[int]]:
    """Bytes in use at the highest point of the block beyond those at its start, appended to the list.

    Stays empty where neither CUDA nor Linux' resettable high-water mark is there.
    """
    peak: list[int] = []
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak.append(torch.cuda.max_memory_allocated() - before)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.append(max(0, _status("VmHWM") - before))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def copy_speed(device: str) -> float:
    """Bytes a second that a plain copy reads and writes here, best of five."""
    source = torch.zeros(2**28 if device.startswith("cuda") else 2**24, device=device)
    target = torch.zeros_like(source)
    best = min(timed(lambda: target.copy_(source), device, 5))
    return 2 * source.numel() * source.element_size() / best * 1e3


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "cpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 when every gate is green, 2 with one sentence otherwise."""
    parser = argparse.ArgumentParser(prog="python -m ssmlens.kernels.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"{', '.join([*OPS, 'trace'])}; default: all but trace")
    parser.add_argument("--peers", action="store_true", help="time other implementations in the same run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements there")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny sizes: does everything run?")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    try:
        if options.repeats < 1:
            raise ValueError(f"--repeats is at least 1, got {options.repeats}")
        for name in options.ops or OPS:
            if name == "trace":
                for found in peers.traces(options.small, options.repeats, timed):
                    rows.append({**found, "device": device_name("cpu")})
                    _show(rows[-1])
            else:
                row, x = measure(name, options.device, getattr(torch, options.dtype), options.repeats, options.small)
                if options.peers:
                    row.peers_ms.update(peers.times(name, x, options.repeats, timed))
                rows.append(asdict(row))
                _show(rows[-1])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _show(row: dict[str, Any]) -> None:
    """One line of the table; every number beside what it was measured on."""
    if "ratio" in row:
        cost = (
            f"trace {row['trace_ms']:.0f} ms, model's own forward {row['forward_ms']:.0f} ms, ratio {row['ratio']:.3f}"
        )
    else:
        cost = f"{row['median_ms']:.2f} ms (best {row['best_ms']:.2f})"
        if row["peak_bytes"] is not None:
            cost += f", peak +{row['peak_bytes'] / 1e6:.0f} MB"
        cost += f", {100 * row['copy_share']:.1f} % of copy speed"
        for peer, other in row["peers_ms"].items():
            cost += f" | {peer} {other:.2f} ms, {other / row['median_ms']:.1f}x ours"
    where = (
        f"{row['device']}, {row['dtype']}, {row['threads']} threads, {row['repeats']} runs, error {row['error']:.1e}"
    )
    print(f"{row['op']} ({row['what']}; {row['shape']}): {cost}  [{where}]", flush=True)


if __name__ == "__main__":
    sys.exit(main())
