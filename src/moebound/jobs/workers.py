"""Who measures: this process, other processes, or (see `cluster.py`) a Ray cluster.

All do the same: load the model themselves, and answer calls of a measurer's methods. In a study
that is a `Measurer`; the demo and `bench methods` measure stores in the same way, and `compress`,
`calibrate` and `sensitivity` are cut into shards, passes over the text and layers. Conditions do
not depend on each other, and every draw of noise has its own stream, so the rows are the same with
any number of workers, but for their order, `seconds`, and the last digits of kl where another
number of threads adds in another order.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol, Self

from moebound.errors import MoeboundError

GRACE_S = 5.0
"""How long a process may take to end by itself."""

AGAIN_S = 0.01
"""After which a worker that was told to end where that is lost is told so again."""


def cores() -> int:
    """CPUs of this machine, as far as this process may use them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Opens(Protocol):
    """How a worker gets what it measures with: plain data, which travels to it."""

    @property
    def threads(self) -> int | None: ...
    def with_threads(self, threads: int) -> Self: ...
    def open(self) -> Any:
        """Something with `use(known)` and `run(condition)`, such as a `Measurer`."""


@dataclass(frozen=True)
class Opening:
    """`make(**args, threads=...)`, with a function of a module, which workers find by its name."""

    make: Callable[..., Any]
    args: Mapping[str, Any]
    threads: int | None = None

    def with_threads(self, threads: int) -> Opening:
        return replace(self, threads=threads)

    def open(self) -> Any:
        return self.make(**self.args, threads=self.threads)


Hire = Callable[[Opens], "Workers"]
"""Workers of some kind and number, for what is to be opened."""


class Workers(ABC):
    """Use as a `with`; workers end with it."""

    count: int

    @abstractmethod
    def call(self, method: str, *args: Any) -> Any:
        """One call of a method of what was opened, by the first worker."""

    @abstractmethod
    def run(self, conditions: Sequence[Any], known: Mapping[str, Any]) -> Iterator[Any]:
        """Do all, in any order. known: what `use` is given, once a worker."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything, at once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class InProcess(Workers):
    """One worker: this process."""

    count = 1

    def __init__(self, measurer: Any) -> None:
        self._measurer = measurer

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._measurer, method)(*args)

    def run(self, conditions: Sequence[Any], known: Mapping[str, Any]) -> Iterator[Any]:
        self._measurer.use(known)
        for condition in conditions:
            yield self._measurer.run(condition)

    def close(self) -> None:
        """Nothing to let go of."""


class Processes(Workers):
    """Several processes of this machine, each with its own model and its share of the cores."""

    def __init__(self, setup: Opens, count: int) -> None:
        if count < 1:
            raise MoeboundError(f"workers {count}: expected 1 or more")
        self.count = count
        threads = setup.threads or max(1, cores() // count)
        self._setup = setup.with_threads(threads)
        self._workers: list[_Process] = []

    def call(self, method: str, *args: Any) -> Any:
        first = self._grow(1)[0]
        first.send(method, *args)
        return first.receive()

    def run(self, conditions: Sequence[Any], known: Mapping[str, Any]) -> Iterator[Any]:
        left = list(reversed(conditions))
        workers = self._grow(min(self.count, len(left)))
        busy: dict[Connection, _Process] = {}
        for worker in workers:
            worker.send("use", known)
            busy[worker.connection] = worker
        while busy:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]  # they are those given
                found = worker.receive()
                if left:
                    worker.send("run", left.pop())
                else:
                    del busy[worker.connection]
                if found is not None:  # `use` has nothing to say
                    yield found

    def _grow(self, count: int) -> list[_Process]:
        while len(self._workers) < count:
            self._workers.append(_Process(self._setup, len(self._workers)))
        return self._workers

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []


class _Process:
    """One process, and the line to it."""

    def __init__(self, setup: Opens, number: int) -> None:
        self._number = number
        context = multiprocessing.get_context("spawn")  # forked torch threads hang
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, setup), name=f"worker-{number}", daemon=True
        )
        self._process.start()
        theirs.close()  # else its death would not be noticed

    def send(self, method: str, *args: Any) -> None:
        try:
            self.connection.send((method, args))
        except OSError:
            self._died()

    def receive(self) -> Any:
        try:
            good, found = self.connection.recv()
        except (EOFError, OSError):
            self._died()
        if not good:
            raise found
        return found

    def _died(self) -> None:
        self._process.join(GRACE_S)
        raise MoeboundError(
            f"worker {self._number} ended with exit code {self._process.exitcode} (-9 is mostly "
            "for want of memory: each worker has a model of its own). What is finished is kept; "
            "the same command goes on, with fewer --workers if need be"
        )

    def stop(self) -> None:
        self.connection.close()
        self._process.terminate()
        self._process.join(GRACE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _serve(connection: Connection, setup: Opens) -> None:
    """What a worker process does: answer calls until the line is cut."""
    # Ctrl-C reaches every process of a terminal; the one that has us decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Told to end, it ends as an exception does: folders and processes that it has go with it.
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGALRM, _end)
    sys.unraisablehook = _lost
    measurer: Any = None
    while True:
        try:
            method, args = connection.recv()
        except (EOFError, OSError):
            # It ends by itself; told so again in the middle of that, it would only complain.
            for told in (signal.SIGTERM, signal.SIGALRM):
                signal.signal(told, signal.SIG_IGN)
            return
        try:
            measurer = measurer or setup.open()
            answer = (True, getattr(measurer, method)(*args))
        except Exception as error:
            answer = (False, _sendable(error))
        with suppress(BrokenPipeError):
            connection.send(answer)


def _end(number: int, frame: Any) -> None:
    del number, frame
    # Told so again, it would let go of its work halfway.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + signal.SIGTERM)


def _lost(unraisable: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised in a weak reference's callback or a finalizer, and goes on."""
    if isinstance(unraisable.exc_value, SystemExit):
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
    else:
        sys.__unraisablehook__(unraisable)


def _sendable(error: Exception) -> Exception:
    """Errors made on purpose travel as they are; of others, what they say."""
    if isinstance(error, MoeboundError):
        return error
    return MoeboundError(f"a worker failed: {type(error).__name__}: {error}")
