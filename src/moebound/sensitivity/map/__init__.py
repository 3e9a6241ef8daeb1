"""The sensitivity map: what an error in each single expert does to a model, at several bounds.

calibration (on which text) -> decoded (the codec's real errors) -> observe (one pass: inputs and
gradients) -> fisher (predicted KL of every expert) -> sweep (measured KL of some) -> build
(layer by layer, resumable) -> document (what `plan` reads).
"""
