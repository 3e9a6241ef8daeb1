"""Graded fallback on a miss: a coarser copy, or nothing, for experts that matter little.

As in HOBBIT (2411.01433): a token's experts are sorted by their gate weights; `s` is the share of
the weights before an expert. A missing expert with `s` up to `coarse_above` is waited for; above
it, its copy in a coarser (smaller) store is read and decoded instead; above `skip_above` it is left
out. An expert that several tokens chose is graded by the one to which it matters most. Texts then
depend on what is resident: this is off by default, and never used on prompts.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from moebound.cache.visits import shares_above
from moebound.errors import CacheError
from moebound.offload.delivery import Arrival, Delivery
from moebound.offload.images import Image
from moebound.offload.meter import Load, clock
from moebound.offload.slots import Kind, Slot, SlotPool
from moebound.types import Array, ExpertKey

Grade = Literal["full", "coarse", "skip"]


@dataclass(frozen=True)
class Grades:
    """Where each grade begins, as shares of a token's gate weights. None: not at all.

    Raises CacheError for shares out of 0 .. 1 or out of order.
    """

    coarse_above: float | None = None
    skip_above: float | None = None

    def __post_init__(self) -> None:
        given = [share for share in (self.coarse_above, self.skip_above) if share is not None]
        if any(not 0 <= share <= 1 for share in given) or given != sorted(given):
            raise CacheError(
                f"fallback: coarse above {self.coarse_above}, skip above {self.skip_above}: "
                "expected shares from 0 to 1, the coarse one first"
            )

    def of(self, share: float) -> Grade:
        """What an expert gets that has this share of the weights before it."""
        if self.skip_above is not None and share > self.skip_above:
            return "skip"
        if self.coarse_above is not None and share > self.coarse_above:
            return "coarse"
        return "full"


def shares_before(chosen: Array, gates: Array) -> dict[int, float]:
    """Expert -> the share of a token's gate weights that experts with larger ones have, the least
    over the tokens that chose it. chosen, gates: [T, K]; the largest has 0."""
    order, before = shares_above(np.abs(gates.astype(np.float32)))
    found = dict[int, float]()
    for expert, share in zip(
        np.take_along_axis(chosen, order, axis=1).ravel().tolist(), before.ravel().tolist(),
        strict=True,
    ):  # fmt: skip
        found[expert] = min(found.get(expert, 1.0), share)
    return found


class CoarseCopies:
    """The same experts under a wider bound, decoded aside: never resident, one use each.

    Takes memory for as many as are in use, beside the budget.
    """

    def __init__(
        self,
        images: Mapping[ExpertKey, Image],
        kinds: Mapping[ExpertKey, Kind],
        delivery: Delivery,
        device: torch.device,
    ) -> None:
        self._images, self._kinds, self._delivery = images, kinds, delivery
        # As many as come to be in use at a time; what is given back is used again.
        self._pool = SlotPool(1 << 62, device, set(kinds.values()))
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="moebound-coarse")
        self._own = threading.local()  # each thread's workspace

    def fetch(self, key: ExpertKey) -> Future[Slot]:
        """Read and decode it, in a thread. Give it back when it has been used."""
        return self._threads.submit(self._bring, key)

    def give(self, slot: Slot) -> None:
        """Take one back."""
        self._pool.give(slot)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _bring(self, key: ExpertKey) -> Slot:
        image, slot = self._images[key], self._pool.take(self._kinds[key])
        now = clock()
        load = Load(key, image.n_bytes, image.n_weights, False, now, now)
        try:
            if not hasattr(self._own, "workspace"):
                self._own.workspace = self._delivery.workspace()
            self._delivery.bring([Arrival(image, slot, load)], self._own.workspace)
        except BaseException:
            self._pool.give(slot)
            raise
        slot.load = load
        return slot
