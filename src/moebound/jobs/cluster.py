"""Workers on a Ray cluster: the same results from many machines.

Each worker is an actor that opens what it works on itself; SRC must mean the same on every machine
(a hub id, builtin:NAME, or a folder that all can see). A worker that is lost, alone or with its
machine, is replaced, and another one does again what it was at.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moebound.errors import MoeboundError
from moebound.extras import need
from moebound.jobs.workers import Opens, Workers, cores

LOCAL = "local"
LOSSES = 3
"""So many workers may be lost at one piece of work; then the work is at fault, not the machines."""


class RayWorkers(Workers):
    """count: actors. address: of a cluster, as `ray.init` takes it ("auto" is the one this machine
    is part of), or "local" for one that is started here. gpus: of each actor.

    Raises BackendUnavailable without Ray, MoeboundError if the cluster cannot be reached.
    """

    def __init__(self, setup: Opens, count: int, address: str, *, gpus: float = 0.0) -> None:
        if count < 1:
            raise MoeboundError(f"workers {count}: expected 1 or more")
        ray = self._ray = need("ray", "work on a cluster")
        self.count = count
        threads = setup.threads or max(1, cores() // count)
        self._setup = setup.with_threads(threads)
        options: dict[str, Any] = {"num_cpus": threads, "num_gpus": gpus}
        self._ours = not ray.is_initialized()
        if self._ours:
            try:
                # Ray knows "local", too. Without any address it would join what else runs here.
                ray.init(
                    address, include_dashboard=False, log_to_driver=False, logging_level="error"
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise MoeboundError(f"Ray at {address!r} cannot be reached: {error}") from error
        self._actor = ray.remote(**options)(_Actor)
        self._workers: list[Any] = []

    def call(self, method: str, *args: Any) -> Any:
        return self._get(self._grow(1)[0].call.remote(method, args))

    def run(self, conditions: Sequence[Any], known: Mapping[str, Any]) -> Iterator[Any]:
        left = deque(conditions)
        lost: Counter[int] = Counter()
        # What each worker does: a condition, or, with None, opening and `use`. One that the cluster
        # has no room for never gets that far, and the others do its work.
        busy: dict[Any, tuple[Any, Any]] = {}
        idle: list[Any] = []
        for worker in self._grow(min(self.count, len(left))):
            busy[worker.call.remote("use", (known,))] = worker, None
        while left or any(work is not None for _, work in busy.values()):
            [done], _ = self._ray.wait(list(busy), num_returns=1)
            worker, work = busy.pop(done)
            try:
                found = self._answer(done)
            except self._ray.exceptions.RayError as error:
                self._gone(worker)
                at = id(work)  # conditions need not be hashable; they live as long as this call
                lost[at] += 1
                if lost[at] > LOSSES * (1 if work is not None else self.count):
                    raise MoeboundError(
                        f"{lost[at]} workers were lost at the same work, mostly for want of "
                        f"memory: {error}. What is finished is kept; the same command goes on"
                    ) from error
                if work is not None:
                    left.appendleft(work)
                [new] = self._grow(len(self._workers) + 1)[-1:]
                busy[new.call.remote("use", (known,))] = new, None
            else:
                idle.append(worker)
                if work is not None:
                    yield found
            while left and idle:
                worker, work = idle.pop(), left.popleft()
                busy[worker.call.remote("run", (work,))] = worker, work

    def _grow(self, count: int) -> list[Any]:
        while len(self._workers) < count:
            self._workers.append(self._actor.remote(self._setup))
        return self._workers

    def _gone(self, worker: Any) -> None:
        """A worker, or its machine, is no more; if it is only slow to say so, it ends now."""
        self._workers.remove(worker)
        self._ray.kill(worker)

    def _answer(self, reference: Any) -> Any:
        """Raises what the work raised, and RayError where the worker was lost."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MoeboundError):
                raise error.cause from None
            raise MoeboundError(f"a worker failed: {error.cause}") from error

    def _get(self, reference: Any) -> Any:
        try:
            return self._answer(reference)
        except self._ray.exceptions.RayError as error:
            raise MoeboundError(
                f"a worker was lost: {error}. What is finished is kept; the same command goes on"
            ) from error

    def close(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers = []
        if self._ours:
            self._ray.shutdown()


class _Actor:
    """A worker on some machine. The model is loaded with its first call."""

    def __init__(self, setup: Opens) -> None:
        self._setup = setup
        self._measurer: Any = None

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        self._measurer = self._measurer or self._setup.open()
        return getattr(self._measurer, method)(*args)
