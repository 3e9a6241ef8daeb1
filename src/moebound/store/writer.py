"""Write a store: tensors that stay, others that are coded, then experts, compressed in parallel and
written in order.

    select experts -> group -> cut into shards
      -> per shard: read, compress, write -> seal -> publish

Bytes do not depend on the number of jobs or on interruptions. Memory is that of jobs + 1 groups
(one expert each, for most methods) or other tensors, with their decoded weights, whatever the size
of the model or of a shard. A shard that is finished is never written again: a rerun goes on behind
it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal

from moebound.checkpoint import (
    Checkpoint,
    ShardWriter,
    TensorSpec,
    experts_name,
    open_checkpoint,
    read_chunks,
    read_header,
)
from moebound.checkpoint.shards import as_text
from moebound.codec import stats, thread_count
from moebound.errors import MethodError, MoeboundError, PlanError, StoreError
from moebound.files.durable import disk_errors
from moebound.files.formats.statistics import Statistics, read_statistics
from moebound.jobs.ordered import in_order
from moebound.methods import compress as compress_group
from moebound.methods import weakest
from moebound.plan import Plan
from moebound.store.beside import choose_files, write_rest
from moebound.store.folder import WorkFolder, check_apart, write_synced
from moebound.store.format import (
    CERTIFICATES_FILE,
    CONFIG_FILE,
    CalibratedBy,
    Others,
    Record,
    Settings,
    TensorRecord,
    check_others,
    from_line,
    read_certificates,
    read_settings,
    to_line,
)
from moebound.store.layout import (
    SHARD_BYTES,
    CodedShard,
    ExpertShard,
    Group,
    StoreLayout,
    TensorShard,
    describe_run,
    group,
    lay_out,
    run_id,
    select,
)
from moebound.store.others import encode_other
from moebound.store.recipe import Recipe
from moebound.store.shard import BytesShard
from moebound.store.summary import (
    CompressSummary,
    ExpertTotals,
    Meter,
    OtherTotals,
    ProgressCallback,
    WithoutWeights,
    larger,
)
from moebound.store.written import Written, tensor_names, written
from moebound.types import ErrorBound, TensorStats

OnExisting = Literal["error", "resume", "overwrite"]

_PART_SUFFIX = ".records.jsonl"


def compress(
    checkpoint: Checkpoint | Path | str,
    dst: Path | str,
    *,
    bound: ErrorBound | Plan | None = None,
    method: str | None = None,
    codec: str | None = None,
    calibration: Statistics | Path | str | None = None,
    layers: set[int] | None = None,
    experts: set[int] | None = None,
    shared_experts: bool = False,
    jobs: int | None = None,
    on_existing: OnExisting = "error",
    progress: ProgressCallback | None = None,
    shard_bytes: int = SHARD_BYTES,
    source: str | None = None,
    others: Others = "lossless",
) -> CompressSummary:
    """Write the checkpoint to dst with its experts compressed, and say what it came to.

    checkpoint: or what `open_checkpoint` opens, a path, a hub id or a built-in model.
    bound: kept by every weight of every chosen expert; scope "expert" takes its reference from all
        matrices of the expert together. Or a plan, with bounds of its own for every expert of the
        checkpoint. None for a method that knows none.
    method: a setting, as "rtn:int4:g64", see `methods.get_method`; None for the plan's, or the one
        that keeps bounds with our own codec. codec: the method that keeps bounds, with this codec.
    calibration: statistics of the model's inputs (`moebound calibrate`), or their folder, for
        methods that need them.
    layers, experts: which ones, None for all; experts counts routed experts only. The others stay
        as they are (bit for bit, as `raw` envelopes, where they share a 3-D tensor with chosen
        ones). shared_experts: compress those of the chosen layers too.
    jobs: groups of experts, or other tensors, at a time, None for `MOEBOUND_THREADS` or the CPUs.
    on_existing: what to do about work that is there. A killed run of the same source, bound, codec
        and selection is taken up again in any case but "overwrite".
          error      a dst that is not an empty folder, or another unfinished run, is an error
          resume     also: a dst that this very run has finished before is left as it is
          overwrite  start anew; an old store at dst is replaced when the new one is whole
    shard_bytes: shards hold at most so many bytes of the source. source: what the model card calls
        the source, the checkpoint's name if None. others: what becomes of all other tensors, of
        which `store.others` decides: "keep", "lossless", or a rate.

    Guarantee: dst appears whole, or not at all. Raises StoreError (place, disk, selection, another
    run's work), PlanError for a plan that is not for this checkpoint, MethodError for a method that
    is unknown, does not go with the bound, or fails, BoundError and CodecError as codecs do,
    CheckpointError for the source.
    """
    dst, begun = Path(dst), time.monotonic()
    if codec is not None:
        if method is not None:
            raise MethodError(f"method {method!r} and codec {codec!r}: expected one of them")
        method = f"bounded:{codec}"
    if isinstance(calibration, (str, Path)):
        calibration = read_statistics(Path(calibration))
    recipe = Recipe.of(bound, method, calibration)  # an unknown method before any work
    jobs = thread_count() if jobs is None else jobs
    if jobs < 1 or shard_bytes < 1:
        raise StoreError(f"jobs {jobs}, shard_bytes {shard_bytes}: expected at least 1")
    others = check_others(others)
    checkpoint = open_checkpoint(checkpoint)
    check_apart(dst, checkpoint.path)
    if calibration is not None:
        calibration.check_model(experts_name(checkpoint), checkpoint.name)
    if recipe.plan is not None and not (layers is None and experts is None):
        raise PlanError(
            "a plan says itself which experts: expected no layers and experts beside it"
        )
    shared_experts = shared_experts or recipe.with_shared
    tasks = select(checkpoint, layers=layers, experts=experts, shared_experts=shared_experts)
    if recipe.plan is not None:
        recipe.plan.check((t.expert.key, [m.role for m in t.expert.matrices]) for t in tasks)
    layout = lay_out(checkpoint, group(tasks, recipe), shard_bytes=shard_bytes, others=others)
    if not layout.coded_shards:
        others = "keep"  # nothing is large enough: the store is one of experts only
    run = describe_run(checkpoint, tasks, recipe=recipe, shard_bytes=shard_bytes, others=others)
    copied, left_out = choose_files(checkpoint, layout.names)
    settings = Settings(
        recipe.method,
        recipe.bound,
        shared_experts,
        run_id(run),
        layout.version,
        plan=None if recipe.plan is None else recipe.plan.sha256,
        source=as_text(source or checkpoint.name),
        stored_as=checkpoint.stored_as,
        left_out=left_out,
        calibration=None if (by := recipe.calibrated_by) is None else CalibratedBy(*by),
        others=others,
    )

    job = _Job(checkpoint, layout, settings, recipe, jobs, copied)
    remarks = [*_dequantized(checkpoint), *job.empty_promises()]
    if _finished_before(dst, settings, on_existing):
        return replace(job.summary(dst, dst, begun, resumed=True), remarks=remarks)
    with WorkFolder(dst) as work:
        resumed = on_existing != "overwrite" and _take_up(work, run, settings)
        if not resumed:
            work.start_over(run)
        if not work.sealed:
            job.write(work.path, progress)
            work.seal()
        _remove_parts(work.path, layout.names)
        summary = job.summary(work.path, dst, begun, resumed=resumed)
        work.publish()
    return replace(summary, seconds=time.monotonic() - begun, remarks=remarks)


def _dequantized(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.stored_as is not None:
        yield (
            f"the source is stored as {checkpoint.stored_as}, in {checkpoint.stored_bytes} bytes. "
            "Sizes before and bounds are of its weights as they are dequantized"
        )


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
            f"{dst}: to be resumed, but it is {what} than this source, bound or plan, method and "
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
            f"{work.path}: an earlier run with another source, bound or plan, method or selection "
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
        layout: StoreLayout,
        settings: Settings,
        recipe: Recipe,
        jobs: int,
        copied: Mapping[str, Path],
    ) -> None:
        self.checkpoint, self.layout, self.settings = checkpoint, layout, settings
        self.recipe, self.jobs, self.copied = recipe, jobs, copied

    def write(self, folder: Path, progress: ProgressCallback | None) -> None:
        """Write all that is missing; config.json comes last."""
        shards = self.layout.expert_shards
        meter = Meter(
            progress,
            total_bytes=self.checkpoint.total_bytes,
            total_experts=sum(shard.n_experts for shard in shards),
        )
        for tensor_shard in self.layout.tensor_shards:
            if not _is_done(folder, tensor_shard.name):
                self._write_tensors(folder, tensor_shard)
            n_bytes = sum(tensor.n_bytes for tensor in tensor_shard.tensors)
            meter.add(tensor_shard.name, n_bytes=n_bytes)
        for coded_shard in self.layout.coded_shards:
            n_bytes = sum(tensor.n_bytes for tensor in coded_shard.tensors)
            if _is_done(folder, coded_shard.name):
                meter.add(coded_shard.name, n_bytes=n_bytes)
            else:
                self._write_coded(folder, coded_shard, meter)
        missing = []
        for shard in shards:
            if _is_done(folder, shard.name):
                n_bytes = sum(group.n_bytes for group in shard.groups)
                meter.add(shard.name, n_bytes=n_bytes, experts=shard.n_experts)
            else:
                missing.append(shard)
        groups = [group for shard in missing for group in shard.groups]
        with closing(in_order(self._compress, groups, jobs=self.jobs)) as artifacts:
            for shard in missing:
                self._write_experts(folder, shard, artifacts, meter)
        write_rest(
            folder, self.checkpoint, self.layout.names, self.settings, self.recipe.plan,
            copied=self.copied, records=_lines(folder, self.layout.names),
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

    def _write_coded(self, folder: Path, shard: CodedShard, meter: Meter) -> None:
        records, names = list[Record](), [tensor.name for tensor in shard.tensors]
        encode = partial(encode_other, others=self.settings.others)
        with (
            BytesShard(folder / shard.name, names, version=self.layout.version) as out,
            closing(in_order(encode, shard.tensors, jobs=self.jobs)) as ready,
        ):
            for tensor, (record, data) in zip(shard.tensors, ready, strict=True):
                out.append(data)
                records.append(record)
                meter.add(tensor.name, n_bytes=tensor.n_bytes)
            _write_part(folder, shard.name, records)
            out.finish()

    def _write_experts(
        self,
        folder: Path,
        shard: ExpertShard,
        ready: Iterator[Written],
        meter: Meter,
    ) -> None:
        records = list[Record]()
        names = [name for group in shard.groups for name in tensor_names(group)]
        with BytesShard(folder / shard.name, names, version=shard.version) as out:
            for group in shard.groups:
                found = next(ready)
                for blob in found.own:
                    out.append(blob)
                for record, pieces in found.experts:
                    for matrix, data in zip(record.matrices, pieces, strict=True):
                        if matrix.index == 0:
                            out.append(b"")  # stands in for the whole 3-D tensor
                        out.append(data)
                records += found.records
                label = str(group.tasks[0].expert.key)
                meter.add(label, n_bytes=group.n_bytes, experts=len(group.tasks))
            _write_part(folder, shard.name, records)
            out.finish()

    def empty_promises(self) -> Iterator[str]:
        """A remark where the bound allows that nothing is left of an expert. One in the middle is
        looked at, before any work."""
        chosen = [t.expert for s in self.layout.expert_shards for g in s.groups for t in g.tasks
                  if not t.exact]  # fmt: skip
        expert = chosen[len(chosen) // 2]
        bounds = self.recipe.bounds(expert)
        if bounds is None:
            return
        own = {m.role: stats(self.checkpoint.read(m)) for m in expert.matrices}
        whole = sum(own.values(), TensorStats())
        for role, found in own.items():
            bound = bounds[role]
            allowed = bound.absolute(whole if bound.scope == "expert" else found)
            largest = max(abs(found.lowest), abs(found.highest)) if found.count else 0.0
            if not largest or (allowed < largest if bound.pointwise else bound.value < 1):
                return
        yield (
            f"the bound lets every weight of an expert become 0 (of {expert.key}, none is larger "
            f"than {largest:.3g}, and {bound} allows {allowed:.3g}); nothing may be left of it"
        )

    def _compress(self, group: Group) -> Written:
        seen = self.recipe.seen(
            self.checkpoint, (task.expert for task in group.tasks), group.method, certify=True
        )
        try:
            artifact = compress_group(group.method, seen, number=group.number, threads=1)
        except MoeboundError as error:
            first = group.tasks[0].expert.matrices[0]
            raise type(error)(f"{first.source.file}: tensor {first.name!r}: {error}") from error
        return written(group, seen.experts, artifact)

    def summary(self, folder: Path, dst: Path, begun: float, *, resumed: bool) -> CompressSummary:
        records = read_certificates(folder / CERTIFICATES_FILE)
        totals, others = ExpertTotals.of(records), OtherTotals.of(records)
        after = sum(
            tensor.n_bytes
            for name in self.layout.names
            for tensor in read_header(folder / name)[0].values()
        )
        return CompressSummary(
            path=str(dst),
            method=self.settings.method,
            bound=self.settings.bound,
            guarantee=weakest([totals.guarantee, others.guarantee]),
            max_abs_error=max(totals.max_abs_error, others.max_abs_error),
            rmse=totals.rmse,
            n_experts=totals.n_experts,
            n_weights=totals.n_weights,
            expert_bytes_before=totals.bytes_before,
            expert_bytes_after=totals.bytes_after,
            n_parameters=sum(prod(t.shape) for t in self.checkpoint.tensors.values()),
            model_bytes_before=self.checkpoint.total_bytes,
            model_bytes_after=after,
            store_bytes=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
            left_out=dict(self.settings.left_out),
            worst=larger(totals.worst, others.worst),
            patched=totals.patched,
            outputs=totals.outputs,
            seconds=time.monotonic() - begun,
            resumed=resumed,
            without_weights=WithoutWeights.of(records),
            others=self.settings.others,
            coded=others,
        )


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


def _remove_parts(folder: Path, shards: list[str]) -> None:
    with disk_errors(folder):
        for shard in shards:
            (folder / (shard + _PART_SUFFIX)).unlink(missing_ok=True)
