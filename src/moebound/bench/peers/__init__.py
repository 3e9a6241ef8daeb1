"""Calibrated quantizers of others, each by its own library, run as a process of its own.

environments.py  which packages each needs, and the script that installs them
settings.py      what is asked of one: `gptq:int4:g128`, `gguf:q4_k_m`
text.py          the text that our statistics are of, token by token, for them to read
run.py           a plain checkpoint in, one with their weights and the bytes that these take out
programs/        what runs in their environments; imports nothing of ours

A new peer is a program there and a line in settings.py. programs/peer_exchange.py has the protocol.
"""

from moebound.bench.peers.run import Made, is_answered, run_peer
from moebound.bench.peers.settings import Peer, get_peer
from moebound.bench.peers.text import CalibrationText, text_of

__all__ = ["CalibrationText", "Made", "Peer", "get_peer", "is_answered", "run_peer", "text_of"]
