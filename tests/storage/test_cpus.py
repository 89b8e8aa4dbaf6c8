"""The number of CPUs this process may use."""

import os
from pathlib import Path

import pytest

from nasray.storage import cpus


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cgroup file system in which this process is in /pod/container; no quota yet."""
    (tmp_path / "own").write_text("0::/pod/container\n")
    (tmp_path / "mount/pod/container").mkdir(parents=True)
    monkeypatch.setattr(cpus, "CGROUPS", tmp_path / "mount")
    monkeypatch.setattr(cpus, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    return tmp_path / "mount"


@pytest.mark.parametrize(
    ("pod", "container", "expected"),
    [
        ("max 100000", "max 100000", 8),  # no quota: the affinity mask
        ("max 100000", "400000 100000", 4),
        ("200000 100000", "400000 100000", 2),  # the parent's is smaller
        ("max 100000", "150000 100000", 2),  # a fraction, rounded up
        ("max 100000", "10000 100000", 1),
        ("max 100000", "1600000 100000", 8),  # larger than the mask
    ],
)
def test_quota_of_the_cgroup_limits_the_affinity_mask(
    cgroups: Path, pod: str, container: str, expected: int
):
    (cgroups / "pod/cpu.max").write_text(f"{pod}\n")
    (cgroups / "pod/container/cpu.max").write_text(f"{container}\n")
    assert cpus.usable_cpus() == expected


def test_container_that_sees_its_own_cgroup_as_the_root(cgroups: Path):
    cpus.OWN_CGROUP.write_text("0::/\n")
    (cgroups / "cpu.max").write_text("300000 100000\n")
    assert cpus.usable_cpus() == 3


def test_without_cgroup_v2(cgroups: Path):
    cpus.OWN_CGROUP.write_text("4:memory:/\n3:cpuset:/\n")
    (cgroups / "cpu.max").write_text("300000 100000\n")  # of a cgroup that is not this process's
    assert cpus.usable_cpus() == 8
    cpus.OWN_CGROUP.unlink()
    assert cpus.usable_cpus() == 8


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_real_affinity_mask():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cpus.usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
