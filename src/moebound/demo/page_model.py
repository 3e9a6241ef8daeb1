"""Sections on the model: what it solves, which experts it uses, and where errors hurt it."""

from __future__ import annotations

from html import escape

from moebound.demo.report import Report
from moebound.page import inline
from moebound.page.parts import code, facts, figure, how, interval, plain_table, section
from moebound.paper.report import page_verdicts, plots
from moebound.paper.report.by_layer import whole_layers
from moebound.paper.report.cells import source_name
from moebound.profile import figures
from moebound.profile.profile import balance_of


def model(report: Report) -> str:
    m = report.model
    about = {
        "model": f"{m.name}, architecture {m.model_type}",
        "parameters": f"{m.n_parameters:,}; {m.expert_weights:,} of them in experts "
        f"({100 * m.expert_weights / m.n_parameters:.0f} %)",
        "experts": f"{m.n_experts:,} in {m.n_moe_layers} MoE layers, "
        f"{m.experts_per_token} chosen per token",
        "weight file": f"{m.weight_file_bytes / 1e6:.1f} MB in bf16",
    }
    rows = []
    for task, found in report.original.items():
        total = found.total
        rows.append((task, str(total.n), interval(total.ica_share), interval(total.pia_share)))
    shown = report.samples[0] if report.samples else None
    example = (
        f"<blockquote><p>{escape(shown.prompt)}</p><p><b>{escape(shown.original)}</b></p>"
        "</blockquote>"
        if shown
        else ""
    )
    return section(
        "model",
        "The model and its task",
        facts(about),
        "<p>It solves word problems, and each says in which format the answer is to be written. "
        "One of them, with what the model answers:</p>",
        example,
        plain_table(("task", "problems", "ICA (95 % interval)", "PIA (95 % interval)"), rows),
        '<p class="note"><b>ICA</b>, instruction compliance accuracy: the right answer in the '
        "format asked. <b>PIA</b>, pure inference accuracy: the right answer in any format. "
        f"Everything below is measured on {code(report.task)}, where the model has something to "
        "lose.</p>",
        how(
            *(
                f"moebound eval {m.name} --task {task} --limit {found.total.n}"
                for task, found in report.original.items()
            )
        ),
    )


def routing(report: Report) -> str:
    use = report.profile.tasks[0]
    known = [found for found in map(balance_of, use.layers) if found is not None]
    shares = [layer.frequencies for layer in use.layers]
    even = use.layers[0].top_k / use.layers[0].n_experts
    most = max(float(share.max()) for share in shares)
    unused = sum(int((layer.counts == 0).sum()) for layer in use.layers)
    drawn = [
        figure(
            inline(
                figures.heatmap(use), name="use", colors=figures.PAGE_COLORS,
                alt="Share of tokens that chose each expert, by layer and expert",
            ),
            "Every expert of every layer. Dark: many tokens pass through it; the palest are hardly "
            "chosen. Columns mean nothing: expert 7 of one layer is not expert 7 of the next.",
            wide=True,
        ),
        figure(
            inline(
                figures.balance_by_layer(use), name="balance", colors=figures.PAGE_COLORS,
                alt="Balance of the use of experts, by layer",
            ),
            "How evenly each layer's experts are used. Dashed: the imbalance that chance alone "
            "would give.",
            wide=True, narrow=True,
        ),
    ]  # fmt: skip
    none = "none is never chosen" if not unused else f"{unused} are never chosen"
    return section(
        "routing",
        "Which experts its tokens go to",
        f"<p>In every layer a router sends each token to {report.model.experts_per_token} of "
        f"{use.layers[0].n_experts} experts. Used evenly, each would see {100 * even:.1f} % of the "
        f"tokens. On this task the most used one sees {100 * most:.0f} %, and {none}; the Gini "
        f"coefficient is {min(b.gini for b in known):.2f} to {max(b.gini for b in known):.2f} "
        "(0: all alike, 1: one does all). An expert that sees many tokens has more occasions to do "
        "damage, which a plan can take into account.</p>",
        *drawn,
        how(
            f"moebound profile {report.model.name} --task {report.task} --limit {use.n_sequences} "
            f"--read {use.text} -o profile.json --figures figures"
        ),
    )


def sensitivity(report: Report) -> str:
    study, task = report.study, report.task
    counts = study.counts
    decided = [
        v for v in study.verdicts
        if v.claim.kind == "conclusion"
        and (v.outcome != "open" or (v.real is not None and v.real.outcome != "open"))
    ]  # fmt: skip
    rest = [v for v in study.verdicts if v.claim.kind == "conclusion" and v not in decided]
    open_ones = "".join(
        f"<li>{escape(v.claim.text)} <small>{escape(v.finding.why)}</small></li>" for v in rest
    )
    unfold = (
        f"<details><summary>{len(rest)} conclusions that so quick a look leaves open"
        f"</summary><ul>{open_ones}</ul></details>"
        if rest
        else ""
    )
    layers = {layer for at in whole_layers(study.suite).values() for layer in at}
    heat = plots.heat_map(study.suite, task)
    spread = plots.propagation(
        [
            cell for source in (study.suite.simulation, study.suite.codec) if source
            for cell in study.suite.table("6", source)
        ],
        study.study.layers,
        task,
    )  # fmt: skip
    answered = sum(bool(row.n) for row in study.study.rows)
    return section(
        "study",
        "Where errors hurt",
        "<p>Errors were put into experts, one place after another: simulated ones as in the paper "
        '<a href="https://arxiv.org/abs/2509.07727">MoE-Compression</a> (Gaussian noise as large '
        "as the bound) and the real errors of the codec. Each time the model read the problems' "
        "solutions, and it was measured how far its predictions of the next token moved (KL "
        f"divergence); in {answered} of {len(study.study.rows)} places it also answered "
        f"{study.study.n_problems} problems.</p>",
        figure(
            heat,
            f"Each of {len(layers)} layers with an error in all of its experts, in all experts of "
            "no other. Bright: predictions move far; empty: not measured.",
            wide=True,
        )
        if heat
        else "",
        figure(
            spread,
            "Where an error goes. Left: how much what leaves each layer differs from what it was; "
            "right: how many of the routers' decisions change. Full: "
            f"{escape(source_name(study.suite.simulation))}; dashed: the real codec.",
            wide=True,
        )
        if spread
        else "",
        f"<h3>What the paper concludes, and what this model says</h3><p>It supports "
        f"{counts['supports']} of {sum(counts.values())} conclusions, contradicts "
        f"{counts['contradicts']}, and leaves {counts['open']} open. Open means that these few "
        "problems and draws of noise can say neither; suite <code>paper</code> asks 500 problems "
        "and takes hours. First badge: with the paper's simulated errors; dashed: with the real "
        "codec's.</p>",
        page_verdicts.cards(decided),
        unfold,
        how(
            f"moebound study {report.model.name} --suite {study.study.suite} --task {task} "
            "--workers 2 -o study",
            "moebound report study",
        ),
    )
