"""`moebound fit`: what a model would become, and whether it would fit, by its config alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moebound.cli import exits, wording
from moebound.cli.options import OthersValue
from moebound.cli.output import Output, output_options
from moebound.cli.steps import step_bar

if TYPE_CHECKING:
    from moebound.fit import Estimate, Machine, Running, Shape, Step
    from moebound.store.format import Others


@click.command()
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option("--known", is_flag=True, help="All models whose configs come with moebound.")
@click.option("--rate", "rates", type=click.FloatRange(min=0, min_open=True), multiple=True,
              metavar="R", help="A bound, of the mean |weight| of each expert; repeatable.  "
              "[default: 0.1, 0.3, 0.8]")  # fmt: skip
@click.option("--others", type=OthersValue(), default="lossless", show_default=True,
              metavar="keep|lossless|RATE", help="All other weights, as for compress.")  # fmt: skip
@click.option("--ram", metavar="SIZE",
              help="Memory there is, as 16GB: says what would lie where, and what a token would "
              "take.")  # fmt: skip
@click.option(
    "--disk",
    metavar="SIZE",
    help="What the disk reads in a second, for --ram and --plot.  [default: 1GB]",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Draw the time a token by memory of one MODEL: .png, .svg, .pdf.")  # fmt: skip
@click.option("--steps", is_flag=True,
              help="Also what each command would take at the first rate, by measured rates of "
              "machines with two cores.")  # fmt: skip
@click.option("--machines", type=click.IntRange(min=1), default=1, show_default=True,
              help="How many, for --steps (--ray).")  # fmt: skip
@output_options
def fit(
    output: Output,
    models: tuple[str, ...],
    known: bool,
    rates: tuple[float, ...],
    others: Others,
    ram: str | None,
    disk: str | None,
    plot: Path | None,
    steps: bool,
    machines: int,
) -> int:
    """Say how large MODEL would be at each rate, and how long compressing it would take here.

    MODEL is the name of a known one (Moonlight-16B-A3B, Mixtral-8x7B, ...), a folder, a
    config.json, or a model id on the hub. Only its config is read. Sizes and times are those of
    random experts of the same shapes, which are compressed on this machine, times their number.
    """
    from moebound.extras import check
    from moebound.fit import (
        DISK,
        KNOWN,
        all_running,
        estimate,
        measure_machine,
        plot_running,
        road,
        shape_of,
    )
    from moebound.fit.estimate import RATES
    from moebound.offload.budget import parse_size

    if known == bool(models):
        raise click.UsageError(f"give models or --known. Known are {', '.join(KNOWN)}")
    if plot is not None and (len(models) != 1 or plot.suffix not in (".png", ".svg", ".pdf")):
        raise click.UsageError(f"--plot {plot}: expected one MODEL, and a .png, .svg or .pdf")
    if plot is not None:
        check("--plot", "matplotlib")  # before everything is measured
    speed = DISK if disk is None else parse_size(disk, what="--disk")
    memory = None if ram is None else parse_size(ram, what="--ram")
    found: list[tuple[Shape, list[Estimate]]] = []
    asked = KNOWN if known else models
    shapes = [shape_of(model) for model in asked]
    with step_bar(output) as say:
        for number, shape in enumerate(shapes):
            say(shape.name, number, len(shapes))
            found.append((shape, estimate(shape, rates or RATES, memory=memory, others=others)))
    document: dict[str, Any] = {
        "models": [
            {
                "model": shape.name,
                **shape.to_json(),
                "rates": [_rate(shape, estimate) for estimate in estimates],
            }
            for shape, estimates in found
        ]
    }
    tables = [_table(found), _WORDS]
    if memory is not None or plot is not None:
        for entry, (shape, estimates) in zip(document["models"], found, strict=True):
            machine = measure_machine(shape, disk=speed)
            entry["machine"] = machine.to_json()
            if memory is not None:
                ways = all_running(shape, estimates, machine, memory)
                entry["running"] = [way.to_json() for way in ways]
                tables += [_running(shape, ways), _running_words(machine)]
            if plot is not None:
                tables.append(f"Drawn: {plot_running(shape, estimates, machine, plot)}")
    if steps:
        for entry, (shape, estimates) in zip(document["models"], found, strict=True):
            taken = road(shape, estimates[0], machines=machines)
            entry["machines"], entry["steps"] = machines, [step.to_json() for step in taken]
            tables += [_road(shape, estimates[0].rate, machines, taken), _ROAD_WORDS]
    output.result(document, *tables)
    return exits.OK


_WORDS = (
    "Computed, not tried: random experts of these shapes were compressed here, and everything else "
    "as --others says.\nTime to compress is of this machine as it is now; "
    "that on two idle cores, and the memory, are by what\ncompressing 4.4 billion weights at rate "
    "0.3 took on an AMD EPYC (bench/results/compress_checkpoint.json). A rate\nbounds every "
    "weight's error, in mean |weight| of its expert."
)


def _rate(shape: Shape, estimate: Estimate) -> dict[str, Any]:
    from moebound.fit import road

    step = road(shape, estimate)[0]
    return {**estimate.to_json(), "two_cores_s": step.seconds, "compress_memory": step.memory}


def _table(found: list[tuple[Shape, list[Estimate]]]) -> Any:
    from moebound.fit import road

    columns = ["model", "weights", "in experts", "in bfloat16", "rate",
               "bits a\nweight", "whole\nmodel", "bits a\nweight", "experts",
               "time to\ncompress", "two idle\ncores", "memory", "decode\nan expert"]  # fmt: skip
    rows = []
    for shape, estimates in found:
        first = [shape.name, f"{shape.n_weights / 1e9:.1f} B",
                 wording.percent(shape.n_expert_weights, shape.n_weights),
                 wording.n_bytes(2 * shape.n_weights)]  # fmt: skip
        for e in estimates:
            step = road(shape, e)[0]
            row = [*first, f"{e.rate:g}", f"{e.model_bits:.2f}", wording.n_bytes(e.model_bytes),
                   f"{e.bits:.2f}", wording.n_bytes(e.expert_bytes), _time(e.compress_s),
                   _time(step.seconds or 0), wording.n_bytes(step.memory),
                   f"{1e3 * e.decode_s:.1f} ms"]  # fmt: skip
            rows.append(row)
            first = [""] * len(first)
    return wording.grid(columns, rows)


_ROAD_WORDS = (
    "Computed, not tried: by rates measured on two cores (bench/results), with disks that keep up. "
    "A dash: not\nmeasured at such a size."
)


def _road(shape: Shape, rate: float, machines: int, steps: list[Step]) -> Any:
    number = "one machine" if machines == 1 else f"{machines} machines"
    rows = [
        (step.name, "-" if step.seconds is None else _time(step.seconds),
         wording.n_bytes(step.memory), wording.n_bytes(step.disk) if step.disk else "-",
         str(step.parts), step.remark)
        for step in steps
    ]  # fmt: skip
    columns = [f"{shape.name}, rate {rate:g}, {number}", "time", "memory of\none", "writes",
               "parts", ""]  # fmt: skip
    return wording.grid(columns, rows)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _running(shape: Shape, ways: list[Running]) -> Any:
    columns = [f"{shape.name} in {wording.n_bytes(ways[0].memory)}", "slots", "experts", "ready",
               "a token", "tokens\na second", "least\nmemory"]  # fmt: skip
    rows = []
    for way in ways:
        name = "as it is, bfloat16" if way.rate is None else f"rate {way.rate:g}"
        said = [name, way.slots, _WHERE[way.where]]
        if way.seconds is None:
            said += ["-", "-", "-"]
        else:
            each = way.seconds
            said += [f"{100 * way.held:.0f} %", f"{1e3 * each:.0f} ms", f"{1 / each:.1f}"]
        rows.append([*said, wording.n_bytes(way.floor_bytes)])
    return wording.grid(columns, rows, text_columns=3)


def _running_words(machine: Machine) -> str:
    products = ", ".join(f"{1e3 * s:.2f} ms ({kind})" for kind, s in machine.compute_s.items())
    return (
        f"Computed, not tried, from what was measured now on this machine ({machine.cpu}, "
        f"{machine.threads} threads):\nan expert's products {products}, decoding as above, memory "
        f"{wording.n_bytes(machine.memory)}/s. Assumed: a disk of\n{wording.n_bytes(machine.disk)}"
        "/s (--disk), 2 ms a layer for all that is no product, and as many hits as experts are "
        "ready.\nSlots of codes (--slots codes) take half of the memory of values, so twice the "
        "experts are ready."
    )


_WHERE = {
    "decoded": "all in memory",
    "memory": "in memory",
    "disk": "on disk",
    "no": "does not fit",
}
