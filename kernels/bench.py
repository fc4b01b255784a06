"""Times of the kernels, each behind a green correctness gate.

    python -m ssmlens.kernels.bench [OP ...] [--peers] [--json FILE]
    python -m ssmlens.kernels.bench million [--tokens N] [--device cuda] [--json FILE]

For every op the numbers that were timed are first compared with the float64 loop of `naive`; a wrong result
ends the program before any time is printed. Then: median and best of repeated runs after a warm-up, peak memory
beyond the inputs, and the share of the time that reading every input and writing every output once would take
at this machine's measured copy speed. ``trace`` times a whole traced model against its own forward; ``million``
traces a million tokens and measures what they left behind, see `bench_million`.
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

from . import peers
from .bench_ops import OPS, SMALL, Size, mamba
from .inputs import ScanInputs

__all__ = ["OPS", "Measurement", "main", "measure"]

GATE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest relative error against float64 with which a time is printed."""


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


def sizes(name: str, device: str = "cpu", small: bool = False) -> Sequence[Size]:
    """The sizes (b, t, h, p, n) at which an op is timed on a device.

    Raises:
        ValueError: unknown op.
    """
    if name not in OPS:
        raise ValueError(f"unknown op {name!r}: choose from {', '.join([*OPS, 'trace', 'million'])}")
    found = OPS[name].sizes["cuda" if device.startswith("cuda") else "cpu"]
    return [SMALL["p = 1" if found[0][3] == 1 else "p > 1"]] if small else found


def measure(
    name: str,
    size: Size,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    repeats: int = 5,
) -> tuple[Measurement, ScanInputs]:
    """Gate one op at one size, then time it.

    Raises:
        ValueError: a result further from float64 than `GATE` allows.
    """
    op = OPS[name]
    dtype = op.dtype or dtype
    x = mamba(*size, device, dtype)
    call = op.prepare(x)
    with torch.no_grad():
        # The first run: later ones find the memory that it left with the allocator.
        with peak_memory(device) as peak:
            found = call()
        # The gate upcasts what the op was given: rounding of the inputs is not an error of the kernel.
        error = op.error(x, found)
        gate = GATE[dtype if op.precision == torch.float32 else op.precision]
        if not error <= gate:
            raise ValueError(f"{name} is wrong: relative error {error:.1e} against float64 (limit {gate:.0e})")
        moved = sum(z.numel() * z.element_size() for z in [*x.tensors().values(), *found])
        del found
        times = timed(call, device, repeats)
    median = statistics.median(times)
    share = moved / copy_speed(device) * 1e3 / median
    b, t, h, p, n = size
    shape = f"b={b} t={t} h={h} p={p} n={n}"
    row = Measurement(
        name, op.what, shape, device_name(device), str(dtype).removeprefix("torch."), torch.get_num_threads(), error,
        median, min(times), repeats, peak[0] if peak else None, share,
    )  # fmt: skip
    return row, x


def timed(call: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Milliseconds of each run; the caller has warmed up.

    On a GPU the time is that between two events on the device, with the L2 cache overwritten before each run, and the
    device kept busy long enough that what Python needs to launch is hidden, as it is behind the work before it in a
    model whose layers take longer than their launches.
    """
    if device.startswith("cuda"):
        return _timed_on_device(call, device, repeats)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


# Clock cycles for which the device waits before each timed run: about a millisecond.
_BUSY = 2_000_000


def _timed_on_device(call: Callable[[], object], device: str, repeats: int) -> list[float]:
    cache = torch.empty(2**28, dtype=torch.int8, device=device)
    events = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        torch.cuda._sleep(_BUSY)
        start.record()
        call()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


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
    parser.add_argument(
        "ops", nargs="*", metavar="OP", help=f"{', '.join([*OPS, 'trace', 'million'])}; default: the first {len(OPS)}"
    )
    parser.add_argument("--peers", action="store_true", help="time other implementations in the same run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements there")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2**20, help="length of the text of million")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does everything run?")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    try:
        if options.repeats < 1:
            raise ValueError(f"--repeats is at least 1, got {options.repeats}")
        for name in options.ops or OPS:
            if name == "trace":
                for found in peers.traces(options.small, options.repeats, timed, options.device):
                    rows.append({**found, "device": device_name(options.device)})
                    _show(rows[-1])
                continue
            if name == "million":
                from .bench_million import million

                dtype = getattr(torch, options.dtype)
                for found in million(options.tokens, options.device, dtype, options.small, peak_memory):
                    rows.append({**found, "device": device_name(options.device)})
                    _show(rows[-1])
                continue
            for size in sizes(name, options.device, options.small):
                row, x = measure(name, size, options.device, getattr(torch, options.dtype), options.repeats)
                if options.peers:
                    row.peers_ms.update(peers.times(name, x, options.repeats, timed))
                rows.append(asdict(row))
                _show(rows[-1])
                del row, x
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _show(row: dict[str, Any]) -> None:
    """One line of the table; every number beside what it was measured on."""
    if "step" in row:
        cost = "" if row["seconds"] is None else f"{row['seconds']:.3f} s"
        if row["peak_bytes"] is not None:
            cost += f"{', ' if cost else ''}peak {'+' if cost else ''}{row['peak_bytes'] / 1e6:,.0f} MB"
        print(
            f"{row['op']} ({row['tokens']:,} tokens, {row['dtype']}) {row['step']}: {cost} | {row['found']}", flush=True
        )
        return
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
