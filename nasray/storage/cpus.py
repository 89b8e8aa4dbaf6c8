"""How many CPUs this process may use, which on a shared machine is fewer than it has."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # where cgroup v2 is mounted
OWN_CGROUP = Path("/proc/self/cgroup")


def usable_cpus() -> int:
    """Return the number of CPUs this process may use, at least 1.

    It is the size of the CPU affinity mask (taskset, Slurm), further limited by the CPU quota
    of the cgroup (containers, Kubernetes), a fraction rounded up. os.cpu_count() knows neither.
    """
    quota = cgroup_quota()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, math.ceil(quota))) if quota else cpus


def cgroup_quota() -> float | None:
    """Return the smallest CPU quota of this process's cgroups, in CPUs; None without one."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return None
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:  # cgroup v1 only
        return None
    quotas = []
    for folder in (Path(own), *Path(own).parents):  # a parent's quota limits its children
        try:
            quota, period = (CGROUPS / folder / "cpu.max").read_text().split()
        except (OSError, ValueError):  # the root cgroup has no such file
            continue
        if quota != "max":
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)
