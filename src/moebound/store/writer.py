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

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

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
from moebound.errors import BoundError, MethodError, MoeboundError, PlanError, StoreError
from moebound.files.durable import disk_errors
from moebound.files.formats.statistics import Statistics, read_statistics
from moebound.jobs.ordered import in_order
from moebound.jobs.workers import Hire, Opening, Workers
from moebound.methods import Method, weakest
from moebound.methods import compress as compress_group
from moebound.plan import Plan
from moebound.store.at_size import within
from moebound.store.beside import choose_files, write_rest
from moebound.store.earlier import OnExisting, finished_before, take_up
from moebound.store.folder import WorkFolder, check_apart, write_synced
from moebound.store.format import (
    CERTIFICATES_FILE,
    CalibratedBy,
    Others,
    Record,
    Settings,
    TensorRecord,
    check_others,
    from_line,
    read_certificates,
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

_PART_SUFFIX = ".records.jsonl"

Shard = TensorShard | CodedShard | ExpertShard


def compress(
    checkpoint: Checkpoint | Path | str,
    dst: Path | str,
    *,
    bound: ErrorBound | Plan | None = None,
    bits_per_weight: float | None = None,
    method: str | None = None,
    codec: str | None = None,
    calibration: Statistics | Path | str | None = None,
    moved: Statistics | Path | str | None = None,
    layers: set[int] | None = None,
    experts: set[int] | None = None,
    shared_experts: bool = False,
    jobs: int | None = None,
    on_existing: OnExisting = "error",
    progress: ProgressCallback | None = None,
    shard_bytes: int = SHARD_BYTES,
    source: str | None = None,
    workers: Hire | None = None,
    others: Others = "lossless",
) -> CompressSummary:
    """Write the checkpoint to dst with its experts compressed, and say what it came to.

    checkpoint: or what `open_checkpoint` opens, a path, a hub id or a built-in model.
    bound: kept by every weight of every chosen expert; scope "expert" takes its reference from all
        matrices of the expert together. Or a plan, with bounds of its own for every expert of the
        checkpoint. None for a method that knows none. bits_per_weight: in its place, the most that
        the chosen experts may take: `store.within` finds the bound or the plan.
    method: a setting, as "rtn:int4:g64", see `methods.get_method`; None for the plan's, or the one
        that keeps bounds with our own codec. codec: the method that keeps bounds, with this codec.
    calibration: statistics of the model's inputs (`moebound calibrate`), or their folder, for
        methods that need them. moved: those of the model as the method leaves it (`moebound
        calibrate --after`), for what codes the rest.
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
    workers: who writes the shards, None for this process. Checkpoint, statistics and dst must mean
        the same to all; the bytes are the same.

    Guarantee: dst appears whole, or not at all. Raises StoreError (place, disk, selection, another
    run's work), PlanError for a plan that is not for this checkpoint, MethodError for a method that
    is unknown, does not go with the bound, or fails, BoundError and CodecError as codecs do,
    CheckpointError for the source.
    """
    dst, begun = Path(dst), time.monotonic()
    named = isinstance(checkpoint, str) and not Path(checkpoint).exists()  # a hub id, builtin:NAME
    spelled = str(checkpoint) if named else None
    if codec is not None:
        if method is not None:
            raise MethodError(f"method {method!r} and codec {codec!r}: expected one of them")
        method = f"bounded:{codec}"
    if isinstance(calibration, (str, Path)):
        calibration = read_statistics(Path(calibration))
    if isinstance(moved, (str, Path)):
        moved = read_statistics(Path(moved))
    jobs = thread_count() if jobs is None else jobs
    if jobs < 1 or shard_bytes < 1:
        raise StoreError(f"jobs {jobs}, shard_bytes {shard_bytes}: expected at least 1")
    if bits_per_weight is not None:
        if bound is not None:
            raise BoundError(f"{bound} and bits_per_weight {bits_per_weight}: expected one of them")
        method, bound = within(
            checkpoint, bits_per_weight, method=method, calibration=calibration, layers=layers,
            experts=experts, shared_experts=shared_experts, jobs=jobs,
        )  # fmt: skip
    asked: dict[str, Any] = {
        "bound": bound, "method": method, "calibration": calibration, "moved": moved,
        "layers": layers, "experts": experts, "shared_experts": shared_experts,
        "shard_bytes": shard_bytes, "others": check_others(others),
    }  # fmt: skip
    job, run = _planned(checkpoint, **asked, jobs=jobs, source=source)
    checkpoint, layout, settings = job.checkpoint, job.layout, job.settings
    check_apart(dst, checkpoint.path)
    remarks = [*_dequantized(checkpoint), *_unplanned(job.recipe), *job.empty_promises()]
    if finished_before(dst, settings, on_existing):
        return replace(job.summary(dst, dst, begun, resumed=True), remarks=remarks)
    with WorkFolder(dst) as work:
        resumed = on_existing != "overwrite" and take_up(work, run, settings)
        if not resumed:
            work.start_over(run)
        if not work.sealed:
            spread = None
            if workers is not None:
                folders = {"calibration": calibration, "moved": moved}
                asked |= {n: f.folder.resolve() for n, f in folders.items() if f is not None}
                spelled = spelled or str(checkpoint.path.resolve())
                place = {"folder": work.path.resolve(), "run": settings.run}
                found = {"checkpoint": spelled, **place, "asked": asked}
                spread = workers(Opening(_Shards, found))
            job.write(work.path, progress, spread)
            work.seal()
        _remove_parts(work.path, layout.names)
        summary = job.summary(work.path, dst, begun, resumed=resumed)
        work.publish()
    return replace(summary, seconds=time.monotonic() - begun, remarks=remarks)


def _planned(
    checkpoint: Checkpoint | Path | str,
    *,
    bound: ErrorBound | Plan | None,
    method: str | None,
    calibration: Statistics | Path | None,
    moved: Statistics | Path | None,
    layers: set[int] | None,
    experts: set[int] | None,
    shared_experts: bool,
    shard_bytes: int,
    others: Others,
    jobs: int,
    source: str | None = None,
) -> tuple[_Job, dict[str, object]]:
    """What is to be written, and what makes this run another than others. As `compress`."""
    if isinstance(calibration, Path):
        calibration = read_statistics(calibration)
    if isinstance(moved, Path):
        moved = read_statistics(moved)
    recipe = Recipe.of(bound, method, calibration, moved)  # an unknown method before any work
    checkpoint = open_checkpoint(checkpoint)
    for statistics in filter(None, (calibration, moved)):
        statistics.check_model(experts_name(checkpoint), checkpoint.name)
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
    return _Job(checkpoint, layout, settings, recipe, jobs, copied), run


def _dequantized(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.stored_as is not None:
        yield (
            f"the source is stored as {checkpoint.stored_as}, in {checkpoint.stored_bytes} bytes. "
            "Sizes before and bounds are of its weights as they are dequantized"
        )


def _unplanned(recipe: Recipe) -> Iterator[str]:
    fisher = recipe.calibration is not None and recipe.calibration.of.fisher
    if fisher and recipe.plan is None and recipe.bound is not None:
        yield (
            "statistics of --fisher with one bound for all experts lose more than a plan by them, "
            "and more than statistics without --fisher: --bpw, for all routed experts, plans by "
            "itself"
        )


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

    def write(
        self, folder: Path, progress: ProgressCallback | None, workers: Workers | None = None
    ) -> None:
        """Write all that is missing; config.json comes last. workers: of `_Shards`, who then write
        the shards."""
        shards = self.layout.expert_shards
        meter = Meter(
            progress,
            total_bytes=self.checkpoint.total_bytes,
            total_experts=sum(shard.n_experts for shard in shards),
        )
        missing = []
        for shard in self._shards.values():
            if _is_done(folder, shard.name):
                _count(shard, meter)
            else:
                missing.append(shard)
        if workers is None:
            self._write_shards(folder, missing, meter)
        else:
            with workers:
                for name in workers.run([shard.name for shard in missing], {}):
                    _count(self._shards[name], meter)
        write_rest(
            folder, self.checkpoint, self.layout.names, self.settings, self.recipe.plan,
            copied=self.copied, records=_lines(folder, self.layout.names),
        )  # fmt: skip

    @property
    def _shards(self) -> dict[str, Shard]:
        layout = self.layout
        every: list[Shard] = [*layout.tensor_shards, *layout.coded_shards, *layout.expert_shards]
        return {shard.name: shard for shard in every}

    def write_shard(self, folder: Path, name: str) -> None:
        """One of them, whether it is there or not."""
        self._write_shards(
            folder, [self._shards[name]], Meter(None, total_bytes=0, total_experts=0)
        )

    def _write_shards(self, folder: Path, shards: Sequence[Shard], meter: Meter) -> None:
        of_experts = []
        for shard in shards:
            if isinstance(shard, ExpertShard):
                of_experts.append(shard)
            elif isinstance(shard, CodedShard):
                self._write_coded(folder, shard, meter)
            else:
                self._write_tensors(folder, shard)
                _count(shard, meter)
        groups = [group for shard in of_experts for group in shard.groups]
        with closing(in_order(self._compress, groups, jobs=self.jobs)) as artifacts:
            for shard in of_experts:
                self._write_experts(folder, shard, artifacts, meter)

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
        method = self.recipe.method_of(expert.key)
        # Where channels have bounds of their own, the widest says nothing of the others.
        if bounds is None or type(method).column_bounds is not Method.column_bounds:
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


class _Shards:
    """What a worker has of a run: it writes shards by name. folder: with the run's work.

    Raises StoreError where the checkpoint is another one than on the machine that asked.
    """

    def __init__(
        self, checkpoint: str, folder: Path, run: str, asked: Mapping[str, Any], threads: int | None
    ) -> None:
        self._job, _ = _planned(checkpoint, **asked, jobs=threads or thread_count())
        if self._job.settings.run != run:
            raise StoreError(
                f"{checkpoint}: a worker finds another checkpoint or other statistics there than "
                "the process that asked; all machines must see the same files"
            )
        self._folder = folder

    def use(self, known: Mapping[str, Any]) -> None:
        """Shards need to know nothing of each other."""

    def run(self, name: str) -> str:
        self._job.write_shard(self._folder, name)
        return name


def _count(shard: Shard, meter: Meter) -> None:
    if isinstance(shard, ExpertShard):
        n_bytes = sum(group.n_bytes for group in shard.groups)
        meter.add(shard.name, n_bytes=n_bytes, experts=shard.n_experts)
    else:
        meter.add(shard.name, n_bytes=sum(tensor.n_bytes for tensor in shard.tensors))


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
