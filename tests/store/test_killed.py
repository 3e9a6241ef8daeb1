"""SIGKILL at every point where a run touches the disk; the next run finishes the same store.

One small process without torch forks a child for each point; the child kills itself right before
(or, in the middle of) its n-th system call that changes the disk.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from .conftest import MakeSource, contents, run

PROGRAM = textwrap.dedent(
    """
    import os, shutil, signal, sys
    from pathlib import Path
    from moebound.checkpoint import open_checkpoint
    from moebound.errors import StoreError
    from moebound.store import compress, open_store, verify
    from moebound.types import ErrorBound

    src, want, work, old = map(Path, sys.argv[1:5])
    dst = work / "dst"
    overwrite = old.exists()
    options = dict(bound=ErrorBound(0.1, "rate", "expert"), jobs=2, shard_bytes=40_000)

    def contents(folder):
        return {f.name: f.read_bytes() for f in folder.iterdir()}

    def in_child(job):
        pid = os.fork()
        if pid == 0:
            try:
                job()
            except BaseException as error:
                print("child:", repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    def compress_with(on_existing):
        compress(open_checkpoint(src), dst, on_existing=on_existing, **options)

    def dying(point):
        count = [0]
        def arm(name):
            really = getattr(os, name)
            def call(*args, **kwargs):
                count[0] += 1
                if count[0] == point:
                    if name == "pwrite":  # half of it gets there
                        really(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return really(*args, **kwargs)
            setattr(os, name, call)
        for name in ("pwrite", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir"):
            arm(name)
        compress_with("overwrite" if overwrite else "error")

    final, before = contents(want), contents(old) if overwrite else None
    point, killed = 0, 0
    while True:
        point += 1
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        if overwrite:
            shutil.copytree(old, dst)
        code = in_child(lambda: dying(point))
        if code == 0:
            break
        assert code == -signal.SIGKILL, (point, code)
        killed += 1
        if dst.exists():
            # The old store whole, or the new one: nothing in between.
            assert contents(dst) in ([before, final] if overwrite else [final]), point
        partial = work / "dst.partial"
        if partial.exists():
            try:
                open_store(partial)
            except Exception:
                pass
            else:
                # Whole; what is left of the work is named, for it has no record.
                left = (".records.jsonl", "moebound.lock")
                wrong = [p for p in verify(partial).problems if not p.tensor.endswith(left)]
                assert not wrong, (point, wrong)
        # Killed a second time, a little later; then let through.
        in_child(lambda: dying(point // 2 + 1))
        mode = "overwrite" if overwrite else "resume"
        assert in_child(lambda: compress_with(mode)) == 0, point
        assert contents(dst) == final, point
        assert sorted(f.name for f in work.iterdir()) == ["dst"], (point, list(work.iterdir()))
    print("killed", killed)
    """
)


def _run(src: Path, want: Path, work: Path, old: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, (src, want, work, old))],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_killed_anywhere_the_next_run_finishes_the_same_store(
    source: MakeSource, tmp_path: Path
) -> None:
    run(source(), tmp_path / "want")
    assert _run(source(), tmp_path / "want", tmp_path / "work", tmp_path / "none") > 60


@pytest.mark.slow
def test_killed_while_overwriting_the_old_store_or_the_new_one_is_there(
    source: MakeSource, tmp_path: Path
) -> None:
    run(source(), tmp_path / "want")
    run(source(), tmp_path / "old", codec="raw", layers={1})
    assert _run(source(), tmp_path / "want", tmp_path / "work", tmp_path / "old") > 60


def test_a_resumed_run_does_not_write_finished_shards_again(
    source: MakeSource, tmp_path: Path
) -> None:
    run(source(), tmp_path / "want")
    program = PROGRAM.split("final, before")[0] + "\ndying(60)\n"
    arguments = [source(), tmp_path / "want", tmp_path / "work", tmp_path / "none"]
    killed = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], check=False, timeout=60
    )
    assert killed.returncode == -9
    partial = tmp_path / "work" / "dst.partial"
    times = {f.name: f.stat().st_mtime_ns for f in partial.glob("*.safetensors")}
    assert times
    assert run(source(), tmp_path / "work" / "dst").resumed
    after = {f: (tmp_path / "work" / "dst" / f).stat().st_mtime_ns for f in times}
    assert after == times
    assert contents(tmp_path / "work" / "dst") == contents(tmp_path / "want")
