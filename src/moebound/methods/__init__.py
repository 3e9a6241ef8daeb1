"""Stop 3 of the walk: everything that makes an expert smaller.

    method = get_method("rtn:int4:g64")            # or a codec's id: the method that keeps bounds
    artifact = compress(method, GroupView((ExpertView(key, matrices),)))
    artifact.n_bytes, artifact.guarantee, artifact.weights(key)

base.py      what a method is: encode a group of experts, decode a matrix
artifact.py  what compressing comes to: bytes, decoded weights, certificates
blob.py      the bytes around a payload; reading.py takes them apart again
registry.py  methods by id, those of other packages included
bounded.py   a bound on every weight, by any codec
calibrated.py   a bound on every weight, rounded by what experts see: shrinkage.py (H), geometry.py
             (steps), feedback.py (errors handed on), outputs.py (what is certified)
rtn.py, hqq.py   quantizers of groups; quantizing/ those of papers, groups along the inputs
bases/       low rank, shared bases, a base and what is left of it
keeping.py   some experts are kept, and coded by another method: pruning/, merging/
"""

from moebound.methods.artifact import Artifact, compress, compress_expert, weakest
from moebound.methods.base import (
    Encoding,
    ExpertView,
    GroupView,
    MatrixArtifact,
    MatrixSpec,
    Method,
    Payload,
    Routing,
    SharedPayload,
)
from moebound.methods.reading import FindPart, OpenPart, Stored, router_name, shared_name
from moebound.methods.registry import (
    BOUNDED,
    codec_of,
    get_method,
    method_class,
    method_ids,
    register_method,
)
from moebound.methods.router_edit import RouterEdit

__all__ = [
    "BOUNDED",
    "Artifact",
    "Encoding",
    "ExpertView",
    "FindPart",
    "GroupView",
    "MatrixArtifact",
    "MatrixSpec",
    "Method",
    "OpenPart",
    "Payload",
    "RouterEdit",
    "Routing",
    "SharedPayload",
    "Stored",
    "codec_of",
    "compress",
    "compress_expert",
    "get_method",
    "method_class",
    "method_ids",
    "register_method",
    "router_name",
    "shared_name",
    "weakest",
]
