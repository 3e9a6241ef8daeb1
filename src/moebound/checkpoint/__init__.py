"""Stop 1 of the walk: read experts out of a Hugging Face checkpoint, in bounded memory.

    checkpoint = open_checkpoint("path/or/hub-id")
    for expert in checkpoint.experts():
        for matrix in expert.matrices:
            weights = checkpoint.read(matrix)

`families` is the one table of what is known of each architecture; `shards` reads
safetensors files, `writer` writes them.
"""

from moebound.checkpoint.corners import experts_name
from moebound.checkpoint.experts import Expert, ExpertMatrix, read_matrix
from moebound.checkpoint.families import (
    FAMILIES,
    SUPPORTED,
    Family,
    Layout,
    Match,
    Role,
    find_family,
    top_k_of,
)
from moebound.checkpoint.shards import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorInfo,
    read_chunks,
    read_header,
    read_into,
    read_json,
    read_tensor,
    read_tensors,
    tensor_bytes,
)
from moebound.checkpoint.source import Checkpoint, local_folder, open_checkpoint
from moebound.checkpoint.writer import ShardWriter, TensorSpec, write_file, write_index

__all__ = [
    "FAMILIES",
    "INDEX_FILE",
    "SINGLE_FILE",
    "SUPPORTED",
    "Checkpoint",
    "Expert",
    "ExpertMatrix",
    "Family",
    "Layout",
    "Match",
    "Role",
    "ShardWriter",
    "TensorInfo",
    "TensorSpec",
    "experts_name",
    "find_family",
    "local_folder",
    "open_checkpoint",
    "read_chunks",
    "read_header",
    "read_into",
    "read_json",
    "read_matrix",
    "read_tensor",
    "read_tensors",
    "tensor_bytes",
    "top_k_of",
    "write_file",
    "write_index",
]
