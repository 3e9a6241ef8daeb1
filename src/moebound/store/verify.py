"""Is this store what was written, and does it keep what it promises?

Without the original: every file's, header's and tensor's hash; every matrix decodes to the shape
and dtype of its certificate, with the shared parts it was encoded with; records, config, plan and
streams say the same (`claims.py`). With it: every tensor that was kept is equal, every bound is
resolved anew, every error measured again on decoded weights; keys, roles, places, config and files
are the original's. With the statistics that it was made by: what became of outputs on their text.
docs/checks.md has the table. Problems are data: all are reported.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from moebound.checkpoint import (
    INDEX_FILE,
    Checkpoint,
    TensorInfo,
    open_checkpoint,
    read_tensor,
)
from moebound.checkpoint.shards import read_json
from moebound.codec import stats, thread_count
from moebound.errors import MoeboundError
from moebound.files.formats.statistics import Statistics
from moebound.jobs.ordered import in_order
from moebound.methods import RouterEdit, get_method, weakest
from moebound.methods.base import ColumnBounds
from moebound.methods.blob import parse_router, parse_shared
from moebound.store.beside import is_document
from moebound.store.checks import differs, file_problems, surface_problems, tensor_sha256
from moebound.store.claims import contradictions
from moebound.store.format import CERTIFICATES_FILE, CONFIG_FILE
from moebound.store.originals import Originals, first_of_each_kind
from moebound.store.outputs import Expected, Text, column_bounds, column_problems
from moebound.store.planned import broken_plan
from moebound.store.reader import (
    Store,
    StoredExpert,
    StoredMatrix,
    existing_folder,
    open_store,
    read_stored,
)
from moebound.store.stored import StoredTensor, read_tensor_bytes
from moebound.store.summary import (
    ExpertTotals,
    Meter,
    ModelTotals,
    OtherTotals,
    Problem,
    ProgressCallback,
    VerifyReport,
    WithoutWeights,
)
from moebound.store.verify_arrays import Checked, check_array, check_bound
from moebound.types import Array, TensorStats


def verify(
    store_path: Path | str,
    *,
    against: Checkpoint | Path | str | None = None,
    calibration: Statistics | Path | str | None = None,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
) -> VerifyReport:
    """Check everything that can be checked, and report what is wrong.

    against: the original, open or as `open_checkpoint` takes it, to measure every bound again.
    calibration: the statistics that it was made by, or their folder, to compute outputs' figures
    again.
    jobs: as for `compress`. Memory is that of jobs + 1 experts (with the original, twice that).
    Raises StoreError if store_path is no folder; everything else is a Problem of the report.
    """
    begun, path = time.monotonic(), existing_folder(store_path)
    against = None if against is None else open_checkpoint(against)
    against_path = None if against is None else str(against.path)
    try:
        store = open_store(path, check=False)
    except MoeboundError as error:
        problem = Problem("store", "", str(error))
        return VerifyReport(
            str(path), against_path, 0, 0, 0, None, (problem,), time.monotonic() - begun
        )
    originals, text = Originals(against), Text(store, calibration)
    experts = store.experts()
    kept = [store.tensors[name] for name in store.kept]
    coded = list(store.coded.values())
    meter = Meter(
        progress,
        total_bytes=sum(expert.decoded_bytes for expert in experts)
        + sum(t.n_bytes for t in kept)
        + sum(c.decoded_bytes for c in coded),
        total_experts=len(experts),
    )
    problems = [*surface_problems(store), *_check_files(store), *broken_plan(store)]
    problems += [*contradictions(store), *originals.extra_problems(store), *_check_own(store)]
    problems += text.problems
    total = Checked()
    jobs = thread_count() if jobs is None else jobs

    check_tensor = partial(_check_tensor, store, originals)
    with closing(in_order(check_tensor, kept, jobs=jobs)) as results:
        for tensor, found in zip(kept, results, strict=True):
            problems += found
            meter.add(tensor.name, n_bytes=tensor.n_bytes)
    check_coded = partial(_check_coded, originals)
    with closing(in_order(check_coded, coded, jobs=jobs)) as others:
        for stored, result in zip(coded, others, strict=True):
            problems += result.problems
            total.add_up(result)
            meter.add(stored.tensor.name, n_bytes=stored.decoded_bytes)
    check_expert = partial(_check_expert, originals, text)
    with closing(in_order(check_expert, experts, jobs=jobs)) as checked:
        for expert, result in zip(experts, checked, strict=True):
            problems += result.problems
            total.add_up(result)
            meter.add(str(expert.key), n_bytes=expert.decoded_bytes, experts=1)
    totals, of_others = ExpertTotals.of(store.records()), OtherTotals.of(store.records())
    model = ModelTotals.of(store.tensors, [*store.kept.values(), *store.records()])
    cause, more = originals.another_model(experts), 0
    if cause is not None:
        few = list(first_of_each_kind(problems))
        problems, more = [cause, *few], len(problems) - len(few)
    return VerifyReport(
        path=str(path),
        against=against_path,
        n_experts=len(experts),
        n_tensors=len(kept) + len(coded) + sum(len(expert.matrices) for expert in experts),
        n_bytes=sum(tensor.n_bytes for tensor in store.tensors.values()),
        worst=total.worst,
        problems=tuple(problems),
        more=more,
        seconds=time.monotonic() - begun,
        guarantee=weakest([totals.guarantee, of_others.guarantee]),
        max_abs_error=total.max_abs_error,
        outputs=totals.outputs,
        calibration=None if text.statistics is None else str(text.statistics.folder),
        without_weights=WithoutWeights.of(store.records()),
        coded=of_others,
        model_bits_per_weight=model.bits_per_weight,
    )


def _check_files(store: Store) -> Iterator[Problem]:
    """Files beside the shards: those that have a record, and those that have none."""
    opened = {CONFIG_FILE, INDEX_FILE}  # looked at with the surface
    for file in store.files:
        if file.name not in opened:
            yield from file_problems(store.path, file)
    listed = {file.name for file in store.files} | {shard.name for shard in store.shards}
    for name in _unlisted(store.path, listed | {CERTIFICATES_FILE}):
        yield Problem("file", name, "is in the folder and has no record")
    weight_map = {tensor.name: tensor.file.name for tensor in store.tensors.values()}
    total = sum(tensor.n_bytes for tensor in store.tensors.values())
    expected = {"metadata": {"total_size": total}, "weight_map": weight_map}
    if (store.path / INDEX_FILE).is_file() and read_json(store.path / INDEX_FILE) != expected:
        yield Problem("file", INDEX_FILE, "says otherwise than the shards which tensor is where")


def _unlisted(folder: Path, listed: set[str]) -> Iterator[str]:
    """Files and folders without a record. Documents are people's, hidden files are tools'."""
    inner = {name.split("/")[0] for name in listed if "/" in name}
    for entry in sorted(folder.iterdir()):
        if entry.name in inner and entry.is_dir():
            names = [f"{entry.name}/{inside.name}" for inside in sorted(entry.iterdir())]
        else:
            names = [entry.name]
        for name in names:
            if name not in listed and not is_document(name) and not name.startswith("."):
                yield name


def _check_own(store: Store) -> Iterator[Problem]:
    """Shared parts and router edits."""
    own = [(part.tensor, part.record.sha256) for part in store.parts.values()]
    own += [(tensor, record.sha256) for tensor, record in store.routers]
    for tensor, certified in own:
        try:
            found = tensor_sha256(tensor)
        except MoeboundError as error:
            yield Problem("hash", tensor.name, str(error))
            continue
        if found != certified:
            yield Problem("hash", tensor.name, differs(certified, found))
    for part in store.parts.values():
        try:
            blob = parse_shared(part.read())
        except MoeboundError as error:
            yield Problem("decode", part.tensor.name, str(error))
            continue
        says = blob.method, blob.held_bytes
        claimed = part.record.method.split(":")[0], part.record.held_bytes
        if says != claimed:
            message = f"expected method and held_bytes {claimed}, found {says}"
            yield Problem("certificate", part.tensor.name, message)
    try:
        store.router_edits()
        for tensor, record in store.routers:
            edit = RouterEdit.from_bytes(parse_router(read_tensor_bytes(tensor)).payload)
            says_so = edit.describe()
            if says_so != {name: getattr(record, name) for name in says_so}:
                message = "its record says otherwise than the tensor"
                yield Problem("certificate", record.name, message)
    except MoeboundError as error:
        yield Problem("decode", "", str(error))


def _check_tensor(store: Store, originals: Originals, tensor: TensorInfo) -> list[Problem]:
    """A tensor that was kept as it was."""
    record = store.kept[tensor.name]
    problems = list[Problem]()
    try:
        found = tensor_sha256(tensor)
        if found != record.sha256:
            problems.append(Problem("hash", tensor.name, differs(record.sha256, found)))
        if originals.checkpoint is not None:
            original = originals.checkpoint.tensors.get(tensor.name)
            if original is None:
                message = "is in the store and not in the original"
                problems.append(Problem("original", tensor.name, message))
            elif (original.dtype, original.shape) != (tensor.dtype, tensor.shape):
                message = (
                    f"original is {original.dtype} {list(original.shape)}, "
                    f"store has {tensor.dtype} {list(tensor.shape)}"
                )
                problems.append(Problem("original", tensor.name, message))
            elif (theirs := tensor_sha256(original)) != record.sha256:
                message = f"original: {differs(record.sha256, theirs)}"
                problems.append(Problem("original", tensor.name, message))
            if original is not None and original.file.name != record.home:
                message = f"original is in {original.file.name}, certified as from {record.home}"
                problems.append(Problem("original", tensor.name, message))
    except MoeboundError as error:
        problems.append(Problem("hash", tensor.name, str(error)))
    return problems


def _check_coded(originals: Originals, stored: StoredTensor) -> Checked:
    """A tensor of no expert that is coded."""
    checked, name, record = Checked(), stored.tensor.name, stored.record
    try:
        data = read_tensor_bytes(stored.tensor)
    except MoeboundError as error:
        checked.add("hash", name, str(error))
        return checked
    decoded = check_array(data, stored, checked)
    original = _original_of(originals, stored, checked)
    if decoded is None:
        return checked
    if original is None:
        checked.found(record.ratio, record.certificate.max_abs_error)
    else:
        check_bound(stored, decoded, original, stats(original), None, checked)
    if record.certificate.guarantee == "lossless":
        checked.worst = None  # it has no bound to be measured by
    return checked


def _original_of(originals: Originals, stored: StoredTensor, checked: Checked) -> Array | None:
    if originals.checkpoint is None:
        return None
    name, record = stored.tensor.name, stored.record
    source = originals.checkpoint.tensors.get(name)
    if source is None:
        checked.add("original", name, "is in the store and not in the original")
        return None
    theirs = source.dtype, source.shape, source.file.name
    ours = record.certificate.source_dtype, record.certificate.shape, record.home
    if theirs != ours:
        checked.add("original", name, f"original: expected {theirs}, certified as {ours}")
    if theirs[:2] != ours[:2]:
        return None
    try:
        return read_tensor(source)
    except MoeboundError as error:
        checked.add("original", name, str(error))
        return None


def _check_expert(originals: Originals, text: Text, expert: StoredExpert) -> Checked:
    checked = Checked()
    try:
        encoded, method = read_stored(expert), get_method(expert.method)
    except MoeboundError as error:
        for matrix in expert.matrices:
            checked.add("hash", matrix.tensor.name, str(error))
        return checked
    arrays = _originals_of(originals, expert, checked) if originals.checkpoint else None
    reference = None
    if arrays is not None:
        own = [stats(array) if array is not None else TensorStats() for array in arrays]
        whole = sum(own, TensorStats()) if all(a is not None for a in arrays) else None
        reference = own, whole
    expected = text.of(expert)
    for index, matrix in enumerate(expert.matrices):
        decoded = check_array(encoded.matrix(index), matrix, checked)
        original = arrays[index] if arrays is not None else None
        if decoded is None:
            continue
        stored = matrix.parse(encoded.matrix(index)).found
        _check_channels(matrix, column_bounds(method, stored), decoded, original, expected, checked)
        if original is None or reference is None:
            checked.found(matrix.record.ratio, matrix.record.certificate.max_abs_error)
        else:
            check_bound(matrix, decoded, original, reference[0][index], reference[1], checked)
    return checked


def _check_channels(
    matrix: StoredMatrix,
    bounds: ColumnBounds | None,
    decoded: Array,
    original: Array | None,
    expected: Expected | None,
    checked: Checked,
) -> None:
    """Bounds by input channel, and outputs on the text."""
    name = matrix.tensor.name
    for message in column_problems(matrix.record.certificate, bounds, decoded, original):
        checked.add("certificate" if original is None else "bound", name, message)
    if bounds is not None and expected is not None:
        try:
            for message in expected.problems(matrix, bounds, decoded, original):
                checked.add("calibration", name, message)
        except MoeboundError as error:
            checked.add("calibration", name, str(error))


def _originals_of(
    originals: Originals, expert: StoredExpert, checked: Checked
) -> list[Array | None]:
    arrays = list[Array | None]()
    for matrix in expert.matrices:
        record, array = matrix.record, None
        source = originals.matrices.get((record.name, record.index))
        if source is None:
            checked.add("original", matrix.tensor.name, "is no expert matrix of the original")
        elif source.shape != record.certificate.shape:
            checked.add(
                "original", matrix.tensor.name,
                f"original has shape {source.shape}, the store {record.certificate.shape}",
            )  # fmt: skip
        elif (theirs := originals.place(record)) != (
            ours := (str(expert.key), record.role, record.certificate.source_dtype, record.home)
        ):
            message = f"original: expected {', '.join(theirs)}, certified as {', '.join(ours)}"
            checked.add("original", matrix.tensor.name, message)
        elif originals.checkpoint is not None:
            try:
                array = originals.checkpoint.read(source)
            except MoeboundError as error:
                checked.add("original", matrix.tensor.name, str(error))
        arrays.append(array)
    return arrays
