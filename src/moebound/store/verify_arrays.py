"""One coded tensor, of an expert or not: does it decode to what its certificate says, and keep its
bound against the original?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from moebound.codec import measure
from moebound.codec.certificate import sha256
from moebound.codec.measure import Distortion
from moebound.errors import MoeboundError
from moebound.methods import MatrixSpec, method_class
from moebound.methods.blob import MatrixBlob
from moebound.store.checks import differs
from moebound.store.reader import StoredMatrix
from moebound.store.stored import StoredTensor
from moebound.store.summary import Problem, ProblemKind, larger
from moebound.types import Array, TensorStats

# Certified numbers come from the same sums in the same order; leave room for another order.
_TOLERANCE = 1e-9


@dataclass
class Checked:
    """What was found on one expert or tensor. worst: error over promised error, None where nothing
    is promised. max_abs_error: in weight units, measured where there is an original."""

    worst: float | None = None
    max_abs_error: float = 0.0
    problems: list[Problem] = field(default_factory=list)

    def add(self, kind: ProblemKind, tensor: str, message: str) -> None:
        self.problems.append(Problem(kind, tensor, message))

    def found(self, ratio: float | None, max_abs_error: float) -> None:
        self.worst = larger(self.worst, ratio)
        self.max_abs_error = max(self.max_abs_error, max_abs_error)

    def add_up(self, other: Checked) -> None:
        self.found(other.worst, other.max_abs_error)


def check_array(
    data: memoryview, matrix: StoredMatrix | StoredTensor, checked: Checked
) -> Array | None:
    """Its weights; None if it does not decode."""
    name, certificate = matrix.tensor.name, matrix.record.certificate
    found = sha256(data)
    if found != certificate.sha256_encoded:
        checked.add("hash", name, differs(certificate.sha256_encoded, found))
    try:
        decoded = matrix.decode(data, threads=1)
        found_in = matrix.parse(data).found
    except MoeboundError as error:
        checked.add("decode", name, str(error))
        return None
    says: tuple[object, ...]
    certified: tuple[object, ...]
    if isinstance(found_in, MatrixBlob):
        spec = MatrixSpec(found_in.shape, found_in.dtype)
        verbatim = method_class(found_in.method).verbatim(found_in.payload, spec)
        says = found_in.method, found_in.method_version, None, None, verbatim, found_in.dtype
        certified = (certificate.method.split(":")[0],)
        names = "method, version, codec, its version, patches, source dtype"
    else:
        patches, epsilon = len(found_in.misses), found_in.spec.abs_bound
        says = (
            f"bounded:{found_in.codec}", 1, found_in.codec, found_in.codec_version, patches,
            found_in.spec.source_dtype, epsilon,
        )  # fmt: skip
        certified = (certificate.method,)
        names = "method, version, codec, its version, patches, source dtype, bound"
    certified += (
        certificate.method_version, certificate.codec, certificate.codec_version,
        certificate.patched, certificate.source_dtype,
    )  # fmt: skip
    if not isinstance(found_in, MatrixBlob):
        certified += (epsilon if certificate.bound is None else certificate.abs_bound,)
    if says != certified:
        checked.add("certificate", name, f"expected {names} {certified}, found {says}")
    if certificate.guarantee == "lossless" and certificate.dtype == certificate.source_dtype:
        own = sha256(decoded.reshape(-1).view("u1"))
        if own != certificate.sha256_original:
            checked.add("certificate", name, "is certified as lossless, and decodes to other bits")
    if not certificate.kept or (matrix.record.ratio or 0) > 1:
        checked.add("certificate", name, "certifies itself that its bound was not kept")
    return decoded


def check_bound(
    matrix: StoredMatrix | StoredTensor,
    decoded: Array,
    original: Array,
    own: TensorStats,
    whole: TensorStats | None,
    checked: Checked,
) -> None:
    """Resolve the bound anew from the original, and measure."""
    name, certificate = matrix.tensor.name, matrix.record.certificate
    if sha256(original.reshape(-1).view("u1")) != certificate.sha256_original:
        checked.add("original", name, "is not the tensor that was compressed: hashes differ")
    bound, claimed = certificate.bound, matrix.record.ratio
    if bound is None:
        check_measured(matrix, measure(original, decoded, float("inf")), checked)
        return
    reference = whole if bound.scope == "expert" else own
    if reference is None or certificate.abs_bound is None:
        return
    promised = bound.absolute(reference)
    # An rmse bound's ε is a start for the encoder, which may have had to lower it.
    off = certificate.abs_bound - promised
    if (abs(off) if bound.pointwise else off) > _TOLERANCE * promised:
        checked.add(
            "bound", name, f"{bound} is {promised:g} here, certified was {certificate.abs_bound:g}"
        )
    found = measure(original, decoded, min(promised, certificate.abs_bound))
    if bound.pointwise:
        ratio = found.max_abs_error / promised if promised else float(found.max_abs_error > 0)
        if found.broken:
            checked.add(
                "bound", name,
                f"{found.broken} weights are off by more than {promised:g}, the worst by "
                f"{found.max_abs_error:g}",
            )  # fmt: skip
    else:
        asked = bound.value * own.rms
        ratio = found.rmse / asked if asked else float(found.rmse > 0)
        if ratio > 1:
            checked.add("bound", name, f"RMSE is {found.rmse:g}, promised {asked:g}")
    if claimed is None or not math.isclose(claimed, ratio, rel_tol=_TOLERANCE):
        checked.add("certificate", name, f"certified error over promise {claimed}, found {ratio}")
    checked.found(ratio, found.max_abs_error)
    check_measured(matrix, found, checked)


def check_measured(
    matrix: StoredMatrix | StoredTensor, found: Distortion, checked: Checked
) -> None:
    """Are the errors those that were certified? Where nothing is promised, that is all there is."""
    name, certificate = matrix.tensor.name, matrix.record.certificate
    checked.found(None, found.max_abs_error)
    certified = certificate.max_abs_error, certificate.rmse
    if certificate.guarantee == "lossless" and found.max_abs_error:
        checked.add(
            "bound", name, f"promised bit for bit, a weight is off by {found.max_abs_error:g}"
        )
    for says, was in zip(certified, (found.max_abs_error, found.rmse), strict=True):
        if abs(says - was) > _TOLERANCE * max(abs(says), abs(was)):
            checked.add(
                "certificate", name,
                f"certified largest error and RMSE {certified}, measured "
                f"{(found.max_abs_error, found.rmse)}",
            )  # fmt: skip
            break
