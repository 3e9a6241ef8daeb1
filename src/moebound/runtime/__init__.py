"""Stop 7 of the walk: use a store.

    register    from_pretrained(store): an ordinary model with the decoded experts (hf.py)
    load        a model whose experts are read and decoded when they are needed, within a budget

The way of one expert that is asked for: `on_demand` (the experts function) -> `fetcher` -> `loader`
(threads) -> `tiers` (its bytes) -> `delivery` (CPU) or `cuda` -> `slots` (its weights).
`skeleton` makes the model without experts, `choose` and `costs` decide what is fastest,
`predictors/` guess ahead; `generation` and `serve/` make texts of it.

Importing this package imports neither transformers nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moebound.runtime.register import register

if TYPE_CHECKING:
    from moebound.runtime.loading import load
else:

    def load(*args: Any, **options: Any) -> Any:
        """See `moebound.runtime.loading.load`, which this is: imported only when it is called."""
        from moebound.runtime import loading

        return loading.load(*args, **options)


__all__ = ["load", "register"]
