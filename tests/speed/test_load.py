"""The load of other programs is told apart from our own."""

from __future__ import annotations

import subprocess
import sys
import time

from gteopt.speed.load import LoadMeter

SPIN = "import time\nend = time.monotonic() + {}\nwhile time.monotonic() < end: pass"


def test_own_work_is_not_counted_as_that_of_others() -> None:
    meter = LoadMeter()
    child = subprocess.Popen([sys.executable, "-c", SPIN.format(1.5)])
    child.wait()
    with_own_child = meter.of_others()
    assert with_own_child is not None
    assert 0 <= with_own_child <= 1
    meter = LoadMeter()
    child = subprocess.Popen([sys.executable, "-c", SPIN.format(30)])
    time.sleep(1.5)  # a child counts as our own only once we have waited for it
    other = meter.of_others()
    child.kill()
    child.wait()
    assert other is not None
    assert other > 0.1
