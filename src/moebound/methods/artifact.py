"""What compressing a group of experts comes to: bytes, the weights they decode to, what was found.

    artifact = compress(get_method("rtn:int4:g64"), GroupView((ExpertView(key, matrices),)))
    artifact.n_bytes                          # of all that has to be kept
    artifact.weights(key)["gate"]             # what a model will compute with
    artifact.experts[key]["gate"].certificate

`compress` frames what a method made, decodes it again, and measures it, whoever wrote the method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from moebound.checkpoint import Role
from moebound.codec import Certificate, Encoded, measure, parse
from moebound.codec.arrays import dtype_name
from moebound.codec.certificate import sha256
from moebound.errors import BoundViolatedError, MethodError, MoeboundError
from moebound.methods.base import (
    Encoding,
    ExpertView,
    GroupView,
    MatrixArtifact,
    MatrixSpec,
    Method,
    Payload,
)
from moebound.methods.blob import (
    MatrixBlob,
    RouterBlob,
    SharedBlob,
    Use,
    blob_checksum,
    is_blob,
    parse_matrix,
)
from moebound.methods.outputs import columns_kept, outputs_kept, side_of
from moebound.methods.router_edit import RouterEdit
from moebound.types import NUMPY_DTYPES, Array, DType, ExpertKey, Guarantee


@dataclass(frozen=True, eq=False)
class Artifact:
    """A group of experts, made smaller.

    experts: by key and role, in the order of the group. shared: blobs, part 0 first. router: what
    becomes of the layer's routing; router_blob: the same in bytes, None for a method without.
    """

    method: Method
    experts: Mapping[ExpertKey, Mapping[Role, MatrixArtifact]]
    shared: tuple[bytes, ...] = ()
    router: RouterEdit | None = None
    router_blob: bytes | None = None

    def __iter__(self) -> Iterator[MatrixArtifact]:
        return (matrix for expert in self.experts.values() for matrix in expert.values())

    @property
    def n_bytes(self) -> int:
        """Of everything that has to be kept for these experts, in bytes."""
        matrices = sum(len(matrix.data) for matrix in self)
        return matrices + sum(map(len, self.shared)) + len(self.router_blob or b"")

    def weights(self, key: ExpertKey) -> dict[Role, Array]:
        """An expert's weights, by role."""
        return {role: matrix.decoded for role, matrix in self.experts[key].items()}

    def constant(self, key: ExpertKey) -> Array | None:
        """[H] float32: what the expert puts out whatever goes in; None for one that computes."""
        return None if self.router is None else self.router.constants.get(key.expert)

    @property
    def guarantee(self) -> Guarantee:
        """The weakest of its matrices'."""
        return weakest(matrix.certificate.guarantee for matrix in self)

    @property
    def max_abs_error(self) -> float:
        return max((m.certificate.max_abs_error for m in self), default=0.0)

    @property
    def rmse(self) -> float:
        """Over all weights, in weight units."""
        squares = sum(m.certificate.rmse**2 * m.certificate.n_weights for m in self)
        n_weights = sum(m.certificate.n_weights for m in self)
        return float(np.sqrt(squares / n_weights)) if n_weights else 0.0


def weakest(guarantees: Iterable[Guarantee]) -> Guarantee:
    """Of several promises, the one that holds for all; "lossless" of none."""
    order: tuple[Guarantee, ...] = ("lossless", "max_abs", "rmse", "none")
    return max(guarantees, key=order.index, default="lossless")


