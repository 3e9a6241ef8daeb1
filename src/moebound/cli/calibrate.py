"""`moebound calibrate`: what every expert gets as inputs on a text."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moebound.cli import exits, wording
from moebound.cli.hands import everywhere, hire, works_in_parts
from moebound.cli.options import BoundValue, check_text, reads_a_text
from moebound.cli.output import Output, output_options
from moebound.cli.steps import step_bar

if TYPE_CHECKING:
    from moebound.calibrate import Statistics
    from moebound.files.formats.statistics import Moments
    from moebound.tasks.base import Task

HELD_OUT = 500


@click.command()
@click.argument("src")
@reads_a_text(least_window=1)
@click.option("--self-sample", "sampled", is_flag=True,
              help="Let SRC make the text itself: beam search from random tokens, by probability "
              "and by how evenly experts are used (MoEQuant's EBSS). --limit sequences [128] of "
              "--window tokens [512] at most, kept in STATS/text.json.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), metavar="N",
              help="Of the tokens that --self-sample begins with.  [default: 0]")  # fmt: skip
@click.option("--beams", type=click.IntRange(1, 64), metavar="N",
              help="Texts that --self-sample keeps of each sequence.  [default: 4]")  # fmt: skip
@click.option("--tau", type=BoundValue(), metavar="T",
              help="How little evenness counts beside probability, with --self-sample.  "
              "[default: 1.2]")  # fmt: skip
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), required=True,
              metavar="STATS", help="The folder to write.")  # fmt: skip
@click.option("--skip", type=click.IntRange(min=0), metavar="N",
              help="Leave the first N problems for measuring.  [default: 500 where --limit "
              "problems are left behind them, else 0]")  # fmt: skip
@click.option("--diagonal", is_flag=True,
              help="Keep the diagonal of H alone: smaller by a factor of a thousand, enough for "
              "steps by input channel.")  # fmt: skip
@click.option("--all-tokens", is_flag=True,
              help="Show every token to every expert, not only to those that it is sent to: slow, "
              "and no expert is left without.")  # fmt: skip
@click.option("--fisher", is_flag=True,
              help="Weigh tokens and rows by what the model's predictions feel of them: read the "
              "text backward too, three times the work. Nearer to the model over all tokens, "
              "with plans by it.")  # fmt: skip
@click.option("--answer-weight", type=BoundValue(), metavar="W",
              help="With --fisher and --task: let the KL of answers count W times that of "
              "prompts.  [default: 1]")  # fmt: skip
@click.option("--search", is_flag=True,
              help="Search, for every number of experts, which of a layer's change its output "
              "least when the others are left out; method lu_re needs it. Slow.")  # fmt: skip
@click.option("--affinity", is_flag=True,
              help="Sum up g x xᵀ as well, with the router's weight and not its square, which "
              "method moequant_re:...:affinity rounds by: twice the size.")  # fmt: skip
@click.option("--after", metavar="METHOD",
              help="Of the model as METHOD leaves it to its coder: experts left out "
              "(reap_re:keep6), merged (hc_smoe_fixed:keep4), cut (modegpt_re:k0.8). Needs "
              "--calibration.")  # fmt: skip
@click.option("--calibration", type=click.Path(path_type=Path), metavar="STATS",
              help="What --after chooses by: statistics of the whole model.")  # fmt: skip
@click.option("--memory", metavar="SIZE", default="1GiB", show_default=True,
              help="Hold so much of H at once; less: the text is read more often.")  # fmt: skip
@works_in_parts("a model of its own")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
              default="float32", show_default=True, help="What to compute with.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True,
              help="Where: cpu, cuda, or auto for all there are.")  # fmt: skip
@output_options
def calibrate(
    output: Output,
    src: str,
    task: str | None,
    text: Path | None,
    out: Path,
    limit: int | None,
    skip: int | None,
    window: int | None,
    sampled: bool,
    seed: int | None,
    beams: int | None,
    tau: float | None,
    diagonal: bool,
    all_tokens: bool,
    fisher: bool,
    answer_weight: float | None,
    search: bool,
    affinity: bool,
    after: str | None,
    calibration: Path | None,
    memory: str,
    workers: int,
    ray_address: str | None,
    dtype: str,
    device: str,
) -> int:
    """Sum up what the experts of SRC, a checkpoint or a store, get as inputs on a text: a task's, a
    file's, or one that it makes itself.

    For every routed expert: how many tokens it gets, and the second moments of what its
    projections get (H, which methods that round by activations need). The text is read several
    times where H does not fit in memory.

    Killed and started again, it goes on from where it was.
    """
    check_text(task, text, skip=skip, window=window, sampled=sampled)
    if not sampled and any(value is not None for value in (seed, beams, tau)):
        raise click.UsageError("--seed, --beams and --tau go with --self-sample")
    if fisher and all_tokens:
        raise click.UsageError(
            "--fisher and --all-tokens do not go together: the loss feels "
            "nothing of tokens that are not sent to an expert"
        )
    if answer_weight is not None and not (fisher and task is not None):
        raise click.UsageError(
            "--answer-weight goes with --fisher and --task, which says what an answer is"
        )
    if (after is None) != (calibration is None):
        raise click.UsageError("--after and --calibration go together")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from moebound.calibrate import Settings, collect, edit_model, of_file, of_task
    from moebound.calibrate.beams import BEAMS, TAU, Search
    from moebound.calibrate.collect import UNFINISHED, reader
    from moebound.calibrate.self_sampling import SEQUENCES, Sampling, length_of, self_sample
    from moebound.evaluate.loading import load
    from moebound.files.formats.statistics import read_statistics
    from moebound.jobs.workers import Opening
    from moebound.model.fingerprint import of_corners
    from moebound.model.live import live_experts
    from moebound.offload.budget import parse_size
    from moebound.tasks import get_task

    room = parse_size(memory, what="--memory")
    asked = None if task is None else get_task(task)
    loaded = load(src, dtype=dtype, device=device)
    if sampled:
        length = length_of(loaded, window)
        search_for = Search(length, beams=beams or BEAMS, tau=tau or TAU)
        sampling = Sampling(limit or SEQUENCES, seed or 0, search_for)
        with step_bar(output) as say:
            read = self_sample(loaded, sampling, out, say)
    elif text is not None:
        read = of_file(loaded, text, limit, window=window)
    else:
        assert asked is not None
        read = of_task(loaded, asked, limit, skip=_held_out(asked, limit) if skip is None else skip)
    fingerprint = of_corners(live_experts(loaded.model))
    if after is not None and calibration is not None:
        after = edit_model(loaded.model, after, read_statistics(calibration))
    moments: Moments = "diagonal" if diagonal else "full"
    settings = Settings(
        not all_tokens, moments, room, search, after, affinity, fisher, answer_weight or 1.0,
        fingerprint,
    )  # fmt: skip
    hands_of = hire(workers, ray_address, device=device)
    with step_bar(output) as say, ExitStack() as stack:
        hands = None
        if hands_of is not None:
            # Sums depend on the number of threads, so a worker has as many as this process.
            setup = Opening(reader, {
                "src": everywhere(src), "dtype": dtype, "device": device, "text": read,
                "out": out.resolve(), "settings": settings,
                "edited_by": None if calibration is None else calibration.resolve(),
                "fingerprint": fingerprint,
            }, threads=torch.get_num_threads())  # fmt: skip
            hands = stack.enter_context(hands_of(setup))
        if (out / UNFINISHED).is_file():
            output.note(f"resumed: going on with what is finished in {out}")
        found = collect(loaded, read, out, settings, say, hands)
    document = _document(found)
    output.result(document, _table(found, document))
    return exits.OK


def _held_out(task: Task, limit: int | None) -> int:
    """Problems in front that are left for measuring, as `eval` and `bench` begin with the first."""
    wanted = HELD_OUT + (limit or 1)
    return HELD_OUT if len(task.problems(wanted)) == wanted else 0


def _document(found: Statistics) -> dict[str, Any]:
    from moebound.files.formats.statistics import FEW_TOKENS

    tokens = sorted(found.tokens().values())
    return found.of.to_json() | {
        "ok": True,
        "output": str(found.folder),
        "n_bytes": found.n_bytes,
        "experts": len(tokens),
        "experts_without_tokens": sum(n == 0 for n in tokens),
        "experts_with_few_tokens": sum(0 < n < FEW_TOKENS for n in tokens),
        "tokens_an_expert": {
            "least": tokens[0],
            "median": tokens[len(tokens) // 2],
            "most": tokens[-1],
        },
    }


def _table(found: Statistics, said: dict[str, Any]) -> Any:
    from moebound.files.formats.statistics import FEW_TOKENS

    of, tokens = found.of, said["tokens_an_expert"]
    return wording.facts(
        of.model,
        [
            ("text", f"{of.text}: {of.n_sequences} sequences, {of.n_tokens} tokens"),
            ("text's hash", of.text_sha256[:16]),
            ("experts", f"{said['experts']}, inputs of {of.width} channels, hidden {of.inner}"),
            ("tokens an expert", f"{tokens['least']} to {tokens['most']}, median "
                                 f"{tokens['median']}"),
            ("without any token", str(said["experts_without_tokens"])),
            (f"with fewer than {FEW_TOKENS}", str(said["experts_with_few_tokens"])),
            ("second moments", ("whole" if of.moments == "full" else "diagonals")
                               + (", by g as well as by g²" if of.affinity else "")),
            ("tokens weighted by", "what the loss feels (Fisher)" if of.fisher else "gates"),
            *([("answers count", f"{of.answer_weight:g} times")] if of.answer_weight != 1 else []),
            *([("after", of.after)] if of.after else []),
            ("written", f"{found.folder}, {wording.n_bytes(found.n_bytes)}"),
        ]
    )  # fmt: skip
