"""Judge an encoder: task scores through mteb, and closeness to the baseline without labels.

Hides: mteb, which only this package imports, and only once something is scored. Refuses to know:
how a variant was made, and whether the encoder that it is handed is one.
"""

from gteopt.evaluation.compare import Drawn, compare
from gteopt.evaluation.fidelity import fidelity
from gteopt.evaluation.own import read_texts
from gteopt.evaluation.runner import (
    ENCODE_OPTIONS,
    EncodeOptions,
    SuiteRun,
    TextsRun,
    begin_views,
    run_suite,
    run_texts,
    run_views,
)
from gteopt.evaluation.statistics import settle
from gteopt.evaluation.suites import Suite, SuiteTask, load_suite, with_data
from gteopt.evaluation.views import View, own_view, view_of

__all__ = [
    "ENCODE_OPTIONS",
    "Drawn",
    "EncodeOptions",
    "Suite",
    "SuiteRun",
    "SuiteTask",
    "TextsRun",
    "View",
    "begin_views",
    "compare",
    "fidelity",
    "load_suite",
    "own_view",
    "read_texts",
    "run_suite",
    "run_texts",
    "run_views",
    "settle",
    "view_of",
    "with_data",
]