def compress(method: Method, group: GroupView, *, number: int = 0, threads: int = 1) -> Artifact:
    """Encode, decode again, measure, and write down what was found.

    number: names the group among those of a store. threads: native threads.

    Guarantee: `decoded` are the values that the bytes decode to, and errors are measured on them in
    float64. Raises MethodError, naming the method and the expert, for a method that fails, returns
    other matrices or shapes, or is not what it says; BoundError and CodecError as codecs do;
    BoundViolatedError for a bound that was not kept.
    """
    _check_bounds(method, group)
    where = f"method {method.setting!r}"
    with named(where):
        encoding = method.encode(group, threads=threads)
    _check_encoding(method, group, encoding, where)
    with named(where):
        shared = tuple(
            SharedBlob(
                method.id, method.version, number, part, given.held_bytes, memoryview(given.data)
            ).build()
            for part, given in enumerate(encoding.shared)
        )
        opened = [method.open_shared(memoryview(part.data)) for part in encoding.shared]
    checksums = [blob_checksum(blob) for blob in shared]
    experts: dict[ExpertKey, dict[Role, MatrixArtifact]] = {}
    for expert in group.experts:
        experts[expert.key] = {
            role: _matrix(
                method, encoding.matrices[expert.key][role], original, number, opened, checksums,
                f"{where}: {expert.key}, {role}",
            )
            for role, original in expert.matrices.items()
        }  # fmt: skip
        with named(f"{where}: {expert.key}"):
            certified = _certified(method, group, encoding, expert, experts[expert.key])
            experts[expert.key] = certified
    edit, blob = encoding.router, None
    if edit is not None:
        _stand_in(method, group, edit, experts, where)
    if method.edits_router:
        edit = RouterEdit(group.layer) if edit is None else edit
        payload = memoryview(edit.to_bytes())
        blob = RouterBlob(method.id, method.version, number, payload).build()
    return Artifact(method, experts, shared, edit, blob)


def compress_expert(method: Method, view: ExpertView, *, threads: int = 1) -> Artifact:
    """`compress` for one expert. Raises MethodError for a method that wants a whole layer."""
    if method.scope != "expert":
        raise MethodError(
            f"method {method.setting!r} looks at a {method.scope} at a time, found one expert"
        )
    return compress(method, GroupView((view,)), threads=threads)


def decode_payload(
    method: type[Method],
    payload: memoryview,
    spec: MatrixSpec,
    shared: Sequence[Any],
) -> Array:
    """The weights, C-contiguous, of spec's shape and dtype. Raises MethodError for a method that
    returns something else; what the method raises, if it is moebound's own error."""
    found = method.decode(payload, spec, shared)
    if not isinstance(found, np.ndarray) or found.shape != spec.shape:
        shape = getattr(found, "shape", type(found).__name__)
        raise MethodError(f"decodes to {shape}, expected an array of shape {spec.shape}")
    return np.ascontiguousarray(found, dtype=NUMPY_DTYPES[spec.dtype])


@contextmanager
def named(where: str, kind: type[MoeboundError] = MethodError) -> Iterator[None]:
    """Errors get `where` in front; those that are not moebound's become `kind`. A MemoryError stays
    one: it says nothing of the bytes, or of the method."""
    try:
        yield
    except MoeboundError as error:
        raise type(error)(f"{where}: {error}") from error
    except MemoryError as error:
        raise MemoryError(f"{where}: out of memory: {error}") from error
    except Exception as error:
        raise kind(f"{where}: {type(error).__name__}: {error}") from error


def _check_bounds(method: Method, group: GroupView) -> None:
    given = any(expert.bounds is not None for expert in group.experts)
    if given and not method.bounded:
        raise MethodError(f"method {method.setting!r} knows no bound, and one was given")
    if not given and method.needs_bound:
        raise MethodError(f"method {method.setting!r} needs a bound, and none was given")
    wanted = method.wanted_statistics(shared=group.experts[0].key.shared)
    missing = sorted(wanted - group.statistics.keys())
    if missing:
        raise MethodError(
            f"method {method.setting!r} needs statistics that were not gathered: "
            f"{', '.join(missing)}"
        )


