"""Reports of drawn studies, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moebound.paper.report import Report, make_report, read_study

from .synthetic import Effect, Effects, Place, no_effect, write_study

Judge = Callable[..., Report]


def as_in_the_paper(place: Place, source: str) -> Effect:
    """Middle worst, deep errors help the format, simulated noise three times the real error."""
    if source == "randomise":
        return Effect(pia=0.9, ica=0.9, kl=3.0)
    if place.table == "3.2.1":
        return Effect(kl=1e-6 * (place.rate or 0) ** 2)
    size = {"gaussian-sd": 1.0, "gaussian-var": 40.0}.get(source, 0.32)
    middle = 1 - 2 * abs(place.depth - 0.5)
    kl = size * (place.rate or 0) ** 2 * place.n_experts**0.5 * (0.002 + 0.006 * middle)
    lost = min(0.95, 6 * kl)
    silent = place.table == "7" and place.rate == 0.8 and size >= 1
    ica = -0.7 if place.depth > 0.9 and place.n_experts == 1 else lost + 0.05
    return Effect(pia=lost, ica=ica, kl=kl, valid=0.0 if silent else 1.0)


def upside_down(place: Place, source: str) -> Effect:
    """The opposite: deep worst, shallow next, the middle hardly; nothing helps; codecs as noise."""
    if source == "randomise":
        return Effect(kl=1e-4)
    middle = 1 - 2 * abs(place.depth - 0.5)
    kl = 0.02 * (place.rate or 0) ** 2 * (1.02 - middle) * (1 + 3 * place.depth)
    return Effect(pia=min(0.9, 12 * kl), ica=min(0.9, 12 * kl), kl=kl)


@pytest.fixture(scope="session")
def paperlike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study") / "paperlike", as_in_the_paper)


@pytest.fixture(scope="session")
def paperlike_report(paperlike: Path) -> Report:
    return make_report(read_study(paperlike))


@pytest.fixture(scope="session")
def opposite_report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = write_study(tmp_path_factory.mktemp("study") / "opposite", upside_down, n=400)
    return make_report(read_study(folder))


@pytest.fixture(scope="session")
def tiny_report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of 12 problems and one seed, with effects that are there: too little to say anything."""
    folder = tmp_path_factory.mktemp("study") / "tiny"
    write_study(folder, as_in_the_paper, n=12, seeds=1, keep=lambda place: place.answers)
    return make_report(read_study(folder))


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    """A report of a study with these effects."""

    def make(effects: Effects = no_effect, **options: object) -> Report:
        folder = write_study(tmp_path / "study", effects, **options)  # type: ignore[arg-type]
        return make_report(read_study(folder))

    return make
