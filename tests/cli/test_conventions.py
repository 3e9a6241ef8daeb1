"""What holds for every command: one document on stdout, exit codes, quick help, no tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from moebound import store as store_package
from moebound.cli import exits
from moebound.cli.main import cli, main
from moebound.cli.output import Output
from moebound.errors import CorruptionError, StoreError

from .conftest import SRC, Run

MOEBOUND = [sys.executable, "-m", "moebound.cli.main"]


def leaf_commands(group: click.Group = cli, *path: str) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += leaf_commands(command, *path, name)
        else:
            found.append(((*path, name), command))
    return found


def test_the_commands_that_others_rely_on() -> None:
    names = {" ".join(path) for path, _ in leaf_commands()}
    assert names >= {
        "inspect", "compress", "verify", "decompress", "bench codec", "demo", "eval", "study",
        "report", "sensitivity", "plan", "profile", "serve",
    }  # fmt: skip


@pytest.mark.parametrize(("path", "command"), leaf_commands())
def test_every_command_has_json_quiet_and_help(
    run: Run, path: tuple[str, ...], command: click.Command
) -> None:
    options = {name for parameter in command.params for name in parameter.opts}
    assert options >= {"--json", "-q"}
    assert command.help
    assert all(getattr(p, "help", "set") for p in command.params if isinstance(p, click.Option))
    ran = run(*path, "--help")
    assert ran.code == 0
    assert ran.stderr == ""


@pytest.mark.parametrize(
    "args", [["inspect", SRC], ["inspect", "/nowhere/at/all"], ["compress", SRC, "x"]]
)
def test_json_is_one_document_even_for_errors(args: list[str], tmp_path: Path) -> None:
    # A process of its own: what libraries write to the file descriptor counts too.
    done = subprocess.run(
        [*MOEBOUND, *args, "--json"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    document = json.loads(done.stdout)
    if done.returncode:
        assert document["ok"] is False
        assert document["exit_code"] == done.returncode == 2
        assert document["error"]["message"] in done.stderr
        assert "Traceback" not in done.stderr


def test_library_prints_do_not_spoil_the_document(
    run: Run, monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    real = store_package.verify

    def chatty(*args: Any, **kwargs: Any) -> Any:
        print("a library says hello")
        return real(*args, **kwargs)

    monkeypatch.setattr(store_package, "verify", chatty)
    ran = run("verify", store, "--json")
    assert ran.document["ok"] is True
    assert "hello" in ran.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CorruptionError("x.safetensors: bad"), 1),
        (StoreError("dst: no"), 2),
        (OSError(28, "No space left on device", "dst/model"), 2),
        (RuntimeError("surprise"), 2),
        (MemoryError(), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    run: Run, monkeypatch: pytest.MonkeyPatch, store: Path, error: BaseException, code: int
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(store_package, "verify", fail)
    ran = run("verify", store)
    assert ran.code == code
    assert ran.stderr.lstrip().startswith("moebound: ")
    assert "Traceback" not in ran.stderr
    monkeypatch.setenv(exits.TRACEBACK_VARIABLE, "1")
    assert "Traceback" in run("verify", store).stderr


def test_messages_name_the_file_and_not_the_errno(store: Path) -> None:
    assert exits.message_for(OSError(28, "No space left", "dst/m")) == "dst/m: No space left"
    assert "please report" in exits.message_for(RuntimeError("surprise"))


def test_no_number_is_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(True, False, sys.stdout)
    output.result({"a": float("nan"), "b": [float("inf"), 1.5], "c": (2,)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": [2]}


def test_help_is_quick() -> None:
    """That of all commands: it loads what help is written with, and nothing that takes its time."""
    commands = [["--help"], *([*path, "--help"] for path, _ in leaf_commands())]
    script = (
        "import sys; before = set(sys.modules); from moebound.cli.main import main; "
        f"assert not any(map(main, {commands!r})); "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("Usage:") == len(commands)
    expected = {"moebound", "click", "rich", "numpy", "ml_dtypes"}
    assert set(done.stdout.splitlines()[-1].split()) <= expected | sys.stdlib_module_names


def test_a_reader_that_leaves_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m moebound.cli.main inspect {SRC} --json | head -c 1",
        shell=True, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "{"
    assert done.stderr == ""


# Interrupts itself when the journal is there, and so at the same place on any machine.
INTERRUPTED = """
import os, signal, sys
from moebound.cli.main import main
from moebound.store import folder
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in a background job
really = folder.write_synced
def write(path, data):
    really(path, data)
    if path.name == folder.JOURNAL_FILE:
        signal.raise_signal(signal.SIGINT)
folder.write_synced = write
sys.exit(main(sys.argv[1:]))
"""


def test_interrupt_then_the_same_command_goes_on(tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    arguments = ["compress", SRC, str(dst), "--rate", "0.3"]
    stopped = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *arguments], capture_output=True, text=True, check=False
    )
    assert stopped.returncode == 130
    assert "--resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert (tmp_path / "dst.partial" / "moebound.journal.json").exists()
    assert not dst.exists()
    done = subprocess.run(
        [*MOEBOUND, *arguments, "--resume"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command_exit_codes_included() -> None:
    for arguments, code in ((["--version"], 0), (["nosuch"], 2)):
        ran = subprocess.run(
            [sys.executable, "-m", "moebound", *arguments], capture_output=True, check=False
        )
        assert ran.returncode == code, ran.stderr


def test_alone_it_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    said = "".join(capsys.readouterr())
    assert said.startswith("Usage: moebound")
    assert "Try 'moebound" not in said
