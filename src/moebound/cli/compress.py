"""`moebound compress`: a checkpoint in, a store with a certificate for every expert matrix out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moebound.cli import exits, wording
from moebound.cli.hands import hire, works_in_parts
from moebound.cli.options import (
    BoundValue,
    CodecId,
    IndexSet,
    MethodSetting,
    OthersValue,
    chosen_bound,
)
from moebound.cli.output import Output, output_options
from moebound.cli.progress import progress_bar
from moebound.types import BoundMode, BoundScope, ErrorBound

if TYPE_CHECKING:
    from moebound.plan import Plan
    from moebound.store.format import Others


@click.command()
@click.argument("src")
@click.argument("dst", type=click.Path(file_okay=False))
@click.option(
    "--rate",
    type=BoundValue(),
    help="No weight moves by more than RATE x the mean |weight| of its expert (or matrix).",
)
@click.option("--abs", "abs_", type=BoundValue(), help="No weight moves by more than ABS.")
@click.option(
    "--range",
    "range_",
    type=BoundValue(),
    help="No weight moves by more than RANGE x (max - min) of its matrix.",
)
@click.option(
    "--rmse",
    type=BoundValue(),
    help="Root mean square error at most RMSE x the root mean square weight of the matrix. "
    "An average promise: single weights may err more.",
)
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Bounds for each expert, from `moebound plan`.",
)
@click.option(
    "--bpw",
    type=BoundValue(),
    help="Instead of a bound: the rate at which the chosen experts take at most so many bits a "
    "weight, found by encoding them; with --calibration of `calibrate --fisher`, a plan by it.",
)
@click.option(
    "--scope",
    type=click.Choice(["expert", "matrix"]),
    default=None,
    help="What --rate is relative to.  [default: expert]",
)
@click.option(
    "--codec",
    type=CodecId(),
    default=None,
    help="Who keeps the bound: bound, sz3, zfp, cuszp, lossless, raw; options follow a colon, "
    "as in sz3:interp.  [default: bound, or the plan's]",
)
@click.option(
    "--method",
    type=MethodSetting(),
    default=None,
    help="Instead of a codec, a method: calibrated, rtn:int4:g64, hqq:int4:g64, or another "
    "package's. One that knows no bound promises nothing; what it leaves is measured, and "
    "certified as that.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    default=None,
    metavar="STATS",
    help="What `moebound calibrate` wrote of this model; --method calibrated rounds by it, and is "
    "the default for --bpw with what `calibrate --fisher` wrote.",
)
@click.option(
    "--moved",
    type=click.Path(path_type=Path),
    default=None,
    metavar="STATS",
    help="What `moebound calibrate --after METHOD` wrote: with METHOD+CODER, what is kept is coded "
    "by these inputs, which it gets once METHOD has left out the rest.",
)
@click.option(
    "--others",
    type=OthersValue(),
    default="lossless",
    show_default=True,
    metavar="keep|lossless|RATE",
    help="All other tensors: as they are; coded without loss; or matrices under a bound, of RATE x "
    "their own mean |weight|. Routers, norms, biases lose nothing.",
)
@click.option("--layers", type=IndexSet(), help="Only these layers, as in 0-3,7.")
@click.option("--experts", type=IndexSet(), help="Only these experts of each layer.")
@click.option("--shared-experts", is_flag=True, help="Compress shared experts too.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=None,
    help="Experts to work on at a time.  [default: one a CPU]",
)
@works_in_parts("its share of the shards")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run in DST.")
@click.option("--overwrite", is_flag=True, help="Replace what is in DST, once all is written.")
@output_options
def compress(
    output: Output,
    src: str,
    dst: str,
    rate: float | None,
    abs_: float | None,
    range_: float | None,
    rmse: float | None,
    plan_file: Path | None,
    bpw: float | None,
    scope: BoundScope | None,
    codec: str | None,
    method: str | None,
    calibration: Path | None,
    moved: Path | None,
    others: Others,
    layers: set[int] | None,
    experts: set[int] | None,
    shared_experts: bool,
    jobs: int | None,
    workers: int,
    ray_address: str | None,
    resume: bool,
    overwrite: bool,
) -> int:
    """Compress the experts of SRC into DST, a folder that transformers can load.

    Exactly one of --rate, --abs, --range, --rmse, --plan and --bpw says how far a weight may move,
    unless a --method is chosen that knows no bound; every weight is measured after it is written,
    in the dtype the model will use. What becomes of all other tensors, --others says. The
    tokenizer and the config are kept as they are; files that are not carried over are named.
    """
    bounds: dict[BoundMode, float | None] = {
        "rate": rate, "abs": abs_, "range": range_, "rmse": rmse,
    }  # fmt: skip
    if codec is not None and method is not None:
        raise click.UsageError("--codec and --method exclude each other")
    bound: ErrorBound | Plan | None
    asked = f"bounded:{codec}" if codec is not None else method
    if bpw is not None:
        _alone("--bpw", *bounds.items(), ("plan", plan_file))
        bound = None
    elif plan_file is None:
        bound = chosen_bound(bounds, scope, method=asked or "bounded:bound")
    else:
        chosen = {"scope": scope, "layers": layers, "experts": experts}
        shared = {"shared-experts": shared_experts or None}
        bound = _plan(plan_file, *bounds.items(), *chosen.items(), *shared.items())
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")

    from moebound import store
    from moebound.files.formats.statistics import read_statistics

    if bpw is not None:
        with progress_bar(output, "measuring") as progress:
            asked, bound = store.within(
                src,
                bpw,
                method=asked,
                calibration=None if calibration is None else read_statistics(calibration),
                scope=scope,
                layers=layers,
                experts=experts,
                shared_experts=shared_experts,
                jobs=jobs,
                progress=progress,
            )
    with progress_bar(output, "compressing") as progress:
        try:
            done = store.compress(
                src,
                dst,
                bound=bound,
                method=asked,
                calibration=calibration,
                moved=moved,
                others=others,
                layers=layers,
                experts=experts,
                shared_experts=shared_experts,
                jobs=jobs,
                on_existing="resume" if resume else "overwrite" if overwrite else "error",
                progress=progress,
                workers=hire(workers, ray_address),
            )
        except KeyboardInterrupt:
            output.note("what is written is kept: the same command with --resume goes on from it")
            raise

    before, after = done.expert_bytes_before, done.expert_bytes_after
    output.result(
        done.to_json(),
        wording.facts(
            f"{src} -> {dst}",
            [
                ("whole model", f"{wording.bits(done.model_bits_per_weight)}: "
                 f"{wording.n_bytes(done.model_bytes_before)} -> "
                 f"{wording.n_bytes(done.model_bytes_after)}, "
                 f"{wording.ratio(done.model_bytes_before, done.model_bytes_after)}"),
                ("bound", _bound(bound, plan_file, done.bound)),
                *wording.promise(done.guarantee, done.worst, done.max_abs_error),
                *wording.outputs(done.outputs),
                *wording.without_weights(done.without_weights),
                ("root mean square error", f"{done.rmse:.3g} in weight units"),
                ("method", done.method),
                ("experts", f"{done.n_experts}: {wording.n_bytes(before)} -> "
                 f"{wording.n_bytes(after)}, {wording.ratio(before, after)}, "
                 f"{wording.bits(done.expert_bits_per_weight)}"),
                ("other tensors", wording.others(done.others, done.coded)),
                ("files of the store", f"{wording.n_bytes(done.store_bytes)}, certificates and "
                 "tokenizer among them"),
                *(("left out", f"{name}: {why}") for name, why in done.left_out.items()),
                *(("remark", text) for text in done.remarks),
                ("stored verbatim", f"{done.patched} of {done.n_weights} weights"),
                *([("resumed", "work of an earlier run was taken up")] if done.resumed else []),
                ("time", f"{done.seconds:.1f} s, {wording.n_bytes(before / done.seconds)}/s"
                 if done.seconds else "0 s"),
            ],
        ),
    )  # fmt: skip
    return exits.OK


def _bound(asked: ErrorBound | Plan | None, file: Path | None, widest: ErrorBound | None) -> str:
    if asked is None or isinstance(asked, ErrorBound) or widest is None:
        return wording.bound(widest)
    each = f"each {asked.made.get('bound_per', 'expert')}'s own"
    by = f"from {file}" if file is not None else f"planned by scheme {asked.scheme}"
    return f"{each}, {by}; widest {widest}"


def _alone(option: str, *beside: tuple[str, object]) -> None:
    """Raises click.UsageError for an option that this one stands in the place of."""
    for name, value in beside:
        if value is not None:
            raise click.UsageError(f"{option} chooses the rate itself: without --{name}")


def _plan(file: Path, *beside: tuple[str, object]) -> Plan:
    """Raises click.UsageError for an option that a plan decides, PlanError for a bad file."""
    for name, value in beside:
        if value is not None:
            raise click.UsageError(f"--plan says how far each weight may move: without --{name}")
    from moebound.plan import Plan

    return Plan.load(file)
