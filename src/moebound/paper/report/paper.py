"""The paper's tables as data: MoE-Compression (Ma et al. 2025, arXiv 2509.07727), section 3.

Its model is Moonlight: 26 MoE layers, called L1 to L26 there, of 64 experts, 6 chosen a token; its
tasks are GSM8K (tables 3 to 7) and MATH (8 and 9). Errors are drawn from N(0, ê). "/" in Table 7:
"the model no longer outputs or enters a down state"; None here.
"""

from __future__ import annotations

from dataclasses import dataclass

TITLE = "MoE-Compression (arXiv 2509.07727)"
N_LAYERS = 26
SIMULATION = "gaussian-sd"
"""The paper's error source, ê read as a standard deviation."""


@dataclass(frozen=True)
class PaperRow:
    """One line. depth: 0 the first MoE layer, 1 the last, the centre of a group; None for the
    baseline. rate: the bound as a share of the mean |weight|; None where there is no bound. ica,
    pia: shares of 1; None with `no_output` where the paper has "/", None without it where the paper
    says something in words (`note`) and has no number."""

    label: str
    depth: float | None
    rate: float | None
    ica: float | None
    pia: float | None
    no_output: bool = False
    note: str = ""


@dataclass(frozen=True)
class PaperTable:
    """task: 0 for GSM8K, 1 for MATH: the study's first and second task stand there."""

    id: str
    title: str
    section: str
    task: int
    rows: tuple[PaperRow, ...]

    @property
    def name(self) -> str:
        return f"Section {self.id}" if "." in self.id else f"Table {self.id}"

    def nearest(self, depth: float, rate: float | None, *, randomised: bool) -> PaperRow | None:
        """The line that a condition of this table stands beside; None if there is none."""
        fitting = [
            row for row in self.rows
            if row.depth is not None
            and (row.rate is None) == randomised
            and (randomised or (rate is not None and abs((row.rate or 0.0) - rate) < 1e-9))
        ]  # fmt: skip
        return min(fitting, key=lambda row: abs((row.depth or 0.0) - depth), default=None)


def _depth(*layers: int) -> float:
    """Of the paper's layers, counted from 1."""
    return (sum(layers) / len(layers) - 1) / (N_LAYERS - 1)


def _baseline(ica: float, pia: float) -> PaperRow:
    return PaperRow("baseline", None, None, ica, pia)


def _layers(rate: float, *rows: tuple[str, int, float, float]) -> tuple[PaperRow, ...]:
    return tuple(PaperRow(label, _depth(layer), rate, ica, pia) for label, layer, ica, pia in rows)


_GROUPS = (("G1: L1-L10", 1, 10), ("G2: L9-L18", 9, 18), ("G3: L17-L26", 17, 26))


def _groups(rate: float, *values: tuple[float, float] | None) -> tuple[PaperRow, ...]:
    rows = []
    for (label, first, last), found in zip(_GROUPS, values, strict=True):
        ica, pia = found or (None, None)
        at = _depth(*range(first, last + 1))
        rows.append(PaperRow(label, at, rate, ica, pia, no_output=found is None))
    return tuple(rows)


TABLES = (
    PaperTable(
        "3.2.1", "One rarely used expert of the first layer (expert 0)", "3.2.1", 0,
        (
            *(PaperRow("L1, expert 0", 0.0, rate, None, None, note="no effect")
              for rate in (0.1, 0.3, 0.5, 0.8)),
            PaperRow("L1, expert 0, randomised", 0.0, None, None, None, note="entirely incorrect"),
        ),
    ),
    PaperTable(
        "3", "The most used expert of the first layer", "3.2.2", 0,
        (
            _baseline(0.86, 0.96),
            PaperRow("L1, expert 26", 0.0, 0.3, 0.82, 0.96),
            PaperRow("L1, expert 26", 0.0, 0.5, 0.80, 0.96),
            PaperRow("L1, expert 26", 0.0, 0.8, 0.79, 0.95),
        ),
    ),
    PaperTable(
        "4", "The most used expert of one layer, by depth", "3.2.3", 0,
        (
            _baseline(0.86, 0.96),
            *_layers(0.8, ("L1, expert 26", 1, 0.79, 0.95), ("L13, expert 25", 13, 0.75, 0.94),
                     ("L20, expert 2", 20, 0.89, 0.96), ("L26, expert 40", 26, 0.96, 0.96)),
        ),
    ),
    PaperTable(
        "5", "The six most used experts of one layer", "3.3", 0,
        (
            _baseline(0.85, 0.96),
            *_layers(0.8, ("L1, top 6", 1, 0.74, 0.90), ("L26, top 6", 26, 0.90, 0.93)),
        ),
    ),
    PaperTable(
        "6", "All experts of one layer", "3.4", 0,
        (
            _baseline(0.86, 0.96),
            *_layers(0.8, ("L1, all", 1, 0.33, 0.71), ("L13, all", 13, 0.38, 0.65),
                     ("L20, all", 20, 0.61, 0.80), ("L26, all", 26, 0.85, 0.90)),
        ),
    ),
    PaperTable(
        "7", "The most used expert of each layer of a group", "3.5", 0,
        (
            *_groups(0.3, (0.86, 0.94), (0.81, 0.89), (0.91, 0.95)),
            *_groups(0.5, (0.81, 0.91), (0.69, 0.75), (0.92, 0.94)),
            *_groups(0.8, None, None, None),
        ),
    ),
    PaperTable(
        "8", "The most used expert of one layer, by depth, on the harder task", "3.6.1", 1,
        (
            _baseline(0.62, 0.70),
            *_layers(0.8, ("L1", 1, 0.60, 0.65), ("L13", 13, 0.56, 0.60),
                     ("L20", 20, 0.62, 0.68), ("L26", 26, 0.66, 0.70)),
        ),
    ),
    PaperTable(
        "9", "The most used expert of each layer of a group, on the harder task", "3.6.2", 1,
        (
            *_groups(0.3, (0.60, 0.63), (0.58, 0.62), (0.63, 0.65)),
            *_groups(0.5, (0.50, 0.58), (0.43, 0.50), (0.56, 0.60)),
        ),
    ),
)  # fmt: skip


def table(name: str) -> PaperTable | None:
    return next((entry for entry in TABLES if entry.id == name), None)
