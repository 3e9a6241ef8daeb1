"""`moebound fit`: what a model would become, and whether it would fit, by its config alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moebound.cli import exits
from moebound.cli.fit_tables import (
    ROAD_WORDS,
    STORE_WORDS,
    WORDS,
    linear_words,
    placing_lines,
    placing_words,
    rate_json,
    road_lines,
    running_lines,
    running_words,
    table_lines,
)
from moebound.cli.options import OthersValue
from moebound.cli.output import Output, output_options
from moebound.cli.steps import step_bar

if TYPE_CHECKING:
    from moebound.fit import Estimate, Gpu, Shape
    from moebound.offload.codes import SlotsName
    from moebound.store.format import Others


@click.command()
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option("--known", is_flag=True, help="All models whose configs come with moebound.")
@click.option("--rate", "rates", type=click.FloatRange(min=0, min_open=True), multiple=True,
              metavar="R", help="A bound, of the mean |weight| of each expert; repeatable.  "
              "[default: 0.1, 0.3, 0.8]")  # fmt: skip
@click.option("--others", type=OthersValue(), default="lossless", show_default=True,
              metavar="keep|lossless|RATE", help="All other weights, as for compress.")  # fmt: skip
@click.option("--linears", type=click.Choice(["values", "codes", "codes4"]), default="values",
              show_default=True,
              help="What linear layers that are no expert's are held as, for --ram: codes need "
              "--others RATE.")  # fmt: skip
@click.option("--ram", metavar="SIZE",
              help="Memory there is, as 16GB: says what would lie where, and what a token would "
              "take. With --device the host's, where compressed experts can wait.")  # fmt: skip
@click.option("--device", metavar="SIZE|cuda",
              help="A GPU's memory, as 24GB, or cuda for the GPU that is here: says what would lie "
              "there, and what a token would take. A GPU that is here is measured; without one, "
              "times are by rows of one NVIDIA H200.")  # fmt: skip
@click.option("--link", metavar="SIZE",
              help="What the bus brings to the GPU in a second.  [default: measured, or 25GB, PCIe "
              "4 x16; PCIe 5 x16 brings 55GB]")  # fmt: skip
@click.option("--device-speed", type=click.FloatRange(min=0, min_open=True), metavar="SHARE",
              help="How fast the GPU is, in shares of that H200.  [default: 1]")  # fmt: skip
@click.option(
    "--disk",
    metavar="SIZE",
    help="What the disk reads in a second, for --ram, --device and --plot.  [default: 1GB]",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Draw the time a token by memory of one MODEL, with --device by the GPU's: "
              ".png, .svg, .pdf.")  # fmt: skip
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
    linears: SlotsName,
    ram: str | None,
    device: str | None,
    link: str | None,
    device_speed: float | None,
    disk: str | None,
    plot: Path | None,
    steps: bool,
    machines: int,
) -> int:
    """Say how large MODEL would be at each rate, and how long compressing it would take here.

    MODEL is the name of a known one (Moonlight-16B-A3B, Mixtral-8x7B, ...), a folder, a
    config.json, or a model id on the hub. Only its config is read. Sizes and times are those of
    random experts of the same shapes, which are compressed on this machine, times their number.
    Of a store, its own bytes are counted, and some of its own experts decoded.
    """
    from moebound.extras import check
    from moebound.fit import (
        DISK,
        KNOWN,
        Host,
        all_running,
        estimate,
        estimate_store,
        is_store,
        measure_machine,
        place_all,
        plot_placing,
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
    if device is None and (link is not None or device_speed is not None):
        raise click.UsageError("--link and --device-speed are of a GPU: give --device, too")
    stores = [model for model in models if is_store(model)]
    if linears != "values" and (device is not None or ram is None):
        raise click.UsageError(f"--linears {linears} is for --ram, and on a CPU")
    if linears != "values" and isinstance(others, str) and (known or len(stores) < len(models)):
        raise click.UsageError(
            f"--linears {linears}: linear layers have codes where --others is a rate, as 0.3"
        )
    if stores and (rates or steps):
        raise click.UsageError(
            f"{stores[0]} is a store, whose own bytes are counted: --rate and --steps are for "
            "models that are to be compressed"
        )
    if plot is not None:
        check("--plot", "matplotlib")  # before everything is measured
    speed = DISK if disk is None else parse_size(disk, what="--disk")
    memory = None if ram is None else parse_size(ram, what="--ram")
    on_gpu = None if device is None else _device_bytes(device)
    brings = None if link is None else parse_size(link, what="--link")
    host = Host(memory or 0, speed)
    codec = "bound" if device is None else "bound:segment=gpu"
    found: list[tuple[Shape, list[Estimate]]] = []
    asked = KNOWN if known else models
    shapes = [shape_of(model) for model in asked]
    with step_bar(output) as say:
        for number, shape in enumerate(shapes):
            say(shape.name, number, len(shapes))
            if shape.name in stores:
                shape, sizes = estimate_store(shape.name, shape, memory=memory, linears=linears)
                found.append((shape, [sizes]))
            else:
                each = estimate(
                    shape, rates or RATES, memory=memory, others=others, codec=codec,
                    linears=linears,
                )  # fmt: skip
                found.append((shape, each))
    document: dict[str, Any] = {
        "models": [
            {
                "model": shape.name,
                **shape.to_json(),
                "rates": [rate_json(shape, estimate) for estimate in estimates],
            }
            for shape, estimates in found
        ]
    }
    tables = [table_lines(found), *([WORDS] if len(stores) < len(found) else [])]
    tables += [STORE_WORDS] if stores else []
    for entry, (shape, estimates) in zip(document["models"], found, strict=True):
        stored = shape.name in stores
        if on_gpu is not None:
            gpu = _gpu(shape, stored=stored, link=brings, speed=device_speed)
            placed = place_all(shape, estimates, gpu, on_gpu, host)
            entry["gpu"] = gpu.to_json()
            entry["placing"] = [way.to_json() for ways in placed for way in ways]
            tables.append(placing_lines(shape, placed))
            tables.append(placing_words(gpu, host, stored=stored, link_said=link is not None))
            if plot is not None:
                drawn = plot_placing(shape, estimates, gpu, on_gpu, host, plot)
                tables.append(f"Drawn: {drawn}")
        elif memory is not None or plot is not None:
            machine = measure_machine(shape, disk=speed)
            entry["machine"] = machine.to_json()
            if memory is not None:
                ways = all_running(shape, estimates, machine, memory)
                entry["running"] = [way.to_json() for way in ways]
                tables += [running_lines(shape, ways), running_words(machine)]
                tables += [] if linears == "values" else [linear_words(shape, estimates[0])]
            if plot is not None:
                tables.append(f"Drawn: {plot_running(shape, estimates, machine, plot)}")
    if steps:
        for entry, (shape, estimates) in zip(document["models"], found, strict=True):
            taken = road(shape, estimates[0], machines=machines)
            entry["machines"], entry["steps"] = machines, [step.to_json() for step in taken]
            tables += [road_lines(shape, estimates[0].name, machines, taken), ROAD_WORDS]
    output.result(document, *tables)
    return exits.OK


def _device_bytes(device: str) -> int:
    """Of a GPU's memory. Raises CacheError for what is no size, and for cuda without a GPU."""
    from moebound.errors import CacheError
    from moebound.fit import here
    from moebound.offload.budget import parse_size

    if device != "cuda":
        return parse_size(device, what="--device")
    found = here()
    if found is None:
        raise CacheError(
            "--device cuda: no GPU with triton is here: give the memory that one has, as 24GB"
        )
    import torch

    return int(torch.cuda.get_device_properties(found).total_memory)


def _gpu(shape: Shape, *, stored: bool, link: int | None, speed: float | None) -> Gpu:
    """The one that is here, measured, unless a speed is said; otherwise by rows of an H200."""
    from moebound.fit import expert_of, here, measure_gpu, random_expert
    from moebound.fit import known as by_rows

    device = None if speed is not None else here()
    if device is not None:
        expert = expert_of(shape.name) if stored else random_expert(shape, 0.3, "bound:segment=gpu")
        if expert:
            return measure_gpu(shape, expert, device, link=link)
    return by_rows(link=link, speed=1.0 if speed is None else speed)
