"""docs/models.md says what the stored studies of the built-in models say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moebound.paper.report import Models, compare_models, make_report, read_study

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
SAYS = {"supports": "supported", "contradicts": "contradicted", "open": "left open"}
TOGETHER = {"all": "in all", "none": "in none", "differ": "differs", "open": ""}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models() -> Models:
    names = ("study-wordmath", "study-wordmath-mixtral")
    return compare_models(
        [make_report(read_study(ROOT / "bench" / "results" / name)) for name in names]
    )


def test_both_studies_are_whole(models: Models) -> None:
    for report in models.reports:
        assert not report.gaps
        assert (
            f"{len(report.study.rows)} of the" in TEXT or f"{len(report.study.rows)} cond" in TEXT
        )


def test_verdicts_of_the_page(models: Models) -> None:
    shown = {
        name: [cell.strip() for cell in rest.split("|")[:3]]
        for name, rest in re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", TEXT, re.MULTILINE)
    }
    conclusions = [entry for entry in models.judged if entry.claim.kind == "conclusion"]
    assert list(shown) == [entry.claim.id for entry in conclusions]
    for entry in conclusions:
        cells = [
            SAYS[outcome] + ("" if real in (None, outcome) else f" (codec: {SAYS[real]})")
            for outcome, real in zip(entry.outcomes, entry.real, strict=True)
        ]
        assert shown[entry.claim.id] == [*cells, TOGETHER[entry.together]], entry.claim.id
    assert models.generalises == "contradicts"
    assert "**No.**" in TEXT


def test_effects_of_the_page(models: Models) -> None:
    """Table 6: every change of PIA, as the page has it."""
    for effect in models.effects:
        if effect.table == "6" and effect.source in ("gaussian-sd", "codec:bound"):
            place = effect.where.split(",")[0]
            name = "Gaussian" if effect.source == "gaussian-sd" else "`bound`"
            line = next(li for li in TEXT.splitlines() if li.startswith(f"| {place}, {name} |"))
            for cell in effect.measured:
                assert cell is not None
                d = cell.pia.difference
                assert d is not None
                value = f"{100 * d.value:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0")
                text = f"{value} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]".replace("-", "−")
                assert text + (" ▼" if cell.pia.mark == "lower" else "") in line