def _check_encoding(method: Method, group: GroupView, encoding: Encoding, where: str) -> None:
    if not isinstance(encoding, Encoding):
        raise MethodError(f"{where}: encode gave {type(encoding).__name__}, expected an Encoding")
    for expert in group.experts:
        found = encoding.matrices.get(expert.key, {})
        if set(found) != set(expert.matrices):
            raise MethodError(
                f"{where}: {expert.key}: encoded are {sorted(found) or 'no matrices'}, expected "
                f"{sorted(expert.matrices)}"
            )
    wanted = method.n_parts(tuple(group.experts[0].matrices), len(group.experts))
    if len(encoding.shared) != wanted:
        raise MethodError(
            f"{where}: {len(encoding.shared)} shared parts, announced were {wanted} (n_shared)"
        )
    if encoding.router is not None and not method.edits_router:
        raise MethodError(f"{where}: a router edit from a method that says it makes none")
    if encoding.router is not None and encoding.router.layer != group.layer:
        raise MethodError(
            f"{where}: a router edit of layer {encoding.router.layer} for layer {group.layer}"
        )


def _stand_in(
    method: Method,
    group: GroupView,
    edit: RouterEdit,
    experts: dict[ExpertKey, dict[Role, MatrixArtifact]],
    where: str,
) -> None:
    """Experts that are aliases decode to the weights of those that compute in their place."""
    for expert in group.experts:
        if expert.key.expert not in edit.alias:
            continue
        target = ExpertKey(group.layer, edit.alias[expert.key.expert])
        for role, original in expert.matrices.items():
            own, there = experts[expert.key][role], experts.get(target, {}).get(role)
            if there is None or there.decoded.shape != original.shape:
                raise MethodError(
                    f"{where}: {expert.key}, {role}: {target}, which stands for it, has no such "
                    "matrix"
                )
            experts[expert.key][role] = replace(
                own,
                decoded=there.decoded,
                certificate=_unpromised(own.certificate, original, there.decoded),
            )


def _unpromised(certificate: Certificate, original: Array, decoded: Array) -> Certificate:
    """The same of a matrix of which nothing is promised: measured against its original."""
    error = measure(original, decoded, float("inf"))
    return replace(
        certificate, guarantee="none", bound=None, abs_bound=None, columns=None, outputs=None,
        max_abs_error=error.max_abs_error, rmse=error.rmse,
        sha256_original=sha256(np.ascontiguousarray(original).reshape(-1).view(np.uint8)),
    )  # fmt: skip


def _recoded(method: Method, found: MatrixArtifact, original: Array, where: str) -> MatrixArtifact:
    """A matrix that the method's coder has made. Of one that was merged, nothing is promised."""
    if method.coder is None or found.uses:
        raise MethodError(f"{where}: made by another method, of which this one says nothing")
    if found.decoded.shape != original.shape or found.decoded.dtype != original.dtype:
        raise MethodError(f"{where}: shape {found.decoded.shape}, expected {original.shape}")
    if method.merges:
        return replace(found, certificate=_unpromised(found.certificate, original, found.decoded))
    own = sha256(np.ascontiguousarray(original).reshape(-1).view(np.uint8))
    if own != found.certificate.sha256_original:
        raise MethodError(f"{where}: other weights than the expert's, of a method that merges none")
    return found


