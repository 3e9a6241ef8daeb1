"""A layer's experts for a forward pass: those that are there at once, the others as they arrive."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future

import torch

from moebound.cache import ExpertCache
from moebound.cache.claim import Claim
from moebound.cache.visits import gather, leading_first
from moebound.errors import CacheError, MoeboundError
from moebound.offload.fallback import CoarseCopies, Grade, Grades, shares_before
from moebound.offload.loader import Held, Loader, Order
from moebound.offload.meter import Meter, clock
from moebound.offload.predictors import Foresight
from moebound.offload.slots import Slot
from moebound.types import Array, ExpertKey

WAIT_S = 300.0
"""Only a hang takes so long."""

Compute = Callable[[Mapping[int, Slot | None], int], None]
"""Called with experts that are there, by their numbers in their module: their weights, None to
leave one out. And with how many threads are worth using: one while others decode."""


class Fetcher:
    """The cache, the loader and the predictor of one model. One visit at a time: two would each
    hold room that the other waits for, and the cache has it for one.

    decoding: whether the pass under way computes one token a text, as opposed to a prompt. Nothing
    that it holds may hold it: dropped without `close`, it ends its threads as soon as Python
    collects it. A forked child has none of these threads, and is refused.
    """

    def __init__(
        self,
        cache: ExpertCache[Held],
        loader: Loader,
        meter: Meter,
        foresight: Foresight,
        *,
        grades: Grades | None = None,
        coarse: CoarseCopies | None = None,
    ) -> None:
        self.cache, self.loader, self.meter = cache, loader, meter
        self.foresight = foresight
        self.decoding = False
        self._grades, self._coarse = grades, coarse
        self._one_visit = threading.Lock()
        self._process = os.getpid()
        dropped = weakref.finalize(self, _end_aside, self._process, cache, coarse, loader)
        dropped.atexit = False  # then daemon threads end by themselves

    @property
    def forked(self) -> bool:
        """Whether this is a forked child, which must not wait for a thread or a lock."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """Raises CacheError in a forked child."""
        if self.forked:
            raise CacheError(
                f"this model was loaded by process {self._process}, and this is a forked child of "
                "it, without the threads that load experts: call moebound.load in the child, or "
                "start it by multiprocessing's 'spawn'"
            )

    def begin_sequence(self) -> None:
        """A new text begins."""
        self.check_process()
        self.cache.begin_sequence()
        self.foresight.begin_sequence()

    def visit(
        self,
        layer: int,
        first: int,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        x: torch.Tensor,
        compute: Compute,
        *,
        absent: Collection[int] = (),
    ) -> None:
        """Call `compute` for each expert that is chosen: residents first, then the others in the
        order in which they come. While decoding, those that are there at one time come together; of
        a prompt each by itself, since others wait for its room.

        first: number of the module's first expert in its layer. chosen, weights: [T, K], the
        router's. absent: numbers of experts that there is nothing to compute with. x: [T, H], what
        the experts will be computed with. Another thread's visit is waited for. Raises what loading
        raises, an error of moebound's own with the expert's name in front; nothing stays pinned
        then. CacheError in a forked child.
        """
        self.check_process()
        with self._one_visit:
            self._visit(layer, first, chosen, weights, x, compute, absent)

    def _visit(
        self,
        layer: int,
        first: int,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        x: torch.Tensor,
        compute: Compute,
        absent: Collection[int],
    ) -> None:
        index = chosen.cpu().numpy()
        gates: Array = weights.detach().float().cpu().numpy()
        if len(index) == 1 and len(set(index[0].tolist())) == index.shape[1]:
            experts, leading = leading_first(index[0].tolist(), gates[0].tolist())
            leading = leading if self.decoding else len(experts)
            tokens: list[int] | None = None
        else:
            some, counts, leading = gather(index, gates, decode=self.decoding)
            experts, tokens = some.tolist(), counts.tolist()
        if absent:
            for expert in experts:
                if expert in absent:
                    compute({expert: None}, 1)
            kept = [place for place, expert in enumerate(experts) if expert not in absent]
            experts = [experts[place] for place in kept]
            tokens = None if tokens is None else [tokens[place] for place in kept]
            leading = sum(place < leading for place in kept)
        numbers = [expert + first for expert in experts]
        shared = self.loader.shared(ExpertKey(layer, number) for number in numbers)
        if shared and tokens is not None:
            tokens = tokens + [max(tokens)] * len(shared)
        asked = [*numbers, *(key.expert for key in shared)] if shared else numbers
        found = self.cache.visit(layer, asked, tokens=tokens, leading=leading)
        pinned = dict.fromkeys(found.keys)
        hits = {key: held for key, held in found.hits.items() if isinstance(held, Slot)}
        missing = [key for key in found.missing if key not in shared]
        on_device = self.loader.on_device(missing)
        self.meter.add(accesses=len(numbers), hits=len(hits), on_device=on_device)
        grades = self._graded(missing, first, index, gates)
        computed = 0.0
        wanted = [key for key, grade in grades.items() if grade == "full"]
        # Before the experts that need them, and only where one of those has to be decoded.
        parts = self.loader.shared(wanted)
        before = self.loader.demand([key for key in parts if key in found.missing])
        orders = self.loader.demand(wanted)
        try:
            if self.decoding:
                self.foresight.look(layer, numbers, x)
            aside = self._aside(grades)
            for ready, pending in self._ready(hits, orders):
                begin = clock()
                threads = 1 if pending else torch.get_num_threads()
                compute({key.expert - first: slot for key, slot in ready.items()}, threads)
                computed += clock() - begin
                for slot in ready.values():
                    slot.after_use()
                if orders:  # others may be waiting for its room
                    self.cache.release(ready)
                    for key in ready:
                        del pinned[key]
            for key, coming in aside.items():
                self._compute_aside(key, first, coming, compute)
        finally:
            self.loader.cancel([*before, *orders])
            self.cache.release(pinned)
            self.meter.add(compute_s=computed)

    def _ready(
        self, hits: Mapping[ExpertKey, Slot], orders: Sequence[Order]
    ) -> Iterator[tuple[dict[ExpertKey, Slot], bool]]:
        """Experts that can be computed now, and whether others are still being loaded."""
        together = self.decoding
        if together and hits:
            yield dict(hits), bool(orders)
        elif hits:
            for key, slot in hits.items():
                yield {key: slot}, bool(orders)
        at = 0
        while at < len(orders):
            ready = {orders[at].key: self._arrived(orders[at])}
            at += 1
            while together and at < len(orders) and orders[at].arrived.done():
                ready[orders[at].key] = self._arrived(orders[at])
                at += 1
            yield ready, at < len(orders)

    def _graded(
        self, missing: Sequence[ExpertKey], first: int, chosen: Array, gates: Array
    ) -> dict[ExpertKey, Grade]:
        if self._grades is None or not self.decoding or not missing:
            return dict.fromkeys(missing, "full")
        shares = shares_before(chosen, gates)
        return {key: self._grades.of(shares[key.expert - first]) for key in missing}

    def _aside(self, grades: Mapping[ExpertKey, Grade]) -> dict[ExpertKey, Future[Slot] | None]:
        """What is computed without the cache: coarse copies, begun here, and None for nothing."""
        found = dict[ExpertKey, Future[Slot] | None]()
        for key, grade in grades.items():
            if grade == "coarse" and self._coarse is not None:
                found[key] = self._coarse.fetch(key)
            elif grade != "full":
                found[key] = None
        self.meter.add(
            skipped=sum(coming is None for coming in found.values()),
            coarse=sum(coming is not None for coming in found.values()),
        )
        return found

    def _compute_aside(
        self, key: ExpertKey, first: int, coming: Future[Slot] | None, compute: Compute
    ) -> None:
        if coming is None:
            compute({key.expert - first: None}, 1)
            return
        assert self._coarse is not None
        begin = clock()
        try:
            slot = coming.result(WAIT_S)
        except MoeboundError as error:
            raise type(error)(f"{key}, its coarse copy: {error}") from error
        self.meter.stalled(begin, clock(), slot.load)
        compute({key.expert - first: slot}, torch.get_num_threads())
        slot.after_use()
        self._coarse.give(slot)

    def _arrived(self, order: Order) -> Slot:
        begin, waited = clock(), not order.arrived.done()
        try:
            slot = order.arrived.result(WAIT_S)
            if slot is None:  # somebody else had begun it; or gave it up since
                obtained = self.cache.obtain(order.key)
                slot = (
                    self.loader.load(obtained, order) if isinstance(obtained, Claim) else obtained
                )
            assert isinstance(slot, Slot)
        except (TimeoutError, CancelledError) as error:
            raise CacheError(f"{order.key}: did not come within {WAIT_S:g} s") from error
        except MoeboundError as error:
            raise type(error)(f"{order.key}: {error}") from error
        if waited:
            self.meter.stalled(begin, clock(), slot.load)
        return slot

    def close(self) -> None:
        """End the loading threads; visits from now on raise CacheError. A forked child has no such
        threads, and nothing is done."""
        _end(self._process, self.cache, self._coarse, self.loader)


def _end(
    process: int, cache: ExpertCache[Held], coarse: CoarseCopies | None, loader: Loader
) -> None:
    if os.getpid() != process:
        return
    cache.close()  # first: a thread may wait for room in it
    if coarse is not None:
        coarse.close()
    loader.close()


def _end_aside(
    process: int, cache: ExpertCache[Held], coarse: CoarseCopies | None, loader: Loader
) -> None:
    """In a thread of its own: Python may collect in any thread, in a loading one too, which cannot
    wait for itself, and while any lock is held."""
    if os.getpid() == process:
        threading.Thread(
            target=_end, args=(process, cache, coarse, loader), name="moebound-end", daemon=True
        ).start()
