"""`moebound bench`: measure on this machine. Verified first, then timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moebound.cli import exits
from moebound.cli.bench_methods import bench_methods
from moebound.cli.options import CodecIds, Counts, Numbers
from moebound.cli.output import Output, output_options
from moebound.cli.steps import step_bar

if TYPE_CHECKING:
    from moebound.bench.codec import Step


@click.group()
def bench() -> None:
    """Measure on this machine."""


bench.add_command(bench_methods)


@bench.command("codec")
@click.option(
    "--input",
    "source",
    metavar="FILE.safetensors|SRC",
    help="Matrices of a file, or expert matrices of a checkpoint.  [default: synthetic experts "
    "of full size]",
)
@click.option(
    "--rates",
    type=Numbers(),
    default=None,
    help="Bounds, relative to the mean |weight| of the matrix.  [default: 0.02,0.05,0.1,0.3,0.8]",
)
@click.option(
    "--codecs",
    type=CodecIds(),
    default="bound,sz3,cuszp:fixed",
    show_default=True,
    help="sz3 is the smallest of its algorithms; sz3:interp is that one.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=6,
    show_default=True,
    metavar="N",
    help="At most N matrices of --input, spread evenly.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=3.0,
    show_default=True,
    help="Time to measure each matrix at each rate.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Also time with so many threads.",
)
@output_options
def bench_codec(
    output: Output,
    source: str | None,
    rates: list[float] | None,
    codecs: list[str],
    limit: int,
    seconds: float,
    threads: int,
) -> int:
    """Size, error and speed of codecs on the same matrices, in one run.

    Every output is decoded and its bound checked before anything is timed.
    """
    from moebound.bench import matrices
    from moebound.bench.codec import RATES, render_table, run
    from moebound.wordmath.builtin import resolve

    chosen = matrices.load(None if source is None else resolve(source), limit=limit)
    with _progress(output) as step:
        report = run(
            chosen,
            rates or RATES,
            codecs,
            seconds_per_case=seconds,
            threads=threads,
            progress=step,
        )
    output.result(report.to_json(), render_table(report))
    return exits.OK


@contextlib.contextmanager
def _progress(output: Output) -> Iterator[Callable[[Step], None] | None]:
    if not output.shows_progress:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=None)
        yield lambda step: bar.update(
            task, description=step.label, completed=step.done, total=step.total
        )


@bench.command("quality")
@click.argument("src")
@click.option("--task", required=True, metavar="TASK", help="As in `moebound eval`.")
@click.option(
    "--sensitivity",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What `moebound sensitivity` measured; adds planned rows.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="STATS",
    help="What `moebound calibrate` wrote, of other text; adds rows of method calibrated.",
)
@click.option(
    "--quantizers",
    metavar="LIST",
    help="Whose sizes to compare at.  [default: round to nearest and HQQ, 4 and 3 bits; none where "
    "--peers are given]",
)
@click.option(
    "--peers",
    metavar="LIST",
    help="Calibrated quantizers of others, by their own libraries, on the text of --calibration: "
    " gptq:int4:g128,awq:int4:g128,autoround:int3:g128,hqq:int3:g64,gguf:iq3_s.",
)
@click.option(
    "--plans",
    metavar="LIST",
    help="Files of `moebound plan`: a row each, beside the quantizer or peer whose size it has.",
)
@click.option(
    "--peer-environments",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="What `python -m moebound.bench.peers.environments FOLDER` made.",
)
@click.option(
    "--calibration-text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="What --calibration was made of with --text, for --peers to read.",
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Keep rows and the peers' checkpoints here: the same command goes on from them.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N problems only.")
@output_options
def bench_quality(
    output: Output,
    src: str,
    task: str,
    sensitivity: Path | None,
    calibration: Path | None,
    quantizers: str | None,
    peers: str | None,
    plans: str | None,
    peer_environments: Path | None,
    calibration_text: Path | None,
    work: Path | None,
    limit: int | None,
) -> int:
    """What a model loses to quantizers, and to bounded codecs at the same bytes.

    A quantizer is METHOD:intBITS:gGROUP, as rtn:int4:g64 (round to nearest) or hqq:int3:g64
    (pip install '.[peers]'); with :coded behind it, rtn's integers are entropy-coded.

    A peer is gptq, awq, autoround or hqq:intBITS:gGROUP, with :sym or :asym for another grid than
    its library's preset has, or gguf:TYPE, a file type of llama.cpp. Peers need --calibration,
    --peer-environments and --work.
    """
    from moebound.bench.quality import QUANTIZERS, Peers, run
    from moebound.bench.quality_table import render_quality
    from moebound.files.formats import sensitivity_map
    from moebound.files.formats.statistics import read_statistics
    from moebound.plan import Plan
    from moebound.tasks import get_task

    statistics = None if calibration is None else read_statistics(calibration)
    document = None if sensitivity is None else sensitivity_map.FORMAT.read(sensitivity)
    asked = None
    if peers is not None:
        if work is None:
            raise click.UsageError("--peers needs --work, a folder for their checkpoints")
        asked = Peers(_names(peers), work, peer_environments, calibration_text)
    names: tuple[str, ...] = QUANTIZERS if peers is None else ()
    if quantizers is not None:
        names = _names(quantizers)
    with step_bar(output, says_left=True) as say:
        report = run(
            src, get_task(task), quantizers=names, peers=asked,
            plans=[Plan.load(Path(name)) for name in _names(plans or "")],
            sensitivity=document, calibration=statistics, limit=limit, rows=work, say=say,
        )  # fmt: skip
    output.result(report.to_json(), render_quality(report))
    return exits.OK


@bench.command("gpu")
@click.option("--rates", type=Numbers(), help="Bounds, relative to the mean |weight|.")
@click.option(
    "--segments",
    type=Counts(),
    metavar="LIST",
    help="Weights of a segment, that one warp decodes.  [default: 4096 to 262144]",
)
@click.option("--experts", type=Counts(), metavar="LIST", help="At a time.  [default: 1,6,64]")
@output_options
def bench_gpu(
    output: Output,
    rates: list[float] | None,
    segments: list[int] | None,
    experts: list[int] | None,
) -> int:
    """Decoding on a GPU: bits compared with the CPU's first, then kernels and copies timed.

    The experts are synthetic ones of Moonlight's size. Needs a CUDA device and
    pip install '.[gpu]'.
    """
    from moebound.bench.gpu import GpuSettings, render_gpu, run

    chosen = {"rates": rates, "segments": segments, "experts": experts}
    given = {name: tuple(values) for name, values in chosen.items() if values is not None}
    report = run(GpuSettings(**given), say=output.note)  # type: ignore[arg-type]
    output.result(report.to_json(), *render_gpu(report))
    return exits.OK


@bench.command("offload")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True,
              help="Folder for the synthetic checkpoint and its store, 6 GB, and 4 GB for "
                   "llama.cpp; they are used again if they are there.")  # fmt: skip
@click.option("--model", metavar="SRC",
              help="Measure this one, with its own routing.  "
                   "[default: a synthetic checkpoint]")  # fmt: skip
@click.option("--task", metavar="TASK",
              help="Whose problems --model reads, as in `moebound eval`.  "
                   "[default: wordmath]")  # fmt: skip
@click.option("--layers", type=click.IntRange(min=1),
              help="MoE layers of the synthetic checkpoint, 1.1 GB each.  "
                   "[default: 4]")  # fmt: skip
@click.option("--rate", type=float, default=0.3, show_default=True, help="Bound of the store.")
@click.option("--codec", default="bound", show_default=True, help="Of the store.")
@click.option("--budgets", default="10,25,50,100", show_default=True, metavar="LIST",
              help="Memory for experts, in percent of all of them decoded.")  # fmt: skip
@click.option("--memory-limit", metavar="SIZE",
              help="What the process of each run may have, files that it reads included, as 2GB: "
                   "a control group, on Linux, where one can be made.")  # fmt: skip
@click.option("--tiers", default="disk,ram", show_default=True,
              help="Where experts wait: disk, ram, device.")  # fmt: skip
@click.option("--policies", default="hobbit", show_default=True, help="Of the cache.")
@click.option("--prefetch", default="none", show_default=True, help="Predictors.")
@click.option(
    "--slots",
    default="values",
    show_default=True,
    help="What those of compressed experts hold: values, codes, codes4, auto.",
)
@click.option(
    "--linears",
    default="values",
    show_default=True,
    help="What linear layers that are no expert's are: values, codes, codes4. Codes are runs of "
    "another store, see --others.",
)
@click.option(
    "--others",
    type=click.FloatRange(min=0, min_open=True),
    default=0.3,
    show_default=True,
    metavar="RATE",
    help="Of the store for --linears codes: of all that is no expert's, as for compress.",
)
@click.option("--routing", metavar="LIST",
              help="forced by the trace, own: the model's routers choose, or both.  "
                   "[default: forced; own with --model]")  # fmt: skip
@click.option("--trace", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="What is routed where, of `moebound profile --trace`.  [default: drawn by "
                   "Zipf's law]")  # fmt: skip
@click.option("--prompt", type=click.IntRange(min=1), default=64, show_default=True, metavar="N",
              help="Tokens of the prompt.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(min=2), default=48, show_default=True, metavar="N",
              help="Tokens timed behind it.")  # fmt: skip
@click.option("--peers", default="stock,accelerate", show_default=True,
              help="What to run beside it: stock, accelerate, llama.cpp (own routing; "
                   "pip install '.[peers]'), also in fewer bits, as llama.cpp:q4_k_m, or all of "
                   "the file mapped, as llama.cpp:q4_k_m:mapped; an empty list for "
                   "nothing.")  # fmt: skip
@click.option("--clients", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="Each of our runs once more with so many clients at a time, beside "
                   "one.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="Where to compute.")
@output_options
def bench_offload(
    output: Output,
    work: Path,
    model: str | None,
    task: str | None,
    layers: int | None,
    rate: float,
    codec: str,
    budgets: str,
    memory_limit: str | None,
    tiers: str,
    policies: str,
    prefetch: str,
    slots: str,
    linears: str,
    others: float,
    routing: str | None,
    trace: Path | None,
    prompt: int,
    tokens: int,
    peers: str,
    clients: int,
    device: str,
) -> int:
    """Time per token with experts on disk or in RAM, raw and compressed, by memory budget.

    A model with the expert shapes of Moonlight-16B-A3B and random weights, whose routing follows a
    trace, or a model of yours. Each run is a process of its own; the page cache is dropped for
    those from disk.
    """
    from moebound.bench.offload import OffloadSettings, render_clients, render_offload, run
    from moebound.bench.offload.model import Shapes

    if model is not None and layers is not None:
        raise click.UsageError("--layers is of the synthetic checkpoint, and goes without --model")
    if model is None and task is not None:
        raise click.UsageError("--task is what --model reads, and goes with it")
    if routing is None:
        routing = "forced" if model is None else "own"
    settings = OffloadSettings(
        model=model, task=task or "wordmath", shapes=Shapes(layers=layers or 4), rate=rate,
        codec=codec, budgets=tuple(float(part) / 100 for part in budgets.split(",")),
        tiers=_names(tiers), policies=_names(policies), predictors=_names(prefetch),
        slots=_names(slots), linears=_names(linears), others=others,
        routing=_names(routing), trace=trace, prompt=prompt, tokens=tokens,
        peers=_names(peers), memory_limit=_size(memory_limit, "--memory-limit"), device=device,
        clients=clients,
    )  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    with step_bar(output) as say:
        report = run(settings, work, say=say)
    output.result(report.to_json(), render_offload(report), *render_clients(report))
    return exits.OK


def _size(text: str | None, option: str) -> int | None:
    from moebound.offload.budget import parse_size

    return None if text is None else parse_size(text, what=option)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
