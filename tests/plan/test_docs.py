"""docs/plan.md: its code runs, and its figures about the grid are the code's."""

from __future__ import annotations

import json
import re
from pathlib import Path

from moebound.checkpoint import open_checkpoint
from moebound.codec import stats
from moebound.plan import RATES
from moebound.plan.plan import FORMAT
from moebound.types import TensorStats
from untrained import untrained

TEXT = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")


def test_the_code_runs(tmp_path: Path) -> None:
    source = untrained(tmp_path / "tiny")
    checkpoint = open_checkpoint(source)
    experts = [
        {"layer": e.key.layer, "expert": e.key.expert, "predicted_kl": [1e-5, 1e-4],
         "mean_abs": sum((stats(checkpoint.read(m)) for m in e.matrices), TensorStats()).mean_abs}
        for e in checkpoint.experts()
    ]  # fmt: skip
    sensitivity = tmp_path / "sensitivity.json"
    sensitivity.write_text(
        json.dumps({"format": "moebound.sensitivity", "version": 1, "bounds": [0.1, 0.3],
                    "task": "wordmath", "skip": 0, "n_prompts": 2, "experts": experts})
    )  # fmt: skip
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(code, {"source": source, "sensitivity": sensitivity, "folder": tmp_path})
    assert (tmp_path / "store" / "moebound.plan.json").is_file()


def test_figures() -> None:
    assert f"at {len(RATES)} rates from {RATES[0]:g} to {RATES[-1]:g}" in TEXT
    assert f"`{FORMAT.name}`, version {FORMAT.version}" in TEXT
