"""The plot of stored quality rows: each is drawn once, in both panels, where it was measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def test_every_row_in_both_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    module: Any = importlib.import_module("plot_quality")
    stored = json.loads((ROOT / "bench" / "results" / "quality.json").read_text(encoding="utf-8"))

    axes = module.plot_quality(stored).axes
    assert [axis.get_title() for axis in axes] == [title for _, _, title in module.PANELS]
    for axis, (kl, _, _) in zip(axes, module.PANELS, strict=True):
        drawn = [
            (float(x), float(y))
            for container in axis.containers
            for x, y in zip(*container.lines[0].get_data(), strict=True)
        ]
        measured = [(row["bits_per_weight"], row["fidelity"][kl]) for row in stored["rows"]]
        assert sorted(drawn) == sorted(measured)


def test_peers_have_a_curve_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    module: Any = importlib.import_module("plot_quality")
    names = ("calibrated", "bound", "gptq:int4:g128", "awq:int4:g128", "autoround:int3:g128:i50",
             "gguf:q4_k_m", "gguf:iq3_s", "gguf:iq2_xxs", "hqq:int3:g64")  # fmt: skip
    figures = {name: 10.0**-at for at, (kl, stderr, _) in enumerate(module.PANELS, 2)
               for name in (kl, stderr)}  # fmt: skip
    document = {
        "rows": [
            {"method": name, "bits_per_weight": bits, "fidelity": figures}
            for bits, name in enumerate(names, 2)
        ],
        "source": "a model", "task": "a task", "n_problems": 4,
        "environment": {"date": "2026-11-29"},
    }  # fmt: skip
    for axis in module.plot_quality(document).axes:
        drawn = [c.lines[0].get_data()[0].tolist() for c in axis.containers]
        assert sorted(map(len, drawn)) == [1] * 7 + [2]
        assert sorted(x for xs in drawn for x in xs) == list(range(2, 2 + len(names)))
        assert len({c.lines[0].get_color() for c in axis.containers}) == 8


def test_rows_of_methods_join_those_of_the_same_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    module: Any = importlib.import_module("plot_quality")
    results = ROOT / "bench" / "results"
    stored, other = (
        json.loads((results / name).read_text(encoding="utf-8"))
        for name in ("quality-peers-mixtral.json", "methods-weighted-mixtral.json")
    )
    n = len(stored["rows"])
    module.join(stored, other, "rows")
    joined = {row["bits"]: row for row in stored["rows"][n:]}
    assert set(joined) == {2, 2.5, 3, 4}  # what the others' sizes lie around
    for axis, (kl, _, _) in zip(module.plot_quality(stored).axes, module.PANELS, strict=True):
        drawn = [y for c in axis.containers for y in c.lines[0].get_data()[1].tolist()]
        assert {row["fidelity"][kl] for row in joined.values()} <= set(drawn)
    with pytest.raises(ValueError, match="expected"):
        module.join(stored, other | {"n_problems": 3}, "rows")
    with pytest.raises(ValueError, match=r"moebound\.bench\.methods"):
        module.join(stored, stored, "rows")
