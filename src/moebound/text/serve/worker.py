"""One thread that generates, one text at a time, and the bounded queue before it.

A job is one request, which may ask for several texts: they are made one after another. Its events
go to `notify`, from the worker's thread: the number of a text and a piece of it, of which the last
one has a finish; or one exception. A job that is cancelled while it waits leaves the queue at once;
one that runs stops before its next forward pass, for a pass cannot be broken off.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moebound.text.generation import Finish, GenerationSettings, Piece, generate
from moebound.text.serve.engine import Engine
from moebound.text.serve.errors import ApiError, shutting_down
from moebound.text.serve.stats import Outcome, Record, ServeStats

LONGEST_RETRY_S = 60

Event = tuple[int, Piece] | Exception
log = logging.getLogger("moebound.serve")


@dataclass(frozen=True, eq=False)
class Text:
    """One text to generate: what `generate` is called with."""

    prompt_ids: list[int]
    settings: GenerationSettings
    continues: bool = False
    prompt: str | None = None


@dataclass(eq=False)
class Job:
    """Texts to generate, one after another; never none. n: as many of them, one behind another,
    have the same prompt. accepted: on the clock of time.perf_counter."""

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


class Worker:
    """engine: what generates. queue: jobs that may wait while one runs. on_record: called after
    each job, from the worker's thread."""

    def __init__(
        self,
        engine: Engine,
        queue: int,
        *,
        on_record: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self.stats = ServeStats()
        self._engine, self._queue, self._on_record = engine, queue, on_record
        self._changed = threading.Condition()
        self._waiting = deque[Job]()
        self._running: Job | None = None
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
            busy = len(self._waiting) + (self._running is not None) + self._reserved
            if busy <= self._queue:
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
        """No more jobs: those that wait get 503, the one that runs goes on. Idempotent."""
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for job in waiting:
            job.notify(shutting_down())
            self._leave(job, "cancelled", "shutting down")

    def cancel_running(self) -> None:
        """The job that runs gets 503 now, and stops as soon as it can."""
        with self._changed:
            job = self._running
        if job is not None:
            job.cancelled.set()
            job.notify(shutting_down())

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end, after `close`. Returns whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def state(self) -> dict[str, int | bool]:
        """alive: whether jobs are taken and there is a thread to do them."""
        with self._changed:
            return {
                "alive": self._thread.is_alive() and not self._closed,
                "running": int(self._running is not None),
                "reading": self._reserved,
                "waiting": len(self._waiting),
                "queue": self._queue,
            }

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._closed):
                    self._changed.wait()
                if not self._waiting:
                    return
                job = self._running = self._waiting.popleft()
            last = self._run(job)
            # Counted and out of the way first: who has an answer finds both when asking again.
            with self._changed:
                self._running = None
            if last is not None:
                job.notify(last)

    def _run(self, job: Job) -> Event | None:
        """Returns the last event, which is still to be sent; None for a job that was cancelled."""
        begun, done = time.perf_counter(), list[Finish]()
        try:
            for index, text in enumerate(job.texts):
                self._engine.begin_sequence()
                for piece in generate(
                    self._engine.model,
                    self._engine.tokenizer,
                    text.prompt_ids,
                    text.settings,
                    continues=text.continues,
                    prompt=text.prompt,
                    should_stop=job.cancelled.is_set,
                ):
                    if piece.finish is None:
                        job.notify((index, piece))
                assert piece.finish is not None  # of the last piece of any text
                done.append(piece.finish)
                if piece.finish.reason == "cancelled":
                    self._leave(job, "cancelled", "while it ran", begun, done)
                    return None
                if index < len(job.texts) - 1:
                    job.notify((index, piece))
        except Exception as error:
            log.error("a request failed", exc_info=error)
            self._leave(job, "failed", type(error).__name__, begun)
            return error
        self._leave(job, "completed", done[-1].reason, begun, done)
        return index, piece

    def _leave(
        self,
        job: Job,
        outcome: Outcome,
        reason: str,
        begun: float | None = None,
        done: Sequence[Finish] = (),
    ) -> None:
        """begun: on the clock of time.perf_counter, None for a job that only waited."""
        now = time.perf_counter()
        queued = (now if begun is None else begun) - job.accepted
        # Of the tokens behind the first ones of all texts.
        paces = [
            (finish.seconds_per_token, finish.n_new - 1)
            for finish in done
            if finish.seconds_per_token is not None
        ]
        first = done[0].first_token_s if done else None
        record = Record(
            outcome=outcome,
            reason=reason,
            n_prompt=job.n_prompt,
            n_new=sum(finish.n_new for finish in done),
            queued_s=queued,
            ttft_s=None if first is None else queued + first,
            tpot_s=sum(s * n for s, n in paces) / sum(n for _, n in paces) if paces else None,
            total_s=now - job.accepted,
        )
        self.stats.add(record)
        try:
            self._on_record(record)
        except Exception as error:  # a log that cannot be written must not end the thread
            log.error("a record was lost", exc_info=error)
