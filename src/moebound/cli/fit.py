"""`moebound fit`: what a model would become, and whether it would fit, by its config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from moebound.cli import exits, wording
from moebound.cli.options import OthersValue
from moebound.cli.output import Output, output_options
from moebound.cli.steps import step_bar

if TYPE_CHECKING:
    from moebound.fit import Estimate, Fits, Shape, Step
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
              help="Memory there is, as 16GB: says what would lie where.")  # fmt: skip
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
    steps: bool,
    machines: int,
) -> int:
    """Say how large MODEL would be at each rate, and how long compressing it would take here.

    MODEL is the name of a known one (Moonlight-16B-A3B, Mixtral-8x7B, ...), a folder, a
    config.json, or a model id on the hub. Only its config is read. Sizes and times are those of
    random experts of the same shapes, which are compressed on this machine, times their number.
    """
    from moebound.fit import KNOWN, estimate, road, shape_of
    from moebound.fit.estimate import RATES
    from moebound.offload.budget import parse_size

    if known == bool(models):
        raise click.UsageError(f"give models or --known. Known are {', '.join(KNOWN)}")
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
            {"model": shape.name, **shape.to_json(), "rates": [e.to_json() for e in estimates]}
            for shape, estimates in found
        ]
    }
    tables = [_table(found), _WORDS]
    if steps:
        for entry, (shape, estimates) in zip(document["models"], found, strict=True):
            taken = road(shape, estimates[0], machines=machines)
            entry["machines"], entry["steps"] = machines, [step.to_json() for step in taken]
            tables += [_road(shape, estimates[0].rate, machines, taken), _ROAD_WORDS]
    output.result(document, *tables)
    return exits.OK


_WORDS = (
    "Computed, not tried: random experts of these shapes were compressed here, and everything else "
    "as --others says.\nA rate bounds every weight's error, in mean |weight| of its expert."
)


def _table(found: list[tuple[Shape, list[Estimate]]]) -> Any:
    fits = any(e.fits for _, estimates in found for e in estimates)
    columns = ["model", "weights", "in experts", "in bfloat16", "rate",
               "bits a\nweight", "whole\nmodel", "bits a\nweight", "experts",
               "time to\ncompress", "decode\nan expert"]  # fmt: skip
    rows = []
    for shape, estimates in found:
        first = [shape.name, f"{shape.n_weights / 1e9:.1f} B",
                 wording.percent(shape.n_expert_weights, shape.n_weights),
                 wording.n_bytes(2 * shape.n_weights)]  # fmt: skip
        for e in estimates:
            row = [*first, f"{e.rate:g}", f"{e.model_bits:.2f}", wording.n_bytes(e.model_bytes),
                   f"{e.bits:.2f}", wording.n_bytes(e.expert_bytes), _time(e.compress_s),
                   f"{1e3 * e.decode_s:.1f} ms"]  # fmt: skip
            rows.append(row + ([_where(e.fits)] if e.fits else []))
            first = [""] * len(first)
    if fits:
        memory = next(e.fits.memory for _, es in found for e in es if e.fits)
        columns.append(f"in {wording.n_bytes(memory)}")
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


def _where(fits: Fits) -> str:
    return {
        "decoded": "all decoded",
        "memory": f"compressed in memory, {100 * fits.held:.0f} % decoded",
        "disk": f"compressed on disk, {100 * fits.held:.0f} % decoded",
        "no": "does not fit",
    }[fits.where]
