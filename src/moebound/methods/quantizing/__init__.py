"""Quantizers of papers: integers in groups along a matrix's inputs, and how they are chosen.

grid.py     what they store, and how it decodes
moqe.py     to the nearest, a scale for each output channel
gptq.py     errors of earlier input channels made good by later ones
awq.py      input channels scaled before rounding, by what they carry
"""
