"""Codec `bound` once more, in plain Python and NumPy: to be read, not to be fast.

This package is the specification in a form that runs. docs/format.md has the same in words, section
by section; `native/` has it in C++, hundreds of times quicker. The tests hold this code and the
kernel to the same bytes, and both to stored ones.

    formats.py  the three dtypes as patterns and numbers
    grid.py     4.3  which value stands for which weights
    layout.py   4.2, 4.4, 4.5  everything in front of the segments   (bits.py: its bytes and bits)
    rans.py     4.6  a segment
    steps.py    4.7  the steps of version 2, and tables that follow from a scale
    decode.py   4 and 5, the decoder: start reading there
    model.py    what the format leaves to the encoder: the alphabet, ...
    classes.py  ... which weights share a table, ...
    tables.py   ... and the frequencies
    encode.py   the encoder

cuszp.py, apart from these, is codec `cuszp`: docs/format-cuszp.md.

Decoding is fixed by the format. An encoder may choose otherwise and be understood; this one chooses
as the kernel does, in integers and exactly rounded float64, so that the bytes are the same too.

Values travel as bit patterns: uint16 arrays for BF16 and F16, uint32 for F32.
"""

from moebound.codec.reference.decode import decode, decode_lossless
from moebound.codec.reference.encode import encode, encode_lossless
from moebound.codec.reference.grid import Grid, make_grid

__all__ = ["Grid", "decode", "decode_lossless", "encode", "encode_lossless", "make_grid"]
