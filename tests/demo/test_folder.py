"""What the demo replaces, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from moebound.cli.main import main
from moebound.demo.folder import Folder, begin
from moebound.errors import StoreError

ASKED = {"rates": [0.3], "n_problems": 5}


def begun(path: Path, asked: dict[str, object] = ASKED) -> Folder:
    folder = begin(path, asked)
    folder.profile.write_text("{}")
    folder.study.mkdir(exist_ok=True)
    (folder.study / "rows.jsonl").write_text("{}")
    folder.plan(0.5).write_text("{}")
    return folder


def test_what_was_begun_goes_on(tmp_path: Path) -> None:
    begun(tmp_path / "a")
    again = begin(tmp_path / "a", ASKED)
    assert again.profile.exists()
    assert (again.study / "rows.jsonl").exists()


def test_what_is_finished_or_of_other_options_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    folder = begun(tmp_path)
    folder.data.write_text("{}")
    for asked in (ASKED, {**ASKED, "n_problems": 6}, {**ASKED, "src": "b"}):
        begin(tmp_path, asked)
        assert {entry.name for entry in tmp_path.iterdir()} == {
            "mine.txt", "answers", "settings.json",
        }  # fmt: skip
        begun(tmp_path, asked)


@pytest.mark.parametrize("name", ["stores", "plan.json", "settings.json"])
def test_what_is_somebody_elses_is_not_replaced(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / name
    if name == "stores":
        mine.mkdir()
        (mine / "mine.txt").write_text("keep me")
    else:
        mine.write_text('{"keep": "me"}')
    with pytest.raises(StoreError, match=name):
        begin(tmp_path, ASKED)
    assert main(["demo", "-o", str(tmp_path)]) == 2
    assert str(mine) in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
