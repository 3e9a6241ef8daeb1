"""Stop 7 of the walk: use a store. For now: loading one with transformers.

Importing this package imports neither transformers nor torch; see `register`.
"""

from moebound.runtime.register import register

__all__ = ["register"]
