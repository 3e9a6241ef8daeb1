"""Run a model whose experts stay compressed until the router asks for them, within a budget.

    with moebound.load("store", ram_budget="20%") as offloaded: ...

The way of one expert that is asked for: `on_demand` (the experts function) -> `fetcher` -> `loader`
(threads) -> `tiers` (its bytes) -> `delivery` (CPU) or `cuda` -> `slots` (its weights).
`joint` has one way for all sequences that are at a layer at the same time.
`choose` and `costs` decide what is fastest, `predictors/` guess ahead.

Importing this package imports neither transformers nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moebound.offload.loading import load
else:

    def load(*args: Any, **options: Any) -> Any:
        """See `moebound.offload.loading.load`, which this is: imported only when it is called."""
        from moebound.offload import loading

        return loading.load(*args, **options)


__all__ = ["load"]
