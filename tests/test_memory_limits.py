"""Limits of containers and batch systems, from trees of files like those that the kernel shows."""

import subprocess
import sys
from pathlib import Path

import pytest

from lowmem_db import environment, memory_limits

MIB = 1 << 20
V2 = "30 23 0:26 {shown} {mount} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 {shown} {mount} rw,relatime - cgroup cgroup rw,memory"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without limits."""
    monkeypatch.setattr(memory_limits, "_ROOT", tmp_path)
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def member(root: Path, groups: str, mounts: str) -> None:
    (root / "proc/self/cgroup").write_text(groups + "\n")
    (root / "proc/self/mountinfo").write_text(f"1 0 0:1 / / rw - ext4 /dev/root rw\n{mounts}\n")


def group(root: Path, folder: str, **files: object) -> None:
    made = root / folder
    made.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (made / name.replace("__", ".")).write_text(f"{value}\n")


def found() -> list[tuple[int, int]]:
    return [(limit.total_bytes // MIB, limit.free_bytes // MIB) for limit in memory_limits.limits()]


def test_docker_with_version_2(root: Path) -> None:
    member(root, "0::/", V2.format(shown="/", mount="/sys/fs/cgroup"))
    statistics = f"anon {300 * MIB}\ninactive_file {100 * MIB}\nactive_file {50 * MIB}\nslab_reclaimable {50 * MIB}"
    group(
        root,
        "sys/fs/cgroup",
        memory__max=2048 * MIB,
        memory__high="max",
        memory__current=600 * MIB,
        memory__stat=statistics,
    )
    assert found() == [(2048, 2048 - 400)]


def test_slurm_with_version_1_limits_the_job_above_the_step(root: Path) -> None:
    path = "/slurm/uid_7/job_3/step_0"
    member(root, f"4:memory:{path}\n0::/", V1.format(shown="/", mount="/sys/fs/cgroup/memory"))
    unlimited = {"memory__limit_in_bytes": 0x7FFFFFFFFFFFF000, "memory__usage_in_bytes": 500 * MIB}
    group(root, f"sys/fs/cgroup/memory{path}", **unlimited)
    group(
        root,
        "sys/fs/cgroup/memory/slurm/uid_7/job_3",
        memory__limit_in_bytes=4096 * MIB,
        memory__usage_in_bytes=700 * MIB,
        memory__stat=f"inactive_file 1\ntotal_inactive_file {200 * MIB}\ntotal_active_file 0",
    )
    group(root, "sys/fs/cgroup/memory", **unlimited)
    assert found() == [(4096, 4096 - 500)]


def test_docker_with_version_1_shows_only_its_own_group(root: Path) -> None:
    member(root, "4:cpu,memory:/docker/abc", V1.format(shown="/docker/abc", mount="/sys/fs/cgroup/memory"))
    group(root, "sys/fs/cgroup/memory", memory__limit_in_bytes=1024 * MIB, memory__usage_in_bytes=24 * MIB)
    assert found() == [(1024, 1000)]


def test_a_group_outside_of_what_is_mounted_falls_back_to_the_mount(root: Path) -> None:
    member(root, "0::/../elsewhere", V2.format(shown="/", mount="/sys/fs/cgroup"))
    group(root, "sys/fs/cgroup", memory__max=100 * MIB, memory__current=0)
    assert found() == [(100, 100)]


def test_the_lower_of_high_and_max_counts_and_so_does_every_group_above(root: Path) -> None:
    member(root, "0::/user.slice/run", V2.format(shown="/", mount="/sys/fs/my\\040cgroup"))
    group(root, "sys/fs/my cgroup/user.slice/run", memory__max="max", memory__high=900 * MIB, memory__current=100 * MIB)
    group(root, "sys/fs/my cgroup/user.slice", memory__max=1000 * MIB, memory__current=950 * MIB)
    assert found() == [(900, 800), (1000, 50)]
    tightest = memory_limits.tightest()
    assert tightest is not None
    assert tightest.free_bytes == 50 * MIB
    assert environment.free_host_bytes() == 50 * MIB
    assert environment.total_host_bytes() == 900 * MIB


@pytest.mark.parametrize(
    "files",
    [{}, {"memory__max": "max", "memory__current": 5}, {"memory__max": 100}, {"memory__max": "", "memory__current": 5}],
)
def test_what_is_not_limited_or_cannot_be_read_does_not_count(root: Path, files: dict[str, object]) -> None:
    assert found() == []
    member(root, "0::/", V2.format(shown="/", mount="/sys/fs/cgroup"))
    group(root, "sys/fs/cgroup", **files)
    assert found() == []
    member(root, "nonsense\n:::\n1:memory", "nonsense - cgroup2\n - \n")
    assert found() == []


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v of Linux")
def test_limit_of_the_address_space_of_a_real_process() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "from lowmem_db import environment\n"
        "print(environment.total_host_bytes(), environment.free_host_bytes())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    total, free = map(int, said.split())
    assert total == 1 << 30
    assert 0.5 * total < free < total
