"""The paper's conclusions and open questions, each with the rule that decides it in plain words.

Takeaways are those of section 4, numbered there 1 to 8 ("nine key conclusions" are announced). Two
of them hold several; each is a claim of its own here. Mechanisms that no measurement of the suite
can reach ("shallow layers manage the attention mechanism") are judged by what they predict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moebound.paper.report.compare import ALPHA, MARGIN, NEAR, SEVERE

Kind = Literal["conclusion", "question"]
PTS = f"{100 * MARGIN:g} points"
SEVERE_PTS = f"{100 * SEVERE:g} points"
SIG = f"significant at {ALPHA:g} after Holm's correction"


@dataclass(frozen=True)
class Claim:
    """text: what the paper says, or asks. where: in the paper. rule: how it is decided here."""

    id: str
    kind: Kind
    where: str
    text: str
    rule: str


WORDS: dict[Kind, dict[str, str]] = {
    "conclusion": {"supports": "supported", "contradicts": "contradicted", "open": "left open"},
    "question": {"supports": "yes", "contradicts": "no", "open": "left open"},
}
"""What an outcome is called: conclusions are supported or not, questions answered."""


def _says(name: str, where: str, text: str, rule: str) -> Claim:
    return Claim(name, "conclusion", where, text, rule)


def _asks(name: str, where: str, text: str, rule: str) -> Claim:
    return Claim(name, "question", where, text, rule)


_WORSE = (
    f"Supported or contradicted by what is {SIG}, if it all points one way; by KL if no accuracy "
    "decides."
)

PREDICTS = (
    "KL of the simulation over KL of the codec in every condition that has both. Supported if the "
    f"mean ratio's interval (Student's, conditions a sample) lies within {1 / NEAR:g} and "
    f"{NEAR:g}, contradicted if it lies outside; the accuracies that differ significantly are "
    "counted beside it."
)

CLAIMS = (
    _says(
        "rare-expert-harmless", "section 3.2.1, takeaway 1",
        "An error in one rarely used expert changes neither the answers nor their format, at any "
        "of the bounds from 10 to 80 %.",
        f"Supported if every interval of the change in ICA and PIA lies within ±{PTS}; "
        f"contradicted by one significant drop of {PTS} or more.",
    ),
    _says(
        "randomised-expert-fatal", "section 3.2.1, takeaway 1",
        "Randomising that one expert makes the answers wrong: even experts that look unimportant "
        "are critical.",
        f"Supported if PIA falls by more than {SEVERE_PTS} beyond doubt (whole interval); "
        f"contradicted if the whole interval is above −{SEVERE_PTS}.",
    ),
    _says(
        "used-expert-robust", "section 3.2.2, Table 3, takeaway 2",
        "With a large error (50 or 80 %) in the most used expert of the first layer, reasoning "
        "(PIA) stays as good.",
        f"Supported if every interval of the change in PIA lies within ±{PTS}; contradicted by one "
        f"significant drop of {PTS} or more.",
    ),
    _says(
        "format-first", "section 3.2.2, Table 3, takeaway 2",
        "Errors disturb instruction following (ICA) before they disturb reasoning (PIA).",
        "Per problem, the change in ICA minus the change in PIA, in tables 3, 4 and 5 without the "
        "deep layers. " + _WORSE,
    ),
    _says(
        "rerouting", "section 3.2.2 (1)",
        "When the parameters of much used experts are distorted, the router reallocates their "
        "tokens to intact experts.",
        "The share of routing decisions that change in the perturbed layer itself, Table 3. "
        "Contradicted if none changes there (under 1 in 100,000), supported if more than 1 % do.",
    ),
    _says(
        "use-decides", "section 3.1",
        "Errors in much used experts hurt more than the same errors in rarely used ones.",
        "Table 3 against section 3.2.1 at equal bounds. " + _WORSE,
    ),
    _says(
        "non-monotonic", "section 3.2.3, Table 4, takeaway 3",
        "With depth, the effect of an error in the most used expert is not monotonic.",
        f"Table 4 (and 8), all pairs of layers: supported if some deeper layer hurts less and "
        f"another hurts more, both {SIG}; contradicted if each layer differs from the next in the "
        "same direction. In ICA, PIA, or, if neither decides, KL.",
    ),
    _says(
        "middle-most-sensitive", "section 3.2.3 to 3.6, Tables 4, 6, 7, 8, 9, takeaways 4 and 8",
        "The middle layers are the most sensitive: an error there costs the most reasoning.",
        "Middle against shallow, and middle against deep, in PIA, at equal bounds; both have to "
        "hold. " + _WORSE,
    ),
    _says(
        "shallow-harmless", "abstract, takeaways 6 and 8",
        "Bounded errors in shallow layers have only a minimal effect on accuracy.",
        f"Supported if every interval of the change in PIA lies within ±{PTS}, for tables 4 to 9; "
        f"contradicted by one significant drop of {PTS} or more. (The paper's own Table 6 has a "
        "drop of 25 points.)",
    ),
    _says(
        "shallow-like-middle", "takeaway 6",
        "On mathematical tasks, errors in shallow layers cost less than errors in the middle.",
        "Middle against shallow in PIA, tables 4, 6, 7, 8, 9. " + _WORSE,
    ),
    _says(
        "protect-early", "sections 3.3, 3.4, takeaway 5",
        "Shallow and middle layers deserve more protection than deep ones.",
        "Shallow against deep, and middle against deep, in PIA and ICA, tables 4 to 9; both have "
        "to hold. " + _WORSE,
    ),
    _says(
        "deep-errors-help", "sections 3.2.3, 3.3, 3.5, Tables 4, 5, 7, 8, takeaways 7 and 8",
        "Bounded errors in deep layers can improve accuracy, instruction following above all.",
        f"Supported by one gain in ICA or PIA that is {SIG}; contradicted if every interval "
        f"excludes a gain of {PTS}.",
    ),
    _says(
        "errors-add-up", "section 3.3, Table 5",
        "Errors in the six most used experts of a layer hurt more than in the most used one alone.",
        "Table 5 against Table 4 at the same layer and bound, PIA and ICA. " + _WORSE,
    ),
    _says(
        "layer-collapses", "section 3.4, Table 6",
        "With errors in all experts of one layer, instruction following declines sharply.",
        f"Table 6 without the last layer: supported if ICA falls by more than {SEVERE_PTS} beyond "
        f"doubt in every layer; contradicted if in one the whole interval is above −{SEVERE_PTS}.",
    ),
    _says(
        "groups-fall-silent", "section 3.5, Table 7",
        "80 % errors in the most used experts of ten layers leave a model that no longer answers.",
        "Supported if in every group fewer than 1 of 10 outputs are valid (upper end of Wilson's "
        "interval); contradicted if in one group more than half are (lower end).",
    ),
    _says(
        "groups-worse-than-one", "section 3.5, Table 7",
        "Errors in the most used experts of several layers hurt far more than in one layer.",
        "Table 7 against Table 4 at the same depth and bound, PIA and ICA. " + _WORSE,
    ),
    _says(
        "cascade", "sections 3.3, 3.4",
        "Errors are amplified, like a cascade, on their way through the layers behind.",
        "Relative change of the residual stream at the last layer over that at the perturbed one, "
        "tables 3 to 6: the mean over conditions, with Student's interval, against 1.",
    ),
    _says(
        "harder-task-suffers", "section 3.6, Tables 8 and 9",
        "On the harder task the same errors cost more.",
        "Change on the harder task minus change on the easier, PIA and ICA, Table 8 against 4 and "
        "9 against 7. Other problems, so unpaired. "
        f"Supported or contradicted by what is {SIG}, if it all points one way.",
    ),
    _says(
        "few-experts-work", "section 3.1, Figures 1 to 4",
        "Use of experts is far from even: a few carry most of the load.",
        "Gini coefficient of the counts in every layer: supported if all are above 0.3, "
        "contradicted if all are below 0.1.",
    ),
    _says(
        "harder-task-more-experts", "section 3.6, Figure 5",
        "The harder task engages more experts.",
        "Normalised entropy of the counts, hard minus easy, the layers a sample (Student's "
        "interval).",
    ),
    _says(
        "error-is-normal", "section 3.1, 3.2.1",
        "The error of error-bounded compressors with bound ε is distributed as N(0, ε).",
        "Of every real codec's error: no weight beyond ε and a root mean square below 0.7 ε "
        "contradict it (N(0, ε) has 32 % beyond ε and a root mean square of ε).",
    ),
    _asks(
        "gaussian-sd-predicts", "open question; section 3.1",
        "Does the paper's simulation, Gaussian noise of standard deviation ε, predict what a real "
        "codec with bound ε does?",
        PREDICTS,
    ),
    _asks(
        "gaussian-var-predicts", "open question; section 3.1",
        "Does it, if ε is read as the variance?",
        PREDICTS,
    ),
    _asks(
        "gaussian-power-predicts", "open question",
        "Does Gaussian noise of the real error's power (sd ε/√3)?",
        PREDICTS,
    ),
    _asks(
        "uniform-predicts", "open question",
        "Does noise uniform in the bound?",
        PREDICTS,
    ),
    _asks(
        "where-most-sensitive", "open question; takeaways 3 and 4",
        "Is the middle really the most sensitive?",
        "Every layer as a whole: geometric mean of KL over the middle layers against that over the "
        "shallow, and over the deep ones, at each source and bound, layers a sample. Yes where the "
        f"middle is above both, no where it is below one, {SIG}.",
    ),
    _asks(
        "deep-gain-by-magnitude", "open question; takeaway 7",
        "Do errors in deep layers help at any magnitude, beyond chance?",
        "For each bound, all deep conditions of all tables: the best gain in ICA or PIA, corrected "
        "for having looked at all. Answered yes by one significant gain, no if every interval "
        f"excludes a gain of {PTS}.",
    ),
    _asks(
        "generalises", "open question",
        "Do the paper's patterns (robust shallow, sensitive middle, gains from deep errors) hold "
        "for another model?",
        "By the three verdicts above on the shallow, middle and deep layers of this model: yes if "
        "all are supported, no if one is contradicted.",
    ),
    _asks(
        "overlap", "open question; section 1, third step",
        "How can decompression overlap with transfers, so that offloading pays?",
        "A study of errors does not measure time: always left open here.",
    ),
    _asks(
        "better-than-quantization", "section 1",
        "Are error-bounded compressors better than low-bit quantization at equal size?",
        "A study has no quantizer in it, so it is left open here; `moebound bench quality` "
        "measures it, at equal bytes.",
    ),
)  # fmt: skip


def claim(name: str) -> Claim:
    return next(entry for entry in CLAIMS if entry.id == name)
