"""Runs a function in a thread that ends with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_Result = TypeVar("_Result")


def call_in_own_thread(function: Callable[[], _Result]) -> _Result:
    """The function's result; the OpenMP threads that it started end with its thread.

    GNU OpenMP hardly waits for work while a process has more of its threads than cores. A model
    that is loaded in one thread and computes in another would then be about a fifth slower.

    Raises:
        BaseException: what the function raised.
    """
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # a daemon does not hold up Ctrl-C
    return future.result()
