"""Long computations beside the pages: a queue of threads, with progress and cancel; results are kept by content.

A `Job` is one visitor's request, under an id that cannot be guessed: whoever knows the id sees it, nobody else does.
Jobs that ask for the same thing share one computation, which stops when all of them have been cancelled.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, Literal

import streamlit as st

from ssmlens.apps import wording
from ssmlens.errors import SsmlensError

__all__ = ["MOST_EACH", "MOST_GOING", "MOST_KEPT", "Busy", "Job", "Jobs", "Progress", "shared"]

_log = logging.getLogger(__name__)

AT_ONCE = 1
"""Computations that run at a time: one alone keeps the cores busy, and the pages need some of them."""

MOST_GOING = 8
"""Computations that run or wait at a time."""

MOST_EACH = 3
"""Those of one visitor."""

MOST_KEPT = 64
"""Ended computations that a server keeps, the longest unused dropped first."""

Progress = Callable[[int, int], None]
State = Literal["waiting", "running", "done", "failed", "cancelled"]


class Busy(SsmlensError):
    """As many studies wait as the server, or one visitor, may have."""


class _Stopped(Exception):
    """Raised inside a computation, from its own call of progress."""


class _Work:
    """One computation, however many jobs asked for it."""

    def __init__(self, run: Callable[[Progress], Any]) -> None:
        self.state: State = "waiting"
        self.steps = (0, 0)
        self.result: Any = None
        self.error = ""
        self.began = self.ended = 0.0
        self.followers = 0
        self.over = threading.Event()
        self.stop = threading.Event()
        self.run: Callable[[Progress], Any] | None = run

    def tell(self, done: int, total: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        self.steps = (done, total)

    def compute(self) -> State:
        """Run to the end, however it ends; returns the state that it ends in."""
        assert self.run is not None
        try:
            self.result = self.run(self.tell)
        except _Stopped:
            return "cancelled"
        except SsmlensError as error:
            self.error = wording.sentence(error)
        except Exception as error:
            # The whole story goes to the server's log.
            _log.exception("a study failed")
            self.error = f"{type(error).__name__}: {error}"
        return "failed" if self.error else "done"


class Job:
    """One visitor's request.

    Args:
        name: its id.
        key: what is computed: model, text, study and settings.
        title: what the page calls it.
        view: the choices that lead back to it, by the key of their control.
        work: the computation.
    """

    def __init__(self, name: str, key: Hashable, title: str, view: Mapping[str, Any], work: _Work) -> None:
        self.name, self.key, self.title, self.view = name, key, title, dict(view)
        self.left = False
        self._work = work

    @property
    def state(self) -> State:
        """Where it stands. One that was cancelled is so at once, even where the computation takes one more step."""
        return "cancelled" if self.left else self._work.state

    @property
    def going(self) -> bool:
        """True while it waits or runs."""
        return self.state in ("waiting", "running")

    @property
    def steps(self) -> tuple[int, int]:
        """Steps done and steps there are; 0 of 0 before the first."""
        return self._work.steps

    @property
    def seconds(self) -> float:
        """How long it has run."""
        work = self._work
        return (work.ended or time.monotonic()) - work.began if work.began else 0.0

    @property
    def result(self) -> Any:
        """What came of it, None unless it is done."""
        return self._work.result

    @property
    def error(self) -> str:
        """Why it failed, as a sentence; empty unless it did."""
        return self._work.error

    def wait(self, seconds: float | None = None) -> bool:
        """Until the computation has ended, or that long; True when it has."""
        return self._work.over.wait(seconds)


class Jobs:
    """The jobs of a server.

    Args:
        kept: ended computations that are kept.
        going: computations that run or wait at a time.
        at_once: computations that run at a time.
    """

    def __init__(self, kept: int = MOST_KEPT, going: int = MOST_GOING, at_once: int = AT_ONCE) -> None:
        self._jobs: dict[str, Job] = {}
        self._works: OrderedDict[Hashable, _Work] = OrderedDict()
        self._queue: list[_Work] = []
        self._running: set[_Work] = set()
        self._guard = threading.Lock()
        self._kept, self._going, self._at_once = kept, going, at_once

    def find(self, name: str) -> Job | None:
        """The job of this id, None where there is none (any more)."""
        with self._guard:
            job = self._jobs.get(name)
            if job is not None and job.key in self._works:
                self._works.move_to_end(job.key)
            return job

    def start(
        self,
        key: Hashable,
        run: Callable[[Progress], Any],
        *,
        title: str = "",
        view: Mapping[str, Any] | None = None,
        mine: Collection[str] = (),
    ) -> Job:
        """Ask for something: computed from anew, joined where it is being computed, or found where it is done.

        Args:
            key: names everything that the result depends on.
            run: computes it; calls progress(done, total) often, which is also where it stops when it is cancelled.
            title, view: as for `Job`.
            mine: ids of this visitor's jobs.

        Raises:
            Busy: when as many wait or run as may, on the server or of this visitor.
        """
        with self._guard:
            work = self._works.get(key)
            if work is None or work.stop.is_set() or work.state in ("failed", "cancelled"):
                self._make_room(mine)
                work = self._works[key] = _Work(run)
                self._queue.append(work)
            self._works.move_to_end(key)
            work.followers += 1
            job = Job(secrets.token_urlsafe(12), key, title, view or {}, work)
            self._jobs[job.name] = job
            self._forget()
            self._advance()
            return job

    def cancel(self, job: Job) -> None:
        """Give a job up. When nobody wants it any more, it stops: at once where it waits, else at its next step."""
        with self._guard:
            if not job.going:
                return
            job.left = True
            work = job._work
            work.followers -= 1
            if work.followers > 0:
                return
            work.stop.set()
            if work in self._queue:
                self._queue.remove(work)
                self._end(work, "cancelled")

    def before(self, job: Job) -> int:
        """How many computations come before this one, those that run included."""
        with self._guard:
            return len(self._running) + self._queue.index(job._work) if job._work in self._queue else 0

    def _make_room(self, mine: Collection[str]) -> None:
        own = {self._jobs[name]._work for name in mine if name in self._jobs and self._jobs[name].going}
        if len(own) >= MOST_EACH:
            raise Busy(f"{len(own)} of your studies wait or run, the most for one visitor: cancel one, or wait for it")
        going = len(self._queue) + len(self._running)
        if going >= self._going:
            raise Busy(f"{going} studies wait or run on this server, its most: try again when one of them has ended")

    def _advance(self) -> None:
        while self._queue and len(self._running) < self._at_once:
            work = self._queue.pop(0)
            work.state, work.began = "running", time.monotonic()
            self._running.add(work)
            threading.Thread(target=self._compute, args=(work,), daemon=True).start()

    def _compute(self, work: _Work) -> None:
        end = work.compute()
        with self._guard:
            self._running.discard(work)
            self._end(work, end)
            self._advance()

    def _end(self, work: _Work, state: State) -> None:
        work.state, work.ended = state, time.monotonic()
        work.run = None  # it holds the model
        work.over.set()

    def _forget(self) -> None:
        ended = [key for key, work in self._works.items() if work.state not in ("waiting", "running")]
        for key in ended[: max(0, len(ended) - self._kept)]:
            del self._works[key]
        known = set(self._works.values())
        # A computation that was replaced by another of its key, or dropped, takes its jobs along.
        self._jobs = {name: job for name, job in self._jobs.items() if job._work in known or job.going}


@st.cache_resource(show_spinner=False)
def shared() -> Jobs:
    """The jobs of this server, for as long as it runs."""
    return Jobs()
