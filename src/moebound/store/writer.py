"""Write a store: tensors that stay, then experts, compressed in parallel and written in order.

    select experts -> cut into shards -> per shard: read, encode, certify, write -> seal -> publish

Bytes do not depend on the number of jobs or on interruptions. Memory is that of jobs + 1 experts
with their encoded bytes, whatever the size of the model or of a shard. A shard that is finished
is never written again: a rerun goes on behind it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Literal

from moebound.checkpoint import (
    Checkpoint,
    ShardWriter,
    TensorSpec,
    open_checkpoint,
    read_chunks,
    read_header,
)
from moebound.codec import Certificate, encode_certified, stats, thread_count
from moebound.errors import MoeboundError, PlanError, StoreError
from moebound.files.durable import disk_errors
from moebound.jobs.ordered import in_order
from moebound.plan import Plan
from moebound.store.beside import write_rest
from moebound.store.folder import WorkFolder, check_apart, write_synced
from moebound.store.format import (
    CERTIFICATES_FILE,
    CONFIG_FILE,
    ExpertRecord,
    MatrixRecord,
    Record,
    Settings,
    TensorRecord,
    from_line,
    read_certificates,
    read_settings,
    stored_name,
    to_line,
)
from moebound.store.layout import (
    SHARD_BYTES,
    ExpertShard,
    ExpertTask,
    Layout,
    TensorShard,
    describe_run,
    plan_layout,
    run_id,
    select,
)
from moebound.store.promise import Promise
from moebound.store.shard import BytesShard
from moebound.store.summary import CompressSummary, ExpertTotals, Meter, ProgressCallback
from moebound.types import ErrorBound, TensorStats

OnExisting = Literal["error", "resume", "overwrite"]

_PART_SUFFIX = ".records.jsonl"
_DOCUMENTS = (".md", ".pdf", ".png", ".jpg")  # for people, who edit them


def compress(
    checkpoint: Checkpoint | Path | str,
    dst: Path | str,
    *,
    bound: ErrorBound | Plan,
    codec: str | None = None,
    layers: set[int] | None = None,
    experts: set[int] | None = None,
    shared_experts: bool = False,
    jobs: int | None = None,
    on_existing: OnExisting = "error",
    progress: ProgressCallback | None = None,
    shard_bytes: int = SHARD_BYTES,
    source: str | None = None,
) -> CompressSummary:
    """Write the checkpoint to dst with its experts compressed, and say what it came to.

    checkpoint: or what `open_checkpoint` opens, a path, a hub id or a built-in model.
    bound: kept by every weight of every chosen expert; scope "expert" takes its reference from all
        matrices of the expert together. Or a plan, with bounds of its own for every expert of the
        checkpoint. codec: an id, options behind a colon; None for the plan's, or "bound".
    layers, experts: which ones, None for all; experts counts routed experts only. The others stay
        as they are (bit for bit, as `raw` envelopes, where they share a 3-D tensor with chosen
        ones). shared_experts: compress those of the chosen layers too.
    jobs: experts at a time, None for `MOEBOUND_THREADS` or the CPUs.
    on_existing: what to do about work that is there. A killed run of the same source, bound, codec
        and selection is taken up again in any case but "overwrite".
          error      a dst that is not an empty folder, or another unfinished run, is an error
          resume     also: a dst that this very run has finished before is left as it is
          overwrite  start anew; an old store at dst is replaced when the new one is whole
    shard_bytes: shards hold at most so many bytes of the source. source: what the model card calls
        the source, the checkpoint's name if None.

    Guarantee: dst appears whole, or not at all. Raises StoreError (place, disk, selection, another
    run's work), PlanError for a plan that is not for this checkpoint, BoundError and CodecError as
    `encode_certified`, CheckpointError for the source.
    """
    dst, begun = Path(dst), time.monotonic()
    promise = Promise.of(bound, codec)  # an unknown codec before any work
    jobs = thread_count() if jobs is None else jobs
    if jobs < 1 or shard_bytes < 1:
        raise StoreError(f"jobs {jobs}, shard_bytes {shard_bytes}: expected at least 1")
    checkpoint = open_checkpoint(checkpoint)
    check_apart(dst, checkpoint.path)
    if promise.plan is not None and not (layers is None and experts is None):
        raise PlanError(
            "a plan says itself which experts: expected no layers and experts beside it"
        )
    shared_experts = shared_experts or promise.with_shared
    tasks = select(checkpoint, layers=layers, experts=experts, shared_experts=shared_experts)
    if promise.plan is not None:
        promise.plan.check((t.expert.key, [m.role for m in t.expert.matrices]) for t in tasks)
    layout = plan_layout(checkpoint, tasks, shard_bytes=shard_bytes)
    run = describe_run(checkpoint, tasks, promise=promise, shard_bytes=shard_bytes)
    settings = Settings(
        promise.codec,
        promise.bound,
        shared_experts,
        run_id(run),
        plan=None if promise.plan is None else promise.plan.sha256,
        source=source or checkpoint.name,
    )

    job = _Job(checkpoint, layout, settings, promise, jobs)
    if _finished_before(dst, settings, on_existing):
        return job.summary(dst, dst, begun, resumed=True)
    with WorkFolder(dst) as work:
        resumed = on_existing != "overwrite" and _take_up(work, run, settings)
        if not resumed:
            work.start_over(run)
        if not work.sealed:
            job.write(work.path, progress)
            work.seal()
        _remove_parts(work.path)
        summary = job.summary(work.path, dst, begun, resumed=resumed)
        work.publish()
    return replace(summary, seconds=time.monotonic() - begun)


def _finished_before(dst: Path, settings: Settings, on_existing: OnExisting) -> bool:
    """Whether dst is this run's store already. Raises StoreError if dst is in the way."""
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise StoreError(f"{dst}: expected a free name or an empty folder, found a file or link")
    with disk_errors(dst, "cannot be read"):
        if not dst.exists() or not any(dst.iterdir()):
            return False
    found = None
    if (dst / CONFIG_FILE).is_file():
        with contextlib.suppress(ValueError, OSError, MoeboundError):
            found = read_settings(json.loads((dst / CONFIG_FILE).read_bytes()))
    if on_existing == "resume":
        if found == settings:
            return True
        what = "another store" if found else "a folder that is no store"
        raise StoreError(
            f"{dst}: to be resumed, but it is {what} than this source, bound or plan, codec and "
            "selection make; choose another folder, or overwrite a store"
        )
    if on_existing == "overwrite":
        if found is None:
            raise StoreError(f"{dst}: only a moebound store is overwritten, and this is none")
        return False
    raise StoreError(f"{dst}: exists and is not empty; resume, overwrite or choose another folder")


def _take_up(work: WorkFolder, run: dict[str, object], settings: Settings) -> bool:
    """Whether an earlier run's work goes on. Raises StoreError if it is another run's."""
    if work.sealed:
        with disk_errors(work.path, "cannot be read"):
            config = json.loads((work.path / CONFIG_FILE).read_bytes())
        if read_settings(config) == settings:
            return True
        raise StoreError(
            f"{work.path}: an earlier run with another source, bound or plan, codec or selection "
            "was killed here; give the same ones to finish it, or overwrite"
        )
    earlier = work.journal()
    if earlier is None:
        return False
    differing = sorted(k for k in run.keys() | earlier.keys() if run.get(k) != earlier.get(k))
    if differing:
        found = "; ".join(f"{k} was {earlier.get(k)!r}, now {run.get(k)!r}" for k in differing)
        raise StoreError(
            f"{work.path}: unfinished work of another run ({found}); give the same ones to go on, "
            "or overwrite to start anew"
        )
    return True


class _Job:
    """One run's constants, and the shards' contents."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        settings: Settings,
        promise: Promise,
        jobs: int,
    ) -> None:
        self.checkpoint, self.layout, self.settings = checkpoint, layout, settings
        self.promise, self.jobs = promise, jobs

    def write(self, folder: Path, progress: ProgressCallback | None) -> None:
        """Write all that is missing; config.json comes last."""
        shards = self.layout.expert_shards
        meter = Meter(
            progress,
            total_bytes=self.checkpoint.total_bytes,
            total_experts=sum(len(shard.tasks) for shard in shards),
        )
        for tensor_shard in self.layout.tensor_shards:
            if not _is_done(folder, tensor_shard.name):
                self._write_tensors(folder, tensor_shard)
            n_bytes = sum(tensor.n_bytes for tensor in tensor_shard.tensors)
            meter.add(tensor_shard.name, n_bytes=n_bytes)
        missing = []
        for shard in shards:
            if _is_done(folder, shard.name):
                n_bytes = sum(task.expert.n_bytes for task in shard.tasks)
                meter.add(shard.name, n_bytes=n_bytes, experts=len(shard.tasks))
            else:
                missing.append(shard)
        tasks = [task for shard in missing for task in shard.tasks]
        with closing(in_order(self._encode, tasks, jobs=self.jobs)) as encoded:
            for shard in missing:
                self._write_experts(folder, shard, encoded, meter)
        write_rest(
            folder, self.checkpoint, self.layout.names, self.settings, self.promise.plan,
            records=_lines(folder, self.layout.names),
        )  # fmt: skip

    def _write_tensors(self, folder: Path, shard: TensorShard) -> None:
        specs = [TensorSpec(t.name, t.dtype, t.shape) for t in shard.tensors]
        records = list[Record]()
        with ShardWriter(folder / shard.name, specs) as out:
            for tensor in shard.tensors:
                digest = hashlib.sha256()
                for piece in read_chunks(tensor):
                    digest.update(piece)
                    out.write(tensor.name, piece)
                records.append(TensorRecord(tensor.name, tensor.file.name, digest.hexdigest()))
            _write_part(folder, shard.name, records)

    def _write_experts(
        self,
        folder: Path,
        shard: ExpertShard,
        encoded: Iterator[tuple[ExpertRecord, list[bytes]]],
        meter: Meter,
    ) -> None:
        records = list[Record]()
        with BytesShard(folder / shard.name, list(_tensor_names(shard))) as out:
            for task in shard.tasks:
                record, pieces = next(encoded)
                for matrix, data in zip(record.matrices, pieces, strict=True):
                    if matrix.index == 0:
                        out.append(b"")  # stands in for the whole 3-D tensor
                    out.append(data)
                records.append(record)
                meter.add(str(task.expert.key), n_bytes=task.expert.n_bytes, experts=1)
            _write_part(folder, shard.name, records)
            out.finish()

    def _encode(self, task: ExpertTask) -> tuple[ExpertRecord, list[bytes]]:
        bounds = self.promise.bounds(task.expert)
        codec = "raw" if task.exact else self.settings.codec
        arrays = [self.checkpoint.read(matrix) for matrix in task.expert.matrices]
        # Statistics cost a pass over the weights: only where the bound or its ratio needs them.
        needed = any(bound.scope == "expert" or not bound.pointwise for bound in bounds)
        own = [stats(array) if needed else TensorStats() for array in arrays]
        whole = sum(own, TensorStats())
        pieces, records = [], []
        for matrix, bound, array, of_matrix in zip(
            task.expert.matrices, bounds, arrays, own, strict=True
        ):
            reference = whole if bound.scope == "expert" else None
            try:
                encoded = encode_certified(
                    array, bound, codec=codec, reference=reference, threads=1
                )
            except MoeboundError as error:
                raise type(error)(
                    f"{matrix.source.file}: tensor {matrix.name!r} ({task.expert.key}): {error}"
                ) from error
            certificate = encoded.certificate
            ratio = kept_ratio(certificate, of_matrix)
            records.append(
                MatrixRecord(
                    matrix.name, matrix.index, matrix.role, matrix.source.file.name, ratio,
                    certificate,
                )
            )  # fmt: skip
            pieces.append(encoded.data)
        return ExpertRecord(task.expert.key, task.exact, tuple(records)), pieces

    def summary(self, folder: Path, dst: Path, begun: float, *, resumed: bool) -> CompressSummary:
        records = [
            r for r in read_certificates(folder / CERTIFICATES_FILE) if isinstance(r, ExpertRecord)
        ]
        totals = ExpertTotals.of(records)
        after = sum(
            tensor.n_bytes
            for name in self.layout.names
            for tensor in read_header(folder / name)[0].values()
        )
        return CompressSummary(
            path=str(dst),
            codec=self.settings.codec,
            bound=self.settings.bound,
            n_experts=totals.n_experts,
            n_weights=totals.n_weights,
            expert_bytes_before=totals.bytes_before,
            expert_bytes_after=totals.bytes_after,
            n_parameters=sum(prod(t.shape) for t in self.checkpoint.tensors.values()),
            model_bytes_before=self.checkpoint.total_bytes,
            model_bytes_after=after,
            store_bytes=sum(f.stat().st_size for f in folder.iterdir() if f.is_file()),
            worst=totals.worst,
            patched=totals.patched,
            seconds=time.monotonic() - begun,
            resumed=resumed,
        )


def kept_ratio(certificate: Certificate, of_matrix: TensorStats) -> float:
    """Measured error over promised error: of the worst weight, or of RMSEs for an rmse bound."""
    if certificate.bound.pointwise:
        found, asked = certificate.max_abs_error, certificate.abs_bound
    else:
        found, asked = certificate.rmse, certificate.bound.value * of_matrix.rms
    return found / asked if asked else float(found > 0)


def _tensor_names(shard: ExpertShard) -> Iterator[str]:
    """Names in the order of the bytes; a 3-D tensor's own name right before its first slice."""
    for task in shard.tasks:
        for matrix in task.expert.matrices:
            if matrix.index == 0:
                yield matrix.name
            yield stored_name(matrix.name, matrix.index)


def _is_done(folder: Path, shard: str) -> bool:
    return (folder / shard).is_file() and (folder / (shard + _PART_SUFFIX)).is_file()


def _write_part(folder: Path, shard: str, records: list[Record]) -> None:
    """The records of one shard, on disk before the shard gets its name."""
    path = folder / (shard + _PART_SUFFIX)
    with disk_errors(path):
        write_synced(path, map(to_line, records))


def _lines(folder: Path, shards: list[str]) -> Iterator[bytes]:
    """The records of all shards, as lines, checked."""
    for shard in shards:
        path = folder / (shard + _PART_SUFFIX)
        with open(path, "rb") as handle:
            for line in handle:
                from_line(line, str(path))
                yield line


def _remove_parts(folder: Path) -> None:
    with disk_errors(folder):
        for path in folder.glob("*" + _PART_SUFFIX):
            path.unlink()
