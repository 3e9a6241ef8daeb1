"""Sections on the stores: the plan, sizes and losses, verification, answers, speeds."""

from __future__ import annotations

from html import escape

from moebound.demo import plots
from moebound.demo.columns import KL_DIGITS, kept_over_asked, speed_columns, store_columns
from moebound.demo.page_parts import grouped_table
from moebound.demo.report import Report, StoreRow, kept_rate
from moebound.page.parts import code, figure, how, plain_table, section
from moebound.score import kl_lines


def first_row(report: Report) -> StoreRow | None:
    """The row that the page speaks of first: the first lossy codec near the kept rate."""
    lossy = [row for row in report.rows if row.rate is not None and not row.planned]
    if not lossy:
        return None
    rate = kept_rate([row.rate for row in lossy if row.rate is not None])
    return next(row for row in lossy if row.rate == rate)


def times(planned: StoreRow, uniform: StoreRow) -> str:
    """ "<b>0.63 times as far</b> on the solutions' tokens, 2.4 times on all text", and whether the
    errors of both allow to say so."""
    said = []
    for name, where in (("answer_kl", "on the solutions' tokens"), ("kl", "on all text")):
        values, errors = (
            [getattr(row.score, name + end) for row in (planned, uniform)]
            for end in ("_nats", "_stderr")
        )
        apart, error = abs(values[0] - values[1]), (errors[0] ** 2 + errors[1] ** 2) ** 0.5
        doubt = "" if apart > 2 * error else ", within the error of measurement"
        said.append(f"<b>{values[0] / values[1]:.2f} times as far</b> {where}{doubt}")
    return " and ".join(said)


def plan(report: Report) -> str:
    if not report.plans:
        return ""
    rates = [row.rate for row in report.rows if row.planned and row.rate is not None]
    rate = kept_rate(rates)
    stored = next(row for row in report.rows if row.planned and row.rate == rate)
    chosen = report.plans[stored.name]
    uniform = report.row(stored.codec, rate)
    assert uniform is not None
    values = sorted(bound.value for bound in chosen.bounds)
    sizes = [
        (row.title, f"{report.plans[row.name].bits_per_weight:.4f}" if row.planned else "",
         f"{row.expert_bits_per_weight:.4f}",
         f"{row.predicted_bytes:,}" if row.predicted_bytes is not None else "",
         f"{row.expert_bytes:,}", *(text for _, text in kl_lines(row.score, KL_DIGITS)))
        for row in (uniform, stored)
    ]  # fmt: skip
    source = report.model.name
    return section(
        "plan",
        "The plan: bytes where errors hurt",
        "<p>One bound for all experts spends bytes where nobody feels the error. So it was "
        "predicted for every expert what its compression does to the model (from "
        f"{report.map_problems} problems that nothing else on this page uses), and the bytes "
        "were divided so that the sum of losses is least. The plan gets as many bytes as one bound "
        f"for all takes at rate {rate:g}; its bounds go from {values[0]:.2g} to "
        f"{values[-1]:.2g}.</p>",
        figure(
            plots.plan_picture(chosen, rate),
            "The bound of every expert, over the one rate for all. Red: kept closer; blue: let "
            "farther.",
            wide=True,
        ),
        plain_table(
            (
                "",
                "bits, predicted",
                "bits, real",
                "bytes, predicted",
                "bytes, real",
                *(field.title for field, _ in kl_lines(stored.score)),
            ),
            sizes,
        ),
        "<p>At the same bytes, and beside the uniform store, the planned one's predictions are "
        f"{times(stored, uniform)} from the original's.</p>"
        f'<p class="note">KL in nats a token, ± standard error, on {report.n_problems} problems. A '
        "plan protects what its map measured: all that the model read, the problems' own text as "
        "well as the solutions.</p>",
        how(
            f"moebound sensitivity {source} --task {report.task} --skip {report.n_problems} "
            f"--limit {report.map_problems} --rates {','.join(f'{r:g}' for r in report.map_rates)} "
            "--measure none --ties 0 -o map.json",
            f"moebound plan {source} --sensitivity map.json "
            f"--bpw {chosen.budget['bpw']:.4f} -o plan.json",
            f"moebound compress {source} planned --plan plan.json",
        ),
    )


