"""Measure how busy other programs keep the machine.

Hides: psutil's counters. Refuses to know: what is measured at the same time.
"""

from __future__ import annotations

import psutil


class LoadMeter:
    """Counts the processor time that other programs use from its creation on."""

    def __init__(self) -> None:
        self._busy, self._idle = _machine_s()
        self._own = _own_s()

    def of_others(self) -> float | None:
        """Share of all processor time since creation that other programs used, 0 to 1.

        None if no time has passed by the system's clock.
        """
        busy, idle = _machine_s()
        total = (busy - self._busy) + (idle - self._idle)
        if total <= 0:
            return None
        others = (busy - self._busy) - (_own_s() - self._own)
        return min(1.0, max(0.0, others / total))


def _machine_s() -> tuple[float, float]:
    """Seconds that all cores were busy and idle since the machine started."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # User time already includes the time of virtual machines (guests).
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return sum(times) - idle - guests, idle


def _own_s() -> float:
    """Seconds that this process and its finished children have used."""
    times = psutil.Process().cpu_times()
    children = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return float(times.user + times.system + children)
