"""Every conclusion and open question of the paper, judged by one study.

A conclusion is judged twice: with the paper's own simulated errors, and with a real codec's. The
first is the like-for-like verdict; the second says what it means for compression.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moebound.paper.report import by_layer
from moebound.paper.report import rules_conclusions as first
from moebound.paper.report import rules_other as other
from moebound.paper.report import rules_questions as questions
from moebound.paper.report.claims import CLAIMS, Claim
from moebound.paper.report.evidence import Finding, Outcome
from moebound.paper.report.scene import Scene
from moebound.paper.report.suite import Suite

BY_SOURCE: dict[str, Callable[[Scene], Finding]] = {
    "rare-expert-harmless": first.rare_expert_harmless,
    "used-expert-robust": first.used_expert_robust,
    "format-first": first.format_first,
    "rerouting": other.rerouting,
    "use-decides": first.use_decides,
    "non-monotonic": first.non_monotonic,
    "middle-most-sensitive": first.middle_most_sensitive,
    "shallow-harmless": first.shallow_harmless,
    "shallow-like-middle": first.shallow_like_middle,
    "protect-early": first.protect_early,
    "deep-errors-help": first.deep_errors_help,
    "errors-add-up": first.errors_add_up,
    "layer-collapses": first.layer_collapses,
    "groups-fall-silent": other.groups_fall_silent,
    "groups-worse-than-one": first.groups_worse_than_one,
    "cascade": other.cascade,
    "harder-task-suffers": other.harder_task_suffers,
}
ONCE: dict[str, Callable[[Suite], Finding]] = {
    "randomised-expert-fatal": lambda s: first.randomised_expert_fatal(Scene(s, s.simulation)),
    "few-experts-work": other.few_experts_work,
    "harder-task-more-experts": other.harder_task_more_experts,
    "error-is-normal": other.error_is_normal,
    "gaussian-sd-predicts": lambda s: questions.predicts(s, "gaussian-sd"),
    "gaussian-var-predicts": lambda s: questions.predicts(s, "gaussian-var"),
    "gaussian-power-predicts": lambda s: questions.predicts(s, "gaussian-power"),
    "uniform-predicts": lambda s: questions.predicts(s, "uniform"),
    "where-most-sensitive": by_layer.most_sensitive,
    "deep-gain-by-magnitude": questions.deep_gain_by_magnitude,
    "overlap": lambda s: questions.never("A study of errors does not measure time."),
    "better-than-quantization": lambda s: questions.never(
        "A study has no quantizer in it; `moebound bench quality` compares at equal bytes."
    ),
}
FROM_OTHERS = {"generalises": questions.generalises}


@dataclass(frozen=True)
class Verdict:
    """finding: by the paper's simulation, or the only one there is. real: by a real codec, None
    where the claim is not about an error source, or no codec was run."""

    claim: Claim
    finding: Finding
    real: Finding | None

    @property
    def outcome(self) -> Outcome:
        return self.finding.outcome

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self.claim),
            **self.finding.to_json(),
            "real_codec": None if self.real is None else self.real.to_json(),
        }


def judge(suite: Suite) -> tuple[Verdict, ...]:
    """All verdicts. Also seals the suite: every comparison on the page is corrected together."""
    suite.ask_tables()
    _findings(suite)  # asks; what it finds is not corrected yet
    suite.seal()
    found, real = _findings(suite)
    return tuple(Verdict(claim, found[claim.id], real.get(claim.id)) for claim in CLAIMS)


def _findings(suite: Suite) -> tuple[dict[str, Finding], dict[str, Finding]]:
    simulated, codec = Scene(suite, suite.simulation), suite.codec
    found = {name: rule(simulated) for name, rule in BY_SOURCE.items()}
    found |= {name: rule(suite) for name, rule in ONCE.items()}
    real: dict[str, Finding] = {}
    if codec is not None:
        real = {name: rule(Scene(suite, codec)) for name, rule in BY_SOURCE.items()}
    for name, rule in FROM_OTHERS.items():
        found[name] = rule(found)
        if real:
            real[name] = rule(real)
    return found, real
