"""The processor cores that this process may use, and the limits of its container.

Hides: where an operating system keeps limits. Refuses to know: libraries, because the command line
reads this module before it imports any.
"""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
"""Where Linux keeps the limits of groups of processes, and says which group this process is in."""


def n_cores() -> int:
    """Processor cores that this process may use (affinity and the container's quota applied)."""
    has_affinity = hasattr(os, "sched_getaffinity")  # macOS and Windows have no such call
    n = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    # Version 2 of cgroups writes "quota period" in one file, version 1 writes two files.
    pairs = [limit.split() for limit in cgroup_limits("cpu.max")]
    pairs.append(
        cgroup_limits("cpu/cpu.cfs_quota_us")[:1] + cgroup_limits("cpu/cpu.cfs_period_us")[:1]
    )
    # "max" or -1 stands for no quota.
    quotas = [pair for pair in pairs if len(pair) == 2 and pair[0].isdigit() and pair[1].isdigit()]
    shares = [int(quota) / int(period) for quota, period in quotas]
    return max(1, min([n, *map(math.ceil, shares)]))


def n_threads(wanted: str | None) -> int:
    """Threads for matrix products: the wanted number, but no more than there are cores.

    More threads than cores wait for each other. torch counts the cores of the machine and ignores a
    container's quota.

    Args:
        wanted: the value of OMP_NUM_THREADS; None where it is not set.
    """
    first = (wanted or "").partition(",")[0].strip()  # further numbers are for nested loops
    most = n_cores()
    return min(int(first), most) if first.isdigit() and int(first) > 0 else most


def cgroup_limits(limit: str) -> list[str]:
    """The values of one limit, from the process's own control group to the outermost group.

    Inside most containers the outermost group is the container itself. Without a cgroup namespace,
    as under systemd, an inner group may hold the limit. A group has no file for a limit that it
    does not set.
    """
    try:
        line = re.search(r"^0::/(.*)$", OWN_CGROUP.read_text(), re.MULTILINE)
    except OSError:  # not Linux
        return []
    own_group = Path(line[1]) if line else Path()
    values: list[str] = []
    for group in (own_group, *own_group.parents):
        with suppress(OSError):
            values.append((CGROUPS / group / limit).read_text().strip())
    return values
