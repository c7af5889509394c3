"""Judge an encoder: task scores through mteb, and closeness to the baseline without labels.

Hides: mteb, which only this package imports, and only once something is scored. Refuses to know:
how a variant was made, and whether the encoder that it is handed is one.
"""

from gteopt.evaluation.fidelity import fidelity, sample_of
from gteopt.evaluation.own import read_texts
from gteopt.evaluation.runner import SuiteRun, compare, run_suite
from gteopt.evaluation.statistics import settle
from gteopt.evaluation.suites import Suite, SuiteTask, load_suite, with_data

__all__ = [
    "Suite",
    "SuiteRun",
    "SuiteTask",
    "compare",
    "fidelity",
    "load_suite",
    "read_texts",
    "run_suite",
    "sample_of",
    "settle",
    "with_data",
]
