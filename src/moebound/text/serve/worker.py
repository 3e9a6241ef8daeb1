"""One thread that generates, several texts at a time, and the bounded queue before it.

A job is one request, which may ask for several texts: they begin in order, as there is room, and
before those of later jobs. Its events go to `notify`, from the worker's thread: the number of a
text and a piece of it, of which the last one has a finish; or one exception, which ends the job.
A job that is cancelled while it waits leaves the queue at once; one that runs stops before its next
forward pass, for a pass cannot be broken off. An error is of its own job alone.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moebound.text.generation import Finish, Piece
from moebound.text.serve.engine import Engine
from moebound.text.serve.errors import ApiError, shutting_down
from moebound.text.serve.stats import Outcome, Record, ServeStats
from moebound.text.together import Text, Together

LONGEST_RETRY_S = 60

Event = tuple[int, Piece] | Exception
log = logging.getLogger("moebound.serve")


@dataclass(eq=False)
class Job:
    """Texts to generate, never none. n: as many of them, one behind another, have the same prompt.
    accepted: on the clock of time.perf_counter."""

    texts: Sequence[Text]
    notify: Callable[[Event], None]
    n: int = 1
    accepted: float = field(default_factory=time.perf_counter)
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def n_prompt(self) -> int:
        """Tokens of its prompts, each counted once."""
        return sum(len(text.prompt_ids) for text in self.texts[:: self.n])


class Place:
    """One reserved place of a queue; given back, unused, when its context ends."""

    def __init__(self, worker: Worker) -> None:
        self._worker: Worker | None = worker

    def submit(self, job: Job) -> None:
        """Once. Raises ApiError: 503 after the worker was closed."""
        if self._worker is not None:
            worker, self._worker = self._worker, None
            worker.release(job)

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *error: object) -> None:
        if self._worker is not None:
            worker, self._worker = self._worker, None
            worker.release(None)


@dataclass(eq=False)
class _Active:
    """A job that has begun. begun: on the clock of time.perf_counter, the first text's and each
    text's. next: the text that begins next. failed: it has had its exception."""

    job: Job
    begun: float
    next: int = 0
    running: int = 0
    failed: bool = False
    begins: dict[int, float] = field(default_factory=dict)
    done: dict[int, Finish] = field(default_factory=dict)

    def given_up(self) -> bool:
        return self.failed or self.job.cancelled.is_set()

    @property
    def complete(self) -> bool:
        return len(self.done) == len(self.job.texts)


