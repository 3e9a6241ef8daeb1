"""A short attack with fixed seeds, and what the harness makes of a crash, a hang and a change."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest

from . import __main__ as command
from .cases import Attack, Case, Wrong, case_of
from .streams import Streams, corpus
from .watch import Report, run, write_findings


class Broken(Attack):
    """Some seeds do what nothing may do."""

    name: ClassVar[str] = "broken"
    limit_s: ClassVar[float] = 10

    def draw(self, rng: random.Random) -> Case:
        return Case("drawn", {"bytes": rng.randbytes(8)})

    def judge(self, case: Case) -> str:
        seeds = {case_of(self, seed).files["bytes"]: seed for seed in range(12)}
        seed = seeds[case.files["bytes"]]
        if seed == 3:
            os.abort()
        if seed == 5:
            time.sleep(3600)
        if seed == 7:
            bytearray(1 << 30)
        if seed == 8:
            raise KeyError("surprise")
        if seed == 9:
            raise Wrong("silent", "other values")
        return "same"


def attack(kind: str, count: int, folder: Path) -> Report:
    return run(command.attack_class(kind), seed=0, count=count, jobs=1, findings=folder)


def told(report: Report) -> str:
    return "\n".join(f"{found['seed']}: {found['what']}" for found in report.findings)


@pytest.mark.slow
def test_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seed", "100000", "--count", "1500", "--findings", str(tmp_path / "found")]
    code = command.main(["streams", *options])
    said = json.loads(capsys.readouterr().out)
    assert (code, said["ok"]) == (0, True), said
    outcomes = said["kinds"][0]["outcomes"]
    assert sum(outcomes.values()) == said["kinds"][0]["cases"] == 1500
    # The changes reach the decoders: some are taken, and not only where nothing was changed.
    assert outcomes["other, sealed"] > 50
    assert not (tmp_path / "found").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("arrays", 1000),
        ("requests", 600),
        ("stores", 12),
        ("certificates", 12),
    ],
)
def test_the_other_kinds(kind: str, count: int, tmp_path: Path) -> None:
    report = attack(kind, count, tmp_path)
    assert not report.places, told(report)
    assert report.cases == count
    assert len(report.outcomes) > 1  # some are taken, some refused


@pytest.mark.slow
def test_what_is_whole_is_taken_at_every_door(tmp_path: Path) -> None:
    stores = command.attack_class("stores")(tmp_path)
    for index in range(3):
        files = dict(stores.originals[index].files)  # type: ignore[attr-defined]
        facts = {"of": index, "special": {}, "doors": ["verify", "against", "load"]}
        assert stores.judge(Case("nothing", files, facts)) == "same"
        assert stores.judge(Case("a document", {**files, "README.md": b"mine"}, facts)) == "same"
        stores.originals[index].found["from_pretrained"] = b""  # type: ignore[attr-defined]
        with pytest.raises(Wrong, match="from_pretrained gives other"):
            stores.judge(Case("nothing", files, facts))


@pytest.mark.slow
def test_what_goes_wrong_is_found_with_its_seed(tmp_path: Path) -> None:
    report = run(Broken, seed=0, count=12, jobs=2, findings=tmp_path)
    found = {finding["seed"]: finding["place"] for finding in report.findings}
    assert found == {
        3: "crash SIGABRT", 5: "hang", 7: "memory test_attack.py:judge",
        8: "KeyError test_attack.py:judge", 9: "silent",
    }  # fmt: skip
    assert report.cases == 12
    write_findings(Broken(tmp_path), report)
    for finding in report.findings:
        kind, case = Case.load(Path(finding["folder"]))
        assert (kind, case) == ("broken", case_of(Broken(tmp_path), finding["seed"]))


def test_a_finding_is_tried_again(tmp_path: Path) -> None:
    streams = Streams(tmp_path)
    case_of(streams, 4).save(tmp_path / "one", {"kind": "streams"})
    # In a process of its own: a replay limits the memory of the one that it is in.
    again = [sys.executable, "-m", command.__package__ or "", "--replay", str(tmp_path / "one")]
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    done = subprocess.run(again, capture_output=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["how"] == case_of(streams, 4).how
    for wrong in (["--replay", str(tmp_path / "none")], ["streams", "--jobs", "0"], ["nosuch"]):
        with pytest.raises(SystemExit) as ended:
            command.main(wrong)
        assert ended.value.code == 2


def test_the_corpus_has_every_codec_and_every_field() -> None:
    streams = corpus()
    assert {s.name for s in streams} >= {"bound", "lossless", "raw", "cuszp", "router", "shared"}
    fields = {name for stream in streams for name, _ in stream.fields}
    assert fields >= {"extent", "bound", "count", "positions", "values", "payload", "checksum"}
    assert max(len(stream.data) for stream in streams) < 2048
