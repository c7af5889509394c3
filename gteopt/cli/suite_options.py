"""The suite that the options of a command leave: by language, domain, protocol and time.

Refuses to know: data, encoders, scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gteopt.cli.output import say
from gteopt.errors import InputError

if TYPE_CHECKING:
    from gteopt.evaluation.suites import Suite


def named_suite(
    name: str, protocol: str | None, languages: str | None, domain: str | None
) -> Suite:
    """A suite by name or file, with what the options leave of it.

    Raises:
        InputError: an unknown name, or nothing is left.
    """
    from gteopt.evaluation.suites import read_protocol, read_suite
    from gteopt.evaluation.task_facts import filter_suite, under_protocol

    suite = read_suite(name)
    wanted = [
        [each.strip() for each in (names or "").split(",") if each.strip()]
        for names in (languages, domain)
    ]
    if any(wanted):
        suite = filter_suite(suite, languages=wanted[0], domains=wanted[1])
    return suite if protocol is None else under_protocol(suite, read_protocol(protocol))


def within(
    budget: str,
    suite: Suite | None,
    sources: dict[str, str],
    out: Path | None,
    hub_dir: Path | None,
) -> Suite:
    """The part of a suite that fits a time; says what it stands for.

    Raises:
        InputError: see `within_budget`.
    """
    from gteopt.commands.estimate_evaluation import within_budget
    from gteopt.config.amounts import parse_seconds
    from gteopt.evaluation.task_choice import part_in_words

    if suite is None:
        raise InputError("--budget chooses from a suite; give --suite")
    part = within_budget(sources, suite, parse_seconds("--budget", budget), out, hub_dir=hub_dir)
    say(part_in_words(part) or f"all of {suite.name} fits --budget {budget}")
    return part
