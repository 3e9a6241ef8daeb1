"""A memory limit around a process: in real control groups, where they can be made."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moebound.bench.offload import OffloadSettings, cases, run
from moebound.bench.offload.launch import launch
from moebound.bench.offload.memory_limit import Hierarchy, MemoryGroup, find_hierarchy, memory_group
from moebound.errors import BackendUnavailable

MB = 1_000_000

_HOLD = "x = bytearray(b'x') * {n}; print(len(x))"


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    try:
        with memory_group(64 * MB) as made:
            yield made
    except BackendUnavailable as error:
        pytest.skip(str(error))


def start(group: MemoryGroup, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(group.command([sys.executable, "-S", "-c", code]), capture_output=True,
                          text=True, check=False)  # fmt: skip


def test_a_process_within_its_limit(group: MemoryGroup) -> None:
    done = start(group, _HOLD.format(n=20 * MB))
    assert done.stdout == f"{20 * MB}\n"
    assert group.kills == 0
    assert group.peak_bytes is None or 20 * MB < group.peak_bytes <= 64 * MB


def test_a_process_that_needs_more_is_ended(group: MemoryGroup) -> None:
    done = start(group, _HOLD.format(n=100 * MB))
    assert done.returncode == -9
    assert group.kills == 1


def test_files_count_and_are_dropped(group: MemoryGroup, tmp_path: Path) -> None:
    """A process reads, and writes, far more than it may have: nobody is ended."""
    file = tmp_path / "file"
    code = (
        f"f = open({str(file)!r}, 'wb+')\n"
        f"for _ in range(120): f.write(bytes({MB}))\n"
        "f.flush(); f.seek(0); print(sum(len(f.read(1000000)) for _ in range(120)))"
    )
    done = start(group, code)
    assert done.stdout == f"{120 * MB}\n"
    assert group.kills == 0
    assert group.peak_bytes is None or 60 * MB < group.peak_bytes <= 64 * MB


def test_the_group_is_gone_afterwards() -> None:
    try:
        with memory_group(64 * MB) as group:
            assert start(group, "print(1)").stdout == "1\n"
            assert group.folder.is_dir()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    assert not group.folder.exists()


V1 = """\
9:name=systemd:/
4:memory:/user/me
1:cpu,cpuacct:/
0::/
"""
V1_MOUNTS = """\
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
V2 = "0::/user.slice/me.scope\n"
V2_MOUNTS = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def test_where_groups_are() -> None:
    memory, unified = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    assert find_hierarchy(V1, V1_MOUNTS) == Hierarchy(1, memory, memory / "user/me")
    assert find_hierarchy(V2, V2_MOUNTS) == Hierarchy(2, unified, unified / "user.slice/me.scope")


def test_where_groups_are_in_a_container() -> None:
    """Its own group is what is mounted; the path is still that of the host."""
    memory = Path("/sys/fs/cgroup/memory")
    groups = "4:memory:/docker/0123\n"
    mounts = "35 31 0:32 /docker/0123 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    assert find_hierarchy(groups, mounts) == Hierarchy(1, memory, memory)
    above = "4:memory:/system.slice/x\n"
    assert find_hierarchy(above, mounts) == Hierarchy(1, memory, memory)


def test_version_2_goes_up_where_processes_are_in_the_way() -> None:
    found = list(find_hierarchy(V2, V2_MOUNTS).places())
    assert found[0] == Path("/sys/fs/cgroup/user.slice/me.scope")
    assert found[1:] == [Path("/sys/fs/cgroup/user.slice"), Path("/sys/fs/cgroup")]
    assert len(list(find_hierarchy(V1, V1_MOUNTS).places())) == 1


def test_no_control_groups() -> None:
    with pytest.raises(BackendUnavailable, match="/proc/self/mountinfo has none"):
        find_hierarchy(V1, V2_MOUNTS.replace("cgroup2", "tmpfs"))


def test_without_control_groups_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(limit_bytes: int) -> MemoryGroup:
        raise BackendUnavailable("no memory limit can be set: not here")

    monkeypatch.setattr(cases, "memory_group", none)
    with pytest.raises(BackendUnavailable, match="not here"):
        run(OffloadSettings(memory_limit=MB), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_takes_no_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there looks like a control group and is none: the message says where."""
    from moebound.bench.offload import memory_limit

    monkeypatch.setattr(
        memory_limit, "find_hierarchy", lambda groups, mounts: Hierarchy(1, tmp_path, tmp_path)
    )
    with pytest.raises(BackendUnavailable, match=r"memory\.limit_in_bytes: No such file"), \
            memory_group(64 * MB):  # fmt: skip
        pass
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_killed_or_late_is_a_row(group: MemoryGroup, tmp_path: Path) -> None:
    spec = {"how": "stock", "source": str(tmp_path / "nothing")}
    row = launch(spec, tmp_path, timeout_s=100, memory_limit=8 * MB)  # less than Python needs
    assert "limit of 0.008 GB" in row["error"]
    assert row["memory_limit_bytes"] == 8 * MB
    row = launch(spec, tmp_path, timeout_s=0.01)
    assert "not done after 0.01 s" in row["error"]
    assert not list(tmp_path.iterdir())