def table(report: Report) -> str:
    series = plots.series_of(report)

    def swatch(row: StoreRow) -> str:
        kind = f" s{series[row.title] % 8}" if row.title in series else ""
        return f'<span class="swatch{kind}"></span>'

    shown = grouped_table(
        store_columns(report),
        report.rows,
        group_of=lambda row: row.title,
        first=swatch,
        broken=lambda row: not row.verified,
    )
    total = report.original[report.task].total
    first = first_row(report) or report.rows[0]
    rate = "" if first.rate is None else f" --rate {first.rate:g}"
    source = report.model.name
    return section(
        "stores",
        "The compressed models, side by side",
        "<p>Each line is a checkpoint on disk, verified against the original, loaded with "
        "<code>AutoModelForCausalLM.from_pretrained</code> and compared with the original on "
        f"{report.n_problems} problems.</p>",
        shown,
        '<p class="note"><b>rate</b>: no weight moves by more than so many times the mean |weight| '
        "of its expert. <b>kept/asked</b>: the largest error of any weight, after rounding to "
        "bf16, over the error allowed; above 1 would be a broken promise. <b>experts</b>, "
        "<b>MB</b>: all bytes of the compressed experts. <b>model</b>: the weight files whole, "
        "with headers and all that was not compressed. <b>KL</b>: how far the distribution of the "
        "next token moved, KL(original || compressed), over the tokens of the reference solutions, "
        "and over all tokens, prompts included (float32). <b>same top token</b>: the most likely "
        "one is the original's, over the solutions' tokens. <b>right</b>: greedy "
        f"answers that are right in any format; the original has {total.pia}. <b>lost</b>, "
        "<b>gained</b>: problems that only the original, only the store solves. "
        f"{_sz3_note(report)}</p>",
        _plots(report),
        how(
            f"moebound compress {source} small{rate} --codec {first.codec}",
            f"moebound verify small --against {source}",
            f"moebound eval {source} --task {report.task} --limit {report.n_problems} "
            "--answers original.jsonl",
            f"moebound eval small --task {report.task} --limit {report.n_problems} "
            "--baseline original.jsonl",
            f"moebound bench quality {source} --task {report.task} --sensitivity map.json "
            "--quantizers rtn:int4:g64",
        ),
    )


def _sz3_note(report: Report) -> str:
    if not any(row.codec == "sz3" for row in report.rows):
        return ""
    return (
        "<b>sz3</b>, <b>zfp</b>: the real libraries, patched where rounding to bf16 would break "
        "the bound (sz3 without prediction, its smallest on weights)."
    )


def _plots(report: Report) -> str:
    if not any(row.rate is not None and row.score.answer_kl_nats > 0 for row in report.rows):
        return ""
    return (
        '<div class="plots">'
        + figure(
            plots.rate_against_kl(report),
            "A larger bound moves the model farther. Codecs with the same bound do about the same "
            "damage, less where they keep well within it: what differs is the size. Bars: two "
            "standard errors.",
        )
        + figure(
            plots.bits_against_kl(report),
            "The same stores by size: lower and farther left is better. Between the curves is what "
            "better coding and better planning save.",
        )
        + "</div>"
    )


def verified(report: Report) -> str:
    stores, tensors = len(report.rows), sum(row.n_tensors for row in report.rows)
    worst = max(report.rows, key=lambda row: row.worst)
    damage = report.damage
    found = (
        f"it says <q>{escape(damage.said)}</q> of {code(damage.tensor)}"
        if damage.said
        else "it says nothing, which is wrong"
    )
    source = report.model.name
    return section(
        "verified",
        "Checked, not believed",
        f"<p>{stores} stores with {tensors:,} tensors were read again: every hash compared, every "
        "expert decoded, every weight measured against the original in float64, after the cast to "
        f"the dtype the model uses. The largest error is {kept_over_asked(worst.worst)} of what "
        f"was allowed ({code(worst.name)}). When one bit of a copy of {code(damage.store)} is "
        f"turned over, {found}.</p>",
        how(f"moebound verify small --against {source}"),
    )


def samples(report: Report) -> str:
    if not report.samples:
        return ""
    body = "\n".join(
        '<tr class="first">'
        + "".join(f"<td>{escape(t)}</td>" for t in (s.prompt, s.original, s.compressed))
        + "</tr>"
        for s in report.samples
    )
    return section(
        "answers",
        "Where it begins to hurt",
        "<p>Greedy answers at the coarsest bound, chosen to show the effect: the first problem "
        "that stays right, then the first ones that only the original solves.</p>",
        '<div class="scroll"><table class="text">\n<thead><tr><th>problem</th><th>original</th>'
        f"<th>{escape(report.samples_of)}</th></tr></thead>\n<tbody>\n{body}\n"
        "</tbody></table></div>",
    )


def speeds(report: Report) -> str:
    found = report.speeds
    if not found.rows:
        return ""
    rows, cols = found.rows[0].shape
    before, after = found.memcpy_gb_per_s
    ordered = sorted(found.rows, key=lambda row: (row.asked != found.rows[0].asked, row.asked))
    shown = grouped_table(speed_columns(found), ordered, group_of=lambda row: row.asked)
    rates = ",".join(f"{rate:g}" for rate in dict.fromkeys(row.rate for row in found.rows))
    codecs = ",".join(dict.fromkeys(row.asked for row in found.rows))
    return section(
        "speeds",
        f"Speed, on a matrix of {rows} x {cols}",
        "<p>As large as one expert matrix of a 16-billion-parameter model: synthetic bf16 values, "
        "rows of unequal scale as in trained weights. Fixed costs per matrix disappear here, in "
        "size and in speed. One thread, from memory to memory, in 10<sup>9</sup> weights a second; "
        "the checksum, the exact patch and (when encoding) the check of the bound are in it. In "
        f"the same run memcpy wrote {min(before, after):.1f} to {max(before, after):.1f} GB/s, "
        "which is as fast as bf16 weights could be written at all.</p>",
        shown,
        '<p class="note"><b>entropy</b>: of an ideal uniform quantizer that treats all weights '
        "alike; knowing which rows are small allows less. <b>of memcpy</b>: decoded bytes a "
        "second, over memcpy's. <code>sz3</code> is the smallest of its algorithms in each "
        "line.</p>",
        how(
            f"moebound bench codec --rates {rates} --codecs {codecs} --threads 1",
            f"moebound bench codec --input {report.model.name}",
        ),
    )
