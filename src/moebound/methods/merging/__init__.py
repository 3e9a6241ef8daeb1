"""Experts that share weights: which are alike is decided by what `moebound calibrate` saw.

merged.py  one set of weights for each cluster, and the router as it was
m_smoe.py  clusters around the most frequent experts, by router logits (M-SMoE)
hc_smoe.py hierarchical clusters, by mean outputs (HC-SMoE)
sub_moe.py clusters by the cosine of outputs, merged in a common subspace (Sub-MoE)
puzzle.py  two experts in the bits of one, element by element (PuzzleMoE)
"""
