"""docs/add-a-method.md: its method, as a package of its own, goes the whole road."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import moebound
from moebound.checkpoint import open_checkpoint
from moebound.cli.main import main
from moebound.errors import CorruptionError
from moebound.methods import get_method, method_ids
from moebound.methods.blob import parse_shared
from moebound.methods.registry import METHODS
from moebound.store import decompress, open_store, verify
from tiny_models import make_tiny
from untrained import untrained

TEXT = (Path(__file__).parents[2] / "docs" / "add-a-method.md").read_text(encoding="utf-8")
MODULE, *ROAD = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
(PROJECT,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The document's package, installed as pip would: a module, and what its metadata says."""
    site, project = tmp_path / "site", tomllib.loads(PROJECT)["project"]
    about = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir(parents=True)
    (site / "moebound_mean8.py").write_text(MODULE)
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = project["entry-points"].items()
    (about / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
            for group, entries in points
        )
    )
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(METHODS, "classes", dict(METHODS.classes))
    yield site
    sys.modules.pop("moebound_mean8", None)


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def test_it_is_there_when_it_is_installed(package: Path) -> None:
    assert "mean8" in method_ids()
    assert get_method("mean8").setting == "mean8"
    assert type(get_method("mean8")).__module__ == "moebound_mean8"


def test_the_code_runs(package: Path, tmp_path: Path) -> None:
    names: dict[str, Any] = {"source": untrained(tmp_path / "tiny"), "folder": tmp_path}
    for number, block in enumerate(ROAD):
        exec(compile(block, f"add-a-method.md, block {number + 1}", "exec"), names)
    assert open_checkpoint(tmp_path / "plain").experts()


@pytest.mark.parametrize("options", [{}, {"original_format": False}], ids=["apart", "fused"])
def test_the_commands_run(
    package: Path,
    tmp_path: Path,
    options: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_tiny("mixtral", tmp_path / "SRC", **options)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines():
        capsys.readouterr()
        assert main([*line.split()[1:], "--json"]) == 0, line
    said = json.loads(capsys.readouterr().out)
    assert (said["guarantee"], said["method"], said["worst"]) == ("none", "mean8", None)
    assert said["bound"] is None
    assert said["shared_parts"] == 2 * len(open_checkpoint("SRC").experts()[0].matrices)
    assert said["max_abs_error"] > 0

    decompress("store", "plain")
    plain, model = stock(tmp_path / "plain"), stock(tmp_path / "store")
    wanted = logits(plain)
    assert wanted.isfinite().all()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert torch.equal(logits(model), wanted)
    with moebound.load("store", dtype="float32", ram_budget="70%") as offloaded:
        assert (logits(offloaded.model) - wanted).abs().max() <= 1e-5


def test_damage_is_found(package: Path, tmp_path: Path) -> None:
    source = make_tiny("mixtral", tmp_path / "SRC")
    moebound.compress(source, tmp_path / "store", method="mean8")
    store = open_store(tmp_path / "store")
    part = store.parts[0, 0]
    with open(part.tensor.file, "r+b") as file:
        file.seek(part.tensor.offset + part.tensor.n_bytes // 2)
        file.write(bytes([1 ^ part.read()[part.tensor.n_bytes // 2]]))
    kinds = {problem.kind for problem in verify(tmp_path / "store").problems}
    assert kinds == {"hash", "decode"}
    with pytest.raises(CorruptionError, match=r"moebound\.shared\.0\.0"):
        stock(tmp_path / "store")


def test_bytes_that_it_cannot_have_made(package: Path, tmp_path: Path) -> None:
    source = make_tiny("mixtral", tmp_path / "SRC")
    moebound.compress(source, tmp_path / "store", method="mean8")
    store, cls = open_store(tmp_path / "store"), type(get_method("mean8"))
    mean = cls.open_shared(parse_shared(store.parts[0, 0].read()).payload)
    matrix = store.experts()[0].matrices[0]
    spec = matrix.parse(store.read_expert(store.experts()[0].key).matrix(0)).spec
    good = np.zeros(spec.shape[0] * (4 + spec.shape[1]), np.uint8)
    assert cls.decode(good.data, spec, [mean]).shape == spec.shape
    for payload, part in ((good[:-1], mean), (good, mean[:-1]), (good[:0], mean)):
        with pytest.raises(CorruptionError, match="bytes, a mean of"):
            cls.decode(payload.data, spec, [part])
    for head in (b"", b"\x03aa"):
        with pytest.raises(CorruptionError, match="no known dtype"):
            cls.open_shared(memoryview(head))