class Worker:
    """engine: what generates. queue: jobs that may wait while others run. most, kv_budget: texts
    at a time, and bytes for their keys and values, as of `Together`. on_record: called after each
    job, from the worker's thread."""

    def __init__(
        self,
        engine: Engine,
        queue: int,
        *,
        most: int = 1,
        kv_budget: int | None = None,
        on_record: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self.stats = ServeStats()
        self._queue, self._on_record = queue, on_record
        self._together = Together(
            engine.model,
            engine.tokenizer,
            most=most,
            kv_budget=kv_budget,
            begin_sequence=engine.begin_sequence,
        )
        self._kv_budget = kv_budget
        self._changed = threading.Condition()
        self._waiting = deque[Job]()
        self._active = list[_Active]()
        self._reserved = 0
        self._closed = False
        # A daemon, so that a forward pass that hangs cannot keep the process.
        self._thread = threading.Thread(target=self._work, name="moebound-generate", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def reserve(self) -> Place:
        """A place for a job that is still being read. Raises ApiError: 429 with a full queue, 503
        after `close`."""
        with self._changed:
            if self._closed:
                raise shutting_down()
            busy = len(self._waiting) + len(self._active) + self._reserved
            if busy < self._queue + self._together.most:
                self._reserved += 1
                return Place(self)
        self.stats.refuse()
        after = min(max(1, math.ceil(self.stats.mean_s())), LONGEST_RETRY_S)
        raise ApiError(
            429,
            f"the queue is full: {busy} requests run, wait or arrive; come again in {after} s",
            kind="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(after)},
        )

    def submit(self, job: Job) -> None:
        """A job that has been read. Raises what `reserve` raises."""
        with self.reserve() as place:
            place.submit(job)

    def release(self, job: Job | None) -> None:
        """Ends a reservation, with the job that it was for. Raises ApiError after `close`."""
        with self._changed:
            self._reserved -= 1
            if job is None:
                return
            if self._closed:
                raise shutting_down()
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Idempotent; for a job that has ended, nothing."""
        job.cancelled.set()
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        self._leave(job, "cancelled", "while it waited")

    def close(self) -> None:
        """No more jobs: those that wait get 503, those that run go on. Idempotent."""
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for job in waiting:
            job.notify(shutting_down())
            self._leave(job, "cancelled", "shutting down")

    def cancel_running(self) -> None:
        """The jobs that run get 503 now, and stop as soon as they can."""
        with self._changed:
            jobs = [active.job for active in self._active if not active.given_up()]
        for job in jobs:
            job.cancelled.set()
            job.notify(shutting_down())

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end, after `close`. Returns whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def state(self) -> dict[str, int | bool]:
        """alive: whether jobs are taken and there is a thread to do them. Of kv_budget_bytes, 0 is
        for no limit."""
        together = self._together
        with self._changed:
            return {
                "alive": self._thread.is_alive() and not self._closed,
                "running": len(self._active),
                "reading": self._reserved,
                "waiting": len(self._waiting),
                "queue": self._queue,
                "sequences": together.running,
                "sequences_paused": together.paused,
                "max_sequences": together.most,
                "kv_bytes": together.kv_bytes,
                "kv_budget_bytes": self._kv_budget or 0,
            }

    def _work(self) -> None:
        with self._together as together:
            while self._begin_texts():
                together.step()

    def _begin_texts(self) -> bool:
        """Begin what there is room for; wait for something if nothing runs. False at the end."""
        while True:
            for one in [one for one in self._active if one.given_up() and not one.running]:
                self._end(one, "cancelled", "while it ran")
            with self._changed:
                while not (self._waiting or self._active or self._closed):
                    self._changed.wait()
                if not (self._waiting or self._active):
                    return False
                active = next((one for one in self._active if self._has_more(one)), None)
                if active is None:
                    if not (self._waiting and self._together.has_room(self._waiting[0].texts[0])):
                        return True
                    active = _Active(self._waiting.popleft(), time.perf_counter())
                    self._active.append(active)
                elif not self._together.has_room(active.job.texts[active.next]):
                    return True
            self._begin_text(active)

    @staticmethod
    def _has_more(active: _Active) -> bool:
        return not active.given_up() and active.next < len(active.job.texts)

    def _begin_text(self, active: _Active) -> None:
        index = active.next
        active.next += 1
        active.running += 1
        active.begins[index] = time.perf_counter()

        def tell(found: Piece | Exception) -> None:
            self._told(active, index, found)

        self._together.start(active.job.texts[index], tell, should_stop=active.given_up)

    def _told(self, active: _Active, index: int, found: Piece | Exception) -> None:
        """A piece of a text, or why there is none."""
        if isinstance(found, Piece) and found.finish is None:
            if not active.given_up():
                active.job.notify((index, found))
            return
        active.running -= 1
        if isinstance(found, Exception):
            log.error("a request failed", exc_info=found)
            if not active.given_up():
                active.failed = True
                self._end(active, "failed", type(found).__name__)
                active.job.notify(found)
                return
        elif found.finish is not None:
            active.done[index] = found.finish
            if not active.given_up() and found.finish.reason != "cancelled":
                if active.complete:
                    # Counted and out of the way first: who has an answer finds both when asking
                    # again.
                    self._end(active, "completed", found.finish.reason)
                active.job.notify((index, found))
                return
        if active.running == 0 and not active.failed:
            self._end(active, "cancelled", "while it ran")

    def _end(self, active: _Active, outcome: Outcome, reason: str) -> None:
        self._leave(active.job, outcome, reason, active)
        with self._changed:
            self._active.remove(active)

    def _leave(
        self, job: Job, outcome: Outcome, reason: str, active: _Active | None = None
    ) -> None:
        """active: None for a job that only waited. Of one that failed, nothing but times counts."""
        now = time.perf_counter()
        queued = (now if active is None else active.begun) - job.accepted
        done = {} if active is None or outcome == "failed" else active.done
        # Of the tokens behind the first ones of all texts.
        paces = [
            (finish.seconds_per_token, finish.n_new - 1)
            for finish in done.values()
            if finish.seconds_per_token is not None
        ]
        firsts = [
            active.begins[index] + finish.first_token_s
            for index, finish in done.items()
            if active is not None and finish.first_token_s is not None
        ]
        record = Record(
            outcome=outcome,
            reason=reason,
            n_prompt=job.n_prompt,
            n_new=sum(finish.n_new for finish in done.values()),
            queued_s=queued,
            ttft_s=min(firsts) - job.accepted if firsts else None,
            tpot_s=sum(s * n for s, n in paces) / sum(n for _, n in paces) if paces else None,
            total_s=now - job.accepted,
        )
        self.stats.add(record)
        try:
            self._on_record(record)
        except Exception as error:  # a log that cannot be written must not end the thread
            log.error("a record was lost", exc_info=error)
