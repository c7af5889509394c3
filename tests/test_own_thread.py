"""A function runs in a thread of its own, which is gone when the caller goes on."""

from __future__ import annotations

import threading
import time

import pytest

from gteopt.own_thread import call_in_own_thread


def test_the_result_and_the_error_reach_the_caller_and_the_thread_ends() -> None:
    thread = call_in_own_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    assert thread.daemon
    deadline = time.monotonic() + 10
    while thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not thread.is_alive()
    with pytest.raises(ZeroDivisionError):
        call_in_own_thread(lambda: 1 // 0)
