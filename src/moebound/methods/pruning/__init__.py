"""Experts that are left out: which stay is decided by what `moebound calibrate` saw.

pruned.py     the experts with the best scores are kept, the router chooses among them
frequency.py  score: tokens that the router sent
reap.py       score: mean of the router's weight times the output's norm (REAP)
search.py     the set that changes the layer's output least (Lu et al.)
mone.py       constants in the place of those that are left out (MoNE)
"""
