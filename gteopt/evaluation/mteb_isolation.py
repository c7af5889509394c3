"""Run mteb and datasets without progress bars, log lines, warnings, new seeds or network calls.

The state of the process is restored at the end. Refuses to know: what runs inside.
"""

from __future__ import annotations

import functools
import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

_LOUD = ("mteb", "datasets", "huggingface_hub", "fsspec")


@contextmanager
def isolate_mteb(*, offline: bool) -> Iterator[None]:
    """Run mteb without side effects on this process.

    mteb seeds the global generators when it is imported and when a task is made. It also shows
    progress bars that no argument turns off.

    Args:
        offline: huggingface_hub and datasets refuse to open a connection.
    """
    import datasets
    import huggingface_hub.constants
    import torch
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    bars_were_on = datasets.are_progress_bars_disabled() is False
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        gpus = range(torch.cuda.device_count())
        stack.enter_context(torch.random.fork_rng(devices=gpus))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"(mteb|datasets|sklearn|scipy)(\.|$)")
        silent: Any = functools.partialmethod(tqdm.__init__, disable=True)
        stack.enter_context(_replaced(tqdm, "__init__", silent))
        if offline:
            stack.enter_context(_replaced(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
            stack.enter_context(_replaced(datasets.config, "HF_HUB_OFFLINE", True))
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            datasets.disable_progress_bars()
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars_were_on:
                datasets.enable_progress_bars()
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
