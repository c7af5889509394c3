"""Filter a suite by a command's options: language, domain, protocol and time.

Refuses to know: data, encoders, scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gteopt.cli.output import print_status
from gteopt.cli.own_data import parse_name_list
from gteopt.errors import InputError

if TYPE_CHECKING:
    from gteopt.evaluation.suites import Suite


def filter_named_suite(
    name: str, protocol: str | None, languages: str | None, domain: str | None
) -> Suite:
    """A suite by name or file, filtered by the options.

    Raises:
        InputError: an unknown name, or no task remains.
    """
    from gteopt.evaluation.suites import read_protocol, read_suite
    from gteopt.evaluation.task_facts import apply_protocol, filter_suite

    suite = read_suite(name)
    codes, domains = parse_name_list(languages), parse_name_list(domain)
    if codes or domains:
        suite = filter_suite(suite, languages=codes, domains=domains)
    return suite if protocol is None else apply_protocol(suite, read_protocol(protocol))


def apply_suite_time(
    budget: str,
    suite: Suite | None,
    sources: dict[str, str],
    out: Path | None,
    hub_dir: Path | None,
) -> Suite:
    """The part of a suite that fits a time; prints what it stands for.

    Raises:
        InputError: see `limit_evaluation_time`.
    """
    from gteopt.commands.estimate_evaluation import limit_evaluation_time
    from gteopt.config.amounts import parse_seconds
    from gteopt.evaluation.task_choice import describe_suite_part

    if suite is None:
        raise InputError("--budget chooses tasks of a suite; give --suite")
    part = limit_evaluation_time(
        sources, suite, parse_seconds("--budget", budget), out, hub_dir=hub_dir
    )
    print_status(describe_suite_part(part) or f"all of {suite.name} fits --budget {budget}")
    return part