def _matrix(
    method: Method,
    found: Payload | Encoded | MatrixArtifact,
    original: Array,
    number: int,
    opened: Sequence[Any],
    checksums: Sequence[int],
    where: str,
) -> MatrixArtifact:
    if isinstance(found, MatrixArtifact):
        return _recoded(method, found, original, where)
    if isinstance(found, Encoded):
        if found.decoded.shape != original.shape:
            raise MethodError(f"{where}: shape {found.decoded.shape}, expected {original.shape}")
        return MatrixArtifact(found.data, found.decoded, found.certificate)
    if not isinstance(found, Payload):
        raise MethodError(f"{where}: {type(found).__name__}, expected a Payload or an Encoded")
    unknown = [part for part in found.uses if not 0 <= part < len(opened)]
    if unknown:
        raise MethodError(f"{where}: uses shared part {unknown[0]} of {len(opened)}")
    dtype: DType = dtype_name(original.dtype)
    spec = MatrixSpec(original.shape, dtype)
    payload = memoryview(found.data)
    uses = tuple(Use(part, checksums[part]) for part in found.uses)
    with named(where):
        if spec.size > (most := method.most_weights(len(payload))):
            raise MethodError(
                f"{len(payload)} bytes of {spec.size} weights, it says of at most {most} "
                "(most_weights)"
            )
        decoded = decode_payload(type(method), payload, spec, [opened[part] for part in found.uses])
        blob = MatrixBlob(method.id, method.version, spec.shape, dtype, number, uses, payload)
        data = blob.build()
    certificate = measured_certificate(method, original, decoded, data, found)
    if method.lossless and certificate.max_abs_error:
        raise BoundViolatedError(
            f"{where}: says it is lossless, and a weight is off by {certificate.max_abs_error:g}"
        )
    if not certificate.kept:
        raise BoundViolatedError(
            f"{where}: promises {certificate.bound} ({certificate.abs_bound:g}), and a weight is "
            f"off by {certificate.max_abs_error:g}"
        )
    return MatrixArtifact(data, decoded, certificate, found.uses)


def _certified(
    method: Method,
    group: GroupView,
    encoding: Encoding,
    expert: ExpertView,
    found: Mapping[Role, MatrixArtifact],
) -> dict[Role, MatrixArtifact]:
    """With what was kept by input channel, and of the outputs, where that is known."""
    if not method.statistics:
        return dict(found)
    certified: dict[Role, MatrixArtifact] = {}
    seen = cache(lambda: group.seen.get(expert.key))  # read where it is needed, and once
    for role, matrix in found.items():
        data = matrix.data
        bounds = method.column_bounds(parse_matrix(data) if is_blob(data) else parse(data))
        certificate = matrix.certificate
        if bounds is not None:
            original = expert.matrices[role]
            columns = columns_kept(original, matrix.decoded, bounds)
            outputs, side = None, side_of(role)
            if expert.key in encoding.geometry and (raw := seen()) is not None:
                outputs = outputs_kept(
                    original, matrix.decoded, bounds, raw.moments[side], raw.tokens,
                    encoding.geometry[expert.key][side],
                )  # fmt: skip
            certificate = replace(certificate, columns=columns, outputs=outputs)
            if not certificate.kept:
                raise BoundViolatedError(
                    f"{role}: a weight is off by {columns.kept:g} times its channel's bound"
                )
        certified[role] = replace(matrix, certificate=certificate)
    return certified


def measured_certificate(
    method: Method, original: Array, decoded: Array, data: bytes, payload: Payload
) -> Certificate:
    """Of a matrix that is no codec's: what its payload promises, or nothing, or everything (a
    lossless method)."""
    promised = payload.abs_bound if payload.promise is not None else None
    error = measure(
        original,
        decoded,
        0.0 if method.lossless else float("inf") if promised is None else promised,
    )
    guarantee: Guarantee = "none" if promised is None else "max_abs"
    if method.lossless and not error.broken:
        guarantee = "lossless"
    dtype = dtype_name(original.dtype)
    return Certificate(
        guarantee=guarantee,
        bound=payload.promise,
        abs_bound=promised,
        max_abs_error=error.max_abs_error,
        rmse=error.rmse,
        method=method.setting,
        method_version=method.version,
        codec=None,
        codec_version=None,
        dtype=dtype,
        source_dtype=dtype,
        shape=original.shape,
        patched=payload.patched,
        n_bytes=len(data),
        sha256_original=sha256(np.ascontiguousarray(original).reshape(-1).view(np.uint8)),
        sha256_encoded=sha256(data),
    )
