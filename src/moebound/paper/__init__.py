"""The MoE-Compression paper (2509.07727) for one's own model.

`study/` measures its conditions, `report/` judges its conclusions.
"""
