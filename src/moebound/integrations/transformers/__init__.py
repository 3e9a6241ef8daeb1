"""`from_pretrained(store)` in transformers.

register.py   makes transformers know stores, whichever of the two is imported first
hf.py         decodes while transformers loads
compressing.py   an ordinary checkpoint, compressed while it loads
skeleton.py   the same model without its routed experts, for `moebound.offload`

Importing this package imports neither transformers nor torch.
"""

from moebound.integrations.transformers.register import register

__all__ = ["register"]
