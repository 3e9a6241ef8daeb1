"""How a model with compressed experts is loaded: options and words of `generate` and `serve`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moebound.cli import wording
from moebound.cli.output import Output

if TYPE_CHECKING:
    from moebound.offload.offloaded import Offloaded

F = TypeVar("F", bound=Callable[..., int])

SMALL_S = 1e-3
"""Decoding and computing an expert takes less where experts are tiny."""

SKIP_HELP = (
    "Leave out experts of little weight: lu_re, odp_re, modes_re or hobbit_re, with options behind "
    "a colon (modes_re:target0.4)."
)
CALIBRATION_HELP = "Thresholds of --skip, from `moebound thresholds`; for lu_re also statistics."


def check_skip(skip: str | None, calibration: Path | None) -> None:
    """Raises UsageError for --calibration alone, MoeboundError for a policy that is none, or that
    needs a file that was not given."""
    from moebound.model.skip_policies import check_setting

    if skip is None:
        if calibration is not None:
            raise click.UsageError("--calibration goes with --skip")
        return
    check_setting(skip, calibration)


_OPTIONS = (
    click.option("--ram-budget", metavar="SIZE",
                 help="Memory for experts, decoded and compressed together: 4GiB, or 20% of all "
                      "of them decoded; with --device cuda the GPU's.  "
                      "[default: 70 % of what is free]"),
    click.option("--tier", type=click.Choice(["auto", "disk", "ram", "device"]), default="auto",
                 show_default=True,
                 help="Where experts wait: on disk, or compressed in RAM, within the budget; or "
                      "compressed in a GPU's memory, as many as the budget holds, the rest on the "
                      "host."),
    click.option("--slots", type=click.Choice(["values", "codes", "codes4", "auto"]),
                 default="values", show_default=True,
                 help="What memory holds of an expert: its weights; or codes of a byte, twice the "
                      "experts of bfloat16 in the same memory, or of four bits, four times; or "
                      "the fastest by measurement."),
    click.option("--linears", type=click.Choice(["values", "codes", "codes4"]), default="values",
                 show_default=True,
                 help="The same of linear layers that are no expert's: codes need a store that was "
                      "compressed with --others RATE. Less memory, and less to read a token."),
    click.option("--policy", default="hobbit", show_default=True,
                 help="Who leaves the cache; `moebound cache simulate` tells which is best."),
    click.option("--prefetch", type=click.Choice(["none", "gate", "previous", "matching"]),
                 default="none", show_default=True,
                 help="Guess the next layer's experts: ask its router early, take those of the "
                      "token before, or of a text that went the same way."),
    click.option("--raw", type=click.Path(exists=True, path_type=Path), metavar="CHECKPOINT",
                 help="The same model uncompressed, used where reading it is predicted to be "
                      "faster than decoding."),
    click.option("--coarse", type=click.Path(exists=True, path_type=Path), metavar="STORE",
                 help="The same model under a wider bound: on a miss, experts that matter little "
                      "are read from it. Texts then depend on what is in memory."),
    click.option("--coarse-above", type=click.FloatRange(0, 1), default=0.6, show_default=True,
                 help="They matter little with this share of a token's gate weights before them."),
    click.option("--skip-above", type=click.FloatRange(0, 1),
                 help="On a miss, experts behind this share are left out.  [default: none is]"),
    click.option("--skip", metavar="POLICY", help=f"{SKIP_HELP} Texts do not depend on memory."),
    click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE",
                 help=CALIBRATION_HELP),
    click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
                 default="auto", show_default=True, help="What to compute with."),
    click.option("--device", default="cpu", show_default=True, help="Where: cpu or cuda."),
)  # fmt: skip


_TOGETHER = (
    click.option("--max-sequences", type=click.IntRange(min=1), default=8, show_default=True,
                 metavar="N",
                 help="Texts that are generated at a time. Each is the same in any company; with "
                      "1, it is that of other numbers up to float rounding."),
    click.option("--kv-budget", metavar="SIZE",
                 help="Memory for keys and values of all texts together, as 2GiB; one text always "
                      "runs.  [default: half of what is free beside the experts' budget]"),
)  # fmt: skip


def together_options(command: F) -> F:
    """Adds the options of several texts at a time."""
    for option in reversed(_TOGETHER):
        command = option(command)
    return command


def kv_bytes(size: str | None) -> int | None:
    """What --kv-budget says. Raises CacheError for what is no size."""
    from moebound.offload.budget import parse_size

    return None if size is None else parse_size(size, what="--kv-budget")


def free_for_kv(offloaded: Offloaded) -> int:
    """Half of the memory that is free once the cache of experts is full."""
    from moebound.offload.budget import available_memory

    coming = max(0, offloaded.choice.cache_bytes - offloaded.pool_bytes)
    return max(1, (available_memory(offloaded.model.device) - coming) // 2)


def offload_options(command: F) -> Callable[..., int]:
    """Adds the options, and passes them on as one argument, `offload`."""

    @functools.wraps(command)
    def wrapped(
        *args: Any,
        ram_budget: str | None,
        tier: str,
        slots: str,
        linears: str,
        policy: str,
        prefetch: str,
        raw: Path | None,
        coarse: Path | None,
        coarse_above: float,
        skip_above: float | None,
        skip: str | None,
        calibration: Path | None,
        dtype: str,
        device: str,
        **options: Any,
    ) -> int:
        check_skip(skip, calibration)
        offload = {"ram_budget": ram_budget, "tier": tier, "slots": slots, "linears": linears,
                   "policy": policy, "predictor": prefetch, "raw": raw, "coarse": coarse,
                   "coarse_above": coarse_above, "skip_above": skip_above, "skip": skip,
                   "calibration": calibration, "dtype": dtype, "device": device}  # fmt: skip
        return command(*args, offload=offload, **options)

    found: Callable[..., int] = wrapped
    for option in reversed(_OPTIONS):
        found = option(found)
    return found


def load_offloaded(src: str, offload: dict[str, Any], output: Output) -> Offloaded:
    """`moebound.load`, and a note on what was chosen. Raises CheckpointError without tokenizer."""
    # Threads of torch that spin while they wait would keep decoding from the cores; it is read
    # once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from moebound.errors import CheckpointError
    from moebound.offload.loading import load

    output.note(f"loading {src}")
    offloaded = load(src, **offload)
    try:
        if offloaded.tokenizer is None:
            raise CheckpointError(
                f"{src}: it has no tokenizer; expected tokenizer.json or its like"
            )
    except CheckpointError:
        offloaded.close()
        raise
    for line in choice_lines(offloaded):
        output.note(line)
    return offloaded


_PLACES = {"disk": "on disk", "ram": "in RAM", "device": "compressed in the GPU's memory"}


def choice_lines(offloaded: Offloaded) -> list[str]:
    """What was chosen at load and what it is expected to cost, for people."""
    choice = offloaded.choice
    speeds, where = choice.speeds, _PLACES[choice.tier]
    if choice.tier == "device":
        where = f"{choice.on_device} {where}, {wording.n_bytes(choice.held_bytes)}"
        if choice.rest is not None:
            where += f", the others {_PLACES[choice.rest]}"
    read = "" if speeds.link is None else f"reading {wording.n_bytes(speeds.link)}/s"
    decode = "" if speeds.decode is None else f"decoding {speeds.decode / 1e6:.0f} Mweights/s"
    ways = ", ".join(f"{1e3 * seconds:.1f} ms ({name})"
                     for name, seconds in choice.predicted_s.items())  # fmt: skip
    costs = choice.costs
    # What Python does is assumed for layers of a real model's size; small ones take less of it.
    small = costs.decode_s + costs.compute_s < SMALL_S
    refused = "".join(f"; {n} of them {why}" for why, n in choice.not_codes.items())
    held = ", ".join(f"{n} {as_what}" for as_what, n in choice.linears.items())
    values = choice.not_code_linears.items()
    wide = "".join(f"; {n} of the coded matrices as {why}" for why, n in values)
    return [
        f"experts: {choice.source}, {where}, {wording.n_bytes(choice.expert_bytes)}; "
        f"{wording.n_bytes(choice.cache_bytes)} for decoded ones, as {choice.slots}{refused}",
        f"linear layers that are no expert's: {held or 'small ones only'}{wide}; all that is no "
        f"expert's takes {wording.n_bytes(choice.other_bytes)}",
        f"measured: {', '.join(filter(None, (read, decode)))}",
        f"predicted, a token: {ways}; at a hit ratio of {choice.expected_hit_ratio:.2f}"
        + (
            "; experts are so small here that a token may take a third of it, or several times it"
            if small
            else ""
        ),
    ]


def time_spent(stats: dict[str, Any], total_s: float) -> dict[str, Any]:
    """Where so many seconds of generating went, JSON-ready: parts that add up to total_s.

    stats: of `Offloaded.stats`, of that time alone. waiting_s: for experts, by what was waited
    for. experts_s: computing them. handling_s: of the experts, what is neither. other_layers_s: the
    rest of the forward passes. outside_s: what is no forward pass.
    """
    waiting = dict(stats["stall_s"])
    handling = stats["experts_s"] - stats["compute_s"] - sum(waiting.values())
    # Clocks are read one after the other: a part may come out below 0 by that.
    return {
        "total_s": total_s,
        "waiting_s": waiting,
        "experts_s": stats["compute_s"],
        "handling_s": max(0.0, handling),
        "other_layers_s": max(0.0, stats["step_s"] - stats["experts_s"]),
        "outside_s": max(0.0, total_s - stats["step_s"]),
    }


def where_time_went(stats: dict[str, Any], total_s: float) -> str:
    """The same in plain words, with what was in memory."""
    spent, choice = time_spent(stats, total_s), stats["choice"]
    names = {
        "read": f"reading from {_TIERS[choice['tier']]}",
        "decode": "decoding" if choice["source"] == "compressed" else "putting them in place",
        "room": "a loading thread and a free place",
    }
    waited = sum(spent["waiting_s"].values())
    told = {cause: seconds(waiting) for cause, waiting in spent["waiting_s"].items()}
    causes = [f"{told[cause]} {name}" for cause, name in names.items() if told[cause] != seconds(0)]
    why = f" ({', '.join(causes)})" if causes else ""
    said = (
        f"Of {seconds(total_s)}, {seconds(waited)} were waiting for experts{why}, "
        f"{seconds(spent['experts_s'])} computing experts, {seconds(spent['handling_s'])} handing "
        f"them over, {seconds(spent['other_layers_s'])} attention and the other layers, and "
        f"{seconds(spent['outside_s'])} everything else, such as choosing tokens."
    )
    accesses = sum(stats["tiers"].values())
    if not accesses:
        return f"{said} No expert was asked for."
    held = wording.percent(stats["tiers"]["decoded"], accesses)
    return f"{said} {held} of the experts asked for were in memory, ready to compute with."


_TIERS = {"disk": "disk", "ram": "RAM"}


def seconds(value: float) -> str:
    """To a hundredth, as parts of a few seconds are told; to a tenth from ten on."""
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s"


def stats_facts(stats: dict[str, Any]) -> list[tuple[str, str]]:
    """What a run did, a name and a value each."""
    tiers, stall, prefetch = stats["tiers"], stats["stall_s"], stats["prefetch"]
    accesses = sum(tiers.values())
    each = stats["seconds_per_step"]
    rows = [
        ("experts asked for", f"{accesses}, " + ", ".join(
            f"{wording.percent(n, accesses)} {tier}" for tier, n in tiers.items())),
        ("moved", f"{wording.n_bytes(stats['bytes_moved'])} in {stats['loads']} loads, "
                  f"{stats['evictions']} evictions"),
        ("waited for", ", ".join(f"{cause} {s:.3f} s" for cause, s in stall.items())),
        ("computed", f"experts {stats['compute_s']:.3f} s, everything {stats['step_s']:.3f} s"),
    ]  # fmt: skip
    if each is not None:
        rows.append(("forward pass", f"{1e3 * each:.2f} ms on average, {stats['steps']} passes"))
    if any(stats["fallback"].values()):
        coarse, skipped = stats["fallback"]["coarse"], stats["fallback"]["skipped"]
        rows.append(("fallback", f"{coarse} coarse copies, {skipped} experts left out"))
    if "skipping" in stats:
        rows.append(skipping_fact(stats["skipping"]))
    if prefetch["predictor"] != "none":
        state = "on" if prefetch["active"] else "switched off: it did not pay"
        precision, recall = (
            "-" if prefetch[name] is None else f"{prefetch[name]:.2f}"
            for name in ("precision", "recall")
        )
        name = prefetch["predictor"]
        rows.append(("prefetch", f"{name}, precision {precision}, recall {recall}; {state}"))
    return rows


def skipping_fact(found: dict[str, Any]) -> tuple[str, str]:
    """What a policy skipped, as `Skipped.to_json` has it."""
    share = wording.percent(found["skipped"], found["pairs"])
    coarse = f", {wording.percent(found.get('coarse', 0), found['pairs'])} coarse"
    coarse *= "coarse" in found
    return ("skipped", f"{share} of {found['pairs']} pairs of a token and an expert{coarse}, by "
            f"{found['policy']}")  # fmt: skip
