"""How many processor cores there are for this process, and what a container allows it.

Hides: where an operating system keeps limits. Refuses to know: libraries; the command line reads
this before it imports any.
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
    # Version 2 has "quota period" in one file, version 1 a file for each.
    said = [each.split() for each in cgroup_limits("cpu.max")]
    said.append(
        cgroup_limits("cpu/cpu.cfs_quota_us")[:1] + cgroup_limits("cpu/cpu.cfs_period_us")[:1]
    )
    # Where there is no quota, it is "max", or -1.
    quotas = [each for each in said if len(each) == 2 and each[0].isdigit() and each[1].isdigit()]
    shares = [int(quota) / int(period) for quota, period in quotas]
    return max(1, min([n, *map(math.ceil, shares)]))


def n_threads(wanted: str | None) -> int:
    """Threads that products should take: what is wanted, and no more than there are cores.

    More threads than cores wait for each other. torch counts the cores of the machine, not those of
    a container's quota.

    Args:
        wanted: the value of OMP_NUM_THREADS; None where it is not set.
    """
    first = (wanted or "").partition(",")[0].strip()  # the others are for loops within loops
    most = n_cores()
    return min(int(first), most) if first.isdigit() and int(first) > 0 else most


def cgroup_limits(limit: str) -> list[str]:
    """A limit of the container, from the process's own control group to the outermost one.

    Inside most containers the outermost is the container itself. Without a namespace, under systemd
    for one, the limit stands further in. A group has no file for what it does not limit.
    """
    try:
        own = re.search(r"^0::/(.*)$", OWN_CGROUP.read_text(), re.MULTILINE)
    except OSError:  # not Linux
        return []
    within = Path(own[1]) if own else Path()
    found: list[str] = []
    for group in (within, *within.parents):
        with suppress(OSError):
            found.append((CGROUPS / group / limit).read_text().strip())
    return found
