"""Long computations beside the pages: each in a thread, one at a time, with progress and cancel; results are kept."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Literal

import streamlit as st

__all__ = ["MOST_KEPT", "MOST_WAITING", "Busy", "Job", "Jobs", "shared"]

_log = logging.getLogger(__name__)

MOST_KEPT = 16
"""Finished studies that a server keeps."""

MOST_WAITING = 8
"""Studies that wait or run at a time."""

Progress = Callable[[int, int], None]
State = Literal["waiting", "running", "done", "failed", "cancelled"]


class Busy(ValueError):
    """As many studies wait as the server takes."""


class _Cancelled(Exception):
    """Raised inside a study, from its own call of progress."""


class Job:
    """One study: where it stands, and its result once it is done."""

    def __init__(self, work: Callable[[Progress], Any], turn: threading.Lock) -> None:
        self.state: State = "waiting"
        self.steps = (0, 0)
        self.result: Any = None
        self.error = ""
        self._stop = threading.Event()
        self._work, self._turn = work, turn
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def going(self) -> bool:
        """True while it waits or runs."""
        return self.state in ("waiting", "running")

    def cancel(self) -> None:
        """Stop at the next step; at once where it only waits."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> None:
        """Until it has ended, or that long."""
        self._thread.join(seconds)

    def _tell(self, done: int, total: int) -> None:
        if self._stop.is_set():
            raise _Cancelled
        self.steps = (done, total)

    def _run(self) -> None:
        while not self._turn.acquire(timeout=0.1):
            if self._stop.is_set():
                self.state = "cancelled"
                return
        try:
            self._tell(0, 0)
            self.state = "running"
            self.result = self._work(self._tell)
            self.state = "done"
        except _Cancelled:
            self.state = "cancelled"
        except Exception as error:
            _log.exception("a study failed")
            self.error = str(error) or type(error).__name__
            self.state = "failed"
        finally:
            self._turn.release()


class Jobs:
    """Studies by key, the longest unused finished ones dropped first."""

    def __init__(self, most: int = MOST_KEPT, waiting: int = MOST_WAITING) -> None:
        self._jobs: OrderedDict[Hashable, Job] = OrderedDict()
        self._guard, self._turn = threading.Lock(), threading.Lock()
        self._most, self._waiting = most, waiting

    def find(self, key: Hashable) -> Job | None:
        """The study of this key, None where there is none."""
        with self._guard:
            if key in self._jobs:
                self._jobs.move_to_end(key)
            return self._jobs.get(key)

    def start(self, key: Hashable, work: Callable[[Progress], Any]) -> Job:
        """Begin a study, or find it going or done; one that failed or was cancelled begins again.

        Raises:
            Busy: when as many wait as may.
        """
        with self._guard:
            there = self._jobs.get(key)
            if there is not None and (there.going or there.state == "done"):
                return there
            if sum(job.going for job in self._jobs.values()) >= self._waiting:
                raise Busy(f"{self._waiting} studies wait or run already: try again when one of them has ended")
            job = self._jobs[key] = Job(work, self._turn)
            self._jobs.move_to_end(key)
            ended = [k for k, each in self._jobs.items() if not each.going and k != key]
            for old in ended[: max(0, len(self._jobs) - self._most)]:
                del self._jobs[old]
            return job


@st.cache_resource(show_spinner=False)
def shared() -> Jobs:
    """The studies of this server, for as long as it runs."""
    return Jobs()
