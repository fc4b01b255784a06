"""Blocks of independent work on a CPU, each on one thread.

torch splits every call over its threads and waits for all of them. Work that is many short calls then stalls
as soon as the machine has anything else to do: a helper thread that lost its core holds up each call for a
scheduler slice. Blocks of heads are independent, so they are shared out here instead, and every call inside a
block stays on its own thread.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["in_parts"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_LOCK = threading.Lock()
_POOLS: dict[int, ThreadPoolExecutor] = {}
# Threads do not survive a fork; a child makes its own.
os.register_at_fork(after_in_child=_POOLS.clear)


def in_parts(
    items: Sequence[Item], work: Callable[[Sequence[Item]], Result], *, alone: bool = False, most: int = 2**31
) -> list[Result]:
    """``work`` on runs of the items, in order: one run for each of torch's threads, or a single one here.

    Args:
        items: what there is to do; runs are of about the same length.
        work: called once for each run, on a thread where torch uses no other and records no gradient.
        alone: everything in one run on this thread, as it is: for a GPU, or where gradients are recorded.
        most: of runs, where each costs memory.
    """
    runs = min(torch.get_num_threads(), len(items), most)
    if alone or runs < 2:
        return [work(items)]
    edges = [len(items) * k // runs for k in range(runs + 1)]
    inference = torch.is_inference_mode_enabled()

    def one(start: int, stop: int) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return work(items[start:stop])

    pool = _pool(torch.get_num_threads())
    waiting = [pool.submit(one, start, stop) for start, stop in itertools.pairwise(edges)]
    return [future.result() for future in waiting]


def _pool(threads: int) -> ThreadPoolExecutor:
    with _LOCK:
        if threads not in _POOLS:
            ready = threading.Barrier(threads + 1)

            def start() -> None:
                torch.set_num_threads(1)
                ready.wait()

            pool = ThreadPoolExecutor(threads, thread_name_prefix="ssmlens-kernels", initializer=start)
            for _ in range(threads):
                pool.submit(int)
            ready.wait()
            # The setting holds for the calling thread, but new threads start from the last one made.
            torch.set_num_threads(threads)
            _POOLS[threads] = pool
        return _POOLS[threads]
