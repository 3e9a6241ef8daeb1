"""Workers on a Ray cluster: the same rows from many machines.

Each worker is an actor that loads the model itself; SRC must mean the same on every machine (a hub
id, builtin:NAME, or a folder that all can see). Rows are written by the process that asked, so
nothing but answers travels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moebound.errors import MoeboundError
from moebound.extras import need
from moebound.jobs.workers import Opens, Workers, cores

LOCAL = "local"


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
            where = {} if address == LOCAL else {"address": address}
            try:
                ray.init(
                    **where, include_dashboard=False, log_to_driver=False, logging_level="error"
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise MoeboundError(f"Ray at {address!r} cannot be reached: {error}") from error
        self._actor = ray.remote(**options)(_Actor)
        self._workers: list[Any] = []

    def call(self, method: str, *args: Any) -> Any:
        return self._get(self._grow(1)[0].call.remote(method, args))

    def run(self, conditions: Sequence[Any], known: Mapping[str, Any]) -> Iterator[Any]:
        left = list(reversed(conditions))
        busy: dict[Any, Any] = {}
        for worker in self._grow(min(self.count, len(left))):
            worker.call.remote("use", (known,))  # calls of an actor keep their order
            busy[worker.call.remote("run", (left.pop(),))] = worker
        while busy:
            [done], _ = self._ray.wait(list(busy), num_returns=1)
            worker = busy.pop(done)
            if left:
                busy[worker.call.remote("run", (left.pop(),))] = worker
            yield self._get(done)

    def _grow(self, count: int) -> list[Any]:
        while len(self._workers) < count:
            self._workers.append(self._actor.remote(self._setup))
        return self._workers

    def _get(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MoeboundError):
                raise error.cause from None
            raise MoeboundError(f"a worker failed: {error.cause}") from error
        except self._ray.exceptions.RayError as error:
            raise MoeboundError(
                f"a worker was lost: {error}. Finished rows are kept; the same command goes on"
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
