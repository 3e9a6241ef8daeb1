"""Quantizers of papers: integers along a matrix's inputs, and how they are chosen.

upright.py     matrices as [out, in], each with its second moments
grid.py        integers in groups: what is stored, and how it decodes
moqe.py        to the nearest, a scale for each output channel
gptq.py        errors of earlier input channels made good by later ones
moequant.py    the same, symmetric and clipped, tokens counted by the router's weight
awq.py         input channels scaled before rounding, by what they carry
qmoe.py        one of three values for each weight, with feedback
code_words.py  how these take less than a bit each
"""
