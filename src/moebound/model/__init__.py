"""A transformers model that is loaded, seen as experts and routers.

live.py      its experts, by the keys of the checkpoint: views into its parameters
stacks.py    where in a module the matrices of each expert are
routers.py   its routers, callable on their own
taps.py      hear what the routers decide
calls.py     one call of an experts module, taken apart into pairs of token and expert
undo.py      change experts in place, and take it back bit for bit
batched.py   all experts of a layer in one product
strands.py   several forward passes side by side, which meet
joined.py    linear layers for one row each of those
fingerprint.py  a name for it, from some of its weights
pretrained.py  loads it: the one door to transformers' Auto classes
dtypes.py    what it computes with
"""

from moebound.model.live import LiveExpert, LiveExperts, live_experts

__all__ = [
    "LiveExpert",
    "LiveExperts",
    "live_experts",
]
