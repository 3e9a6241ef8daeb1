"""The experts of a checkpoint: which tensors, or slices of them, make up each one.

Only names, dtypes and shapes are looked at here; `read` fetches one matrix at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from moebound.checkpoint.families import ROLE_ORDER, Family, Match, Role, num_experts, num_layers
from moebound.checkpoint.shards import TensorInfo, read_tensor
from moebound.errors import CheckpointError
from moebound.types import NUMPY_DTYPES, Array, DType, ExpertKey

MAX_EXPERTS = 100_000
"""Most experts in one tensor; a file with a hole in it can claim any number."""


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """One weight matrix of an expert, as it is stored: nothing transposed, nothing split.

    name: of the tensor in the checkpoint. index: which leading slice of it, or None for all of it.
    shape: of the matrix, 2-D. source: where the (whole) tensor's bytes are. transposed: whether it
    is [in, out] rather than [out, in]; None where only the shape tells. interleaved: gate and up,
    in one, take turns (`Layout`).
    """

    name: str
    role: Role
    dtype: DType
    shape: tuple[int, int]
    source: TensorInfo
    index: int | None = None
    transposed: bool | None = False
    interleaved: bool = False

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def n_bytes(self) -> int:
        return self.size * NUMPY_DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert: its matrices in the order gate, up (or gate_up), down."""

    key: ExpertKey
    matrices: tuple[ExpertMatrix, ...]

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(matrix.size for matrix in self.matrices)

    @property
    def n_bytes(self) -> int:
        return sum(matrix.n_bytes for matrix in self.matrices)


def read_matrix(matrix: ExpertMatrix, *, drop_cache: bool = False) -> Array:
    """The weights, [rows, cols] in the stored dtype, in a new array that owns its memory.

    Reads and allocates the bytes of this matrix only. Raises CheckpointError if the file is gone,
    CorruptionError if it has become shorter.
    """
    return read_tensor(matrix.source, matrix.index, drop_cache=drop_cache)


def find_experts(
    tensors: Mapping[str, TensorInfo],
    family: Family,
    config: Mapping[str, Any],
    *,
    shared: bool = False,
    complete: bool = True,
) -> list[Expert]:
    """The routed (or the shared) experts among these tensors, in the order of the model.

    complete: whether all experts of a layer have to be there if one is.

    Layers at or past the config's number of layers are left alone: they are multi-token-prediction
    heads. Raises CheckpointError for an expert that lacks a projection or has one twice, for a
    layer with more or fewer experts than the config says, and for a dtype that is not BF16, F16 or
    F32.
    """
    layers = num_layers(config)
    found: dict[ExpertKey, dict[Role, ExpertMatrix]] = defaultdict(dict)
    for tensor in tensors.values():
        match = family.match(tensor.name, shared=shared)
        if match is None or (layers is not None and match.layer >= layers):
            continue
        for matrix, key in _matrices(tensor, match, shared):
            if match.role in found[key]:
                raise CheckpointError(
                    f"{key}: two tensors for {match.role}: "
                    f"{found[key][match.role].name!r} and {tensor.name!r}"
                )
            found[key][match.role] = matrix

    for key, by_role in found.items():
        if frozenset(by_role) not in family.roles:
            raise CheckpointError(_missing_roles(key, by_role, family))
    if complete and not shared:
        expected = num_experts(config)
        _check_counts(found, None if expected is None else expected * family.expert_groups)
    return [
        Expert(key, tuple(found[key][role] for role in ROLE_ORDER if role in found[key]))
        for key in sorted(found)
    ]


def _matrices(
    tensor: TensorInfo, match: Match, shared: bool
) -> Iterable[tuple[ExpertMatrix, ExpertKey]]:
    """The matrices in one tensor: itself, or its leading slices."""
    if tensor.dtype not in NUMPY_DTYPES:
        raise CheckpointError(
            f"{tensor.file}: expert tensor {tensor.name!r} is {tensor.dtype}, expected one of "
            f"{', '.join(NUMPY_DTYPES)}; quantized checkpoints must be dequantized first"
        )
    dtype = tensor.dtype
    if tensor.n_bytes == 0:
        raise CheckpointError(
            f"{tensor.file}: expert tensor {tensor.name!r} is empty, shape {list(tensor.shape)}"
        )
    # A shared expert has no number in its name; it may be one matrix or several in one tensor.
    sliced = len(tensor.shape) == 3 if shared else match.layout.fused
    if len(tensor.shape) != 2 + sliced:
        raise CheckpointError(
            f"{tensor.file}: expert tensor {tensor.name!r} has shape {list(tensor.shape)}, "
            f"expected {2 + sliced} dimensions"
        )
    shape, turned = cast(tuple[int, int], tensor.shape[-2:]), match.layout.transposed
    mixed = match.layout.interleaved and match.role == "gate_up"
    if not sliced:
        key = ExpertKey(match.layer, match.expert or 0, shared)
        yield ExpertMatrix(tensor.name, match.role, dtype, shape, tensor, None, turned, mixed), key
        return
    if tensor.shape[0] > MAX_EXPERTS:
        raise CheckpointError(
            f"{tensor.file}: expert tensor {tensor.name!r} has {tensor.shape[0]} slices, expected "
            f"at most {MAX_EXPERTS}, one an expert"
        )
    for index in range(tensor.shape[0]):
        key = ExpertKey(match.layer, index, shared)
        yield ExpertMatrix(tensor.name, match.role, dtype, shape, tensor, index, turned, mixed), key


def _missing_roles(key: ExpertKey, by_role: Mapping[Role, ExpertMatrix], family: Family) -> str:
    # Name what is missing of the arrangement that is nearest to what was found.
    nearest = min(family.roles, key=lambda roles: len(roles ^ by_role.keys()))
    missing = sorted(nearest - by_role.keys())
    names = ", ".join(sorted(matrix.name for matrix in by_role.values()))
    if missing:
        return f"{key} has no {' and no '.join(missing)} projection; found {names}"
    return f"{key} has more projections than {', '.join(sorted(nearest))}: {names}"


def _check_counts(found: Mapping[ExpertKey, object], expected: int | None) -> None:
    experts: dict[int, set[int]] = defaultdict(set)
    for key in found:
        experts[key.layer].add(key.expert)
    for layer, present in sorted(experts.items()):
        count = max(present) + 1 if expected is None else expected
        # count is the config's, which may say any number.
        missing = list(islice((e for e in range(count) if e not in present), 9))
        if missing:
            raise CheckpointError(
                f"layer {layer} lacks expert {', '.join(map(str, missing[:8]))}"
                f"{' and more' if len(missing) > 8 else ''}; it has {len(present)}, "
                f"expected {count}"
            )
        if len(present) > count:
            raise CheckpointError(
                f"layer {layer} has {len(present)} experts, config.json says {count}"
            )
