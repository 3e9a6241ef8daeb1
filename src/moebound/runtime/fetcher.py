"""A layer's experts for a forward pass: those that are there at once, the others as they arrive."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from itertools import chain

import torch

from moebound.cache import ExpertCache
from moebound.cache.claim import Claim
from moebound.cache.visits import gather
from moebound.errors import CacheError, MoeboundError
from moebound.runtime.loader import Loader, Order
from moebound.runtime.meter import Meter, clock
from moebound.runtime.predictors import Foresight
from moebound.runtime.slots import Slot
from moebound.types import Array

WAIT_S = 300.0
"""Only a hang takes so long."""

Compute = Callable[[int, Slot], None]
"""Called with the number of an expert in its module, and its weights."""


class Fetcher:
    """The cache, the loader and the predictor of one model. One forward pass at a time.

    decoding: whether the pass under way computes one token a text, as opposed to a prompt.
    """

    def __init__(
        self, cache: ExpertCache[Slot], loader: Loader, meter: Meter, foresight: Foresight
    ) -> None:
        self.cache, self.loader, self.meter = cache, loader, meter
        self.foresight = foresight
        self.decoding = False

    def begin_sequence(self) -> None:
        """A new text begins."""
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
    ) -> None:
        """Call `compute` for each expert that is chosen: residents first, then the others in the
        order in which they come.

        first: number of the module's first expert in its layer. chosen, weights: [T, K], the
        router's. x: [T, H], what the experts will be computed with. Raises what loading raises, an
        error of moebound's own with the expert's name in front; nothing stays pinned then.
        """
        index = chosen.cpu().numpy()
        gates: Array = weights.detach().float().cpu().numpy()
        experts, tokens, leading = gather(index, gates, decode=self.decoding)
        numbers = [int(expert) + first for expert in experts]
        found = self.cache.visit(layer, numbers, tokens=tokens.tolist(), leading=leading)
        self.meter.add(accesses=len(numbers), hits=len(found.hits))
        pinned = dict.fromkeys(found.keys)
        orders = self.loader.demand(found.missing)
        try:
            if self.decoding:
                self.foresight.look(layer, numbers, x)
            arrivals = ((order.key, self._arrived(order)) for order in orders)
            for key, slot in chain(found.hits.items(), arrivals):
                compute(key.expert - first, slot)
                slot.after_use()
                self.cache.release((key,))
                del pinned[key]
        finally:
            self.loader.cancel(orders)
            self.cache.release(pinned)

    def _arrived(self, order: Order) -> Slot:
        begin, waited = clock(), not order.arrived.done()
        try:
            slot = order.arrived.result(WAIT_S)
            if slot is None:  # somebody else had begun it; or gave it up since
                obtained = self.cache.obtain(order.key)
                slot = (
                    self.loader.load(obtained, order) if isinstance(obtained, Claim) else obtained
                )
        except (TimeoutError, CancelledError) as error:
            raise CacheError(f"{order.key}: did not come within {WAIT_S:g} s") from error
        except MoeboundError as error:
            raise type(error)(f"{order.key}: {error}") from error
        if waited:
            self.meter.stalled(begin, clock(), slot.load)
        return slot

    def close(self) -> None:
        """End the loading threads; visits from now on raise CacheError."""
        self.cache.close()  # first: a thread may wait for room in it
        self.loader.close()
