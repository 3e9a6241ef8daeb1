"""Methods that replace matrices by something smaller: low rank, shared bases, a base and what is
left.

    exact.py          what they are stored as, and sums that come out the same on every machine
    approximation.py  what they have in common: options, and what a number of bits leaves room for
    svd.py            each matrix by itself: the baseline; by outputs (SoCo), by importance (MoE-I2)
    mobe.py, rfid.py  bases that experts share
    d2_moe.py          a base, and low-rank differences from it
    resmoe.py         a barycentre, and sparse differences from it
    milo.py           few bits, and a low-rank compensator
    modegpt.py        fewer hidden channels
    residual.py       any of these, and a bound on every weight by coding what it leaves
"""
