"""Facts about mteb's tasks without importing mteb: kind, data, languages, domains, size.

`eval/suites/tasks.json` has the facts for the tasks of the shipped suites. `eval/suites/make.py`
writes this file from mteb's metadata. Importing mteb takes seconds; reading the file does not.

Refuses to know: data, encoders, scores.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from gteopt.errors import InputError
from gteopt.evaluation.suites import Protocol, Suite, SuiteTask
from gteopt.frozen import Frozen
from gteopt.paths import read_shipped_json, shipped_dir

INSTRUCTION_TOKENS = 25
"""Assumed length of the instruction, which all texts have but the documents of a search."""
CHARACTERS_PER_TOKEN = {"eng": 4.5, "cmn": 1.5, "fra": 3.6, "pol": 2.7, "jpn": 1.5, "kor": 1.8}
"""Assumed for Qwen2's vocabulary, by ISO 639-3 code; other languages count as 3.0."""


class TextCount(Frozen):
    """Distinct texts of one split and subset, and their characters.

    Attributes:
        n_texts, n_characters: counts of the texts that have an instruction.
        n_documents, n_document_characters: counts of the documents of a search.
    """

    n_texts: int = 0
    n_characters: int = 0
    n_documents: int = 0
    n_document_characters: int = 0


class TaskFacts(Frozen):
    """Facts about one mteb task.

    Attributes:
        kind: mteb's task type.
        data: the data set on the Hub; "" for an aggregate.
        domains: mteb's names of domains, in lower case.
        languages: ISO 639-3 codes by subset; "*" stands for all subsets of a task with very many.
        sizes: text counts by split, then by subset or "*".
        parts: the tasks that make up an aggregate.
    """

    kind: str
    data: str = ""
    domains: tuple[str, ...] = ()
    languages: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    sizes: dict[str, dict[str, TextCount]] = Field(default_factory=dict)
    parts: tuple[str, ...] = ()


class _File(Frozen):
    """The content of the file on disk."""

    schema_: Annotated[str, Field(alias="schema", pattern=r"^gteopt\.tasks/1$")]
    mteb: str
    tasks: dict[str, TaskFacts]


@functools.cache
def read_task_facts() -> Mapping[str, TaskFacts]:
    """Facts by task name, for every mteb task in a shipped suite.

    Raises:
        IntegrityError: the installation is damaged.
    """
    return read_shipped_json(shipped_dir("eval/suites") / "tasks.json", _File).tasks


@dataclass(frozen=True)
class TaskAmount:
    """Estimated texts and tokens that scoring will encode.

    Attributes:
        n_texts: distinct texts.
        n_tokens: estimated from the number of characters.
        n_characters: about the size of the download in bytes.
    """

    n_texts: int = 0
    n_tokens: int = 0
    n_characters: int = 0

    def __add__(self, other: TaskAmount) -> TaskAmount:
        return TaskAmount(
            self.n_texts + other.n_texts,
            self.n_tokens + other.n_tokens,
            self.n_characters + other.n_characters,
        )


def task_amount(task: SuiteTask, max_tokens: int | None = None) -> TaskAmount | None:
    """Texts and tokens of one entry of a suite; None if the task is not known.

    Args:
        task: an entry of a suite.
        max_tokens: the longest input; limits the average tokens a text in each split.
    """
    facts = read_task_facts().get(task.task)
    if facts is None:
        return None
    if facts.parts:
        amounts = [task_amount(SuiteTask(task=part, splits=task.splits)) for part in facts.parts]
        return sum((amount for amount in amounts if amount is not None), TaskAmount())
    total = TaskAmount()
    for split in task.splits or tuple(facts.sizes):
        for subset, size in facts.sizes.get(split, {}).items():
            if task.subsets is None or subset in (*task.subsets, "*"):
                total += _amount(size, facts.languages.get(subset, ()), max_tokens)
    return total


def _amount(size: TextCount, languages: Iterable[str], max_tokens: int | None) -> TaskAmount:
    rates = [CHARACTERS_PER_TOKEN.get(code, 3.0) for code in languages] or [3.0]
    rate = sum(rates) / len(rates)
    texts = size.n_characters / rate + INSTRUCTION_TOKENS * size.n_texts
    documents = size.n_document_characters / rate
    if max_tokens is not None:
        texts = min(texts, max_tokens * size.n_texts)
        documents = min(documents, max_tokens * size.n_documents)
    return TaskAmount(
        size.n_texts + size.n_documents,
        round(texts + documents),
        size.n_characters + size.n_document_characters,
    )


_ISO_639_3 = {
    "ar": "ara", "cs": "ces", "da": "dan", "de": "deu", "el": "ell", "en": "eng", "es": "spa",
    "fi": "fin", "fr": "fra", "he": "heb", "hi": "hin", "hu": "hun", "it": "ita", "ja": "jpn",
    "ko": "kor", "nl": "nld", "no": "nor", "pl": "pol", "pt": "por", "ro": "ron", "ru": "rus",
    "sv": "swe", "th": "tha", "tr": "tur", "uk": "ukr", "vi": "vie", "zh": "cmn",
}  # fmt: skip
"""Two-letter language codes, and the three-letter codes that mteb uses."""


def filter_suite(
    suite: Suite, *, languages: Iterable[str] = (), domains: Iterable[str] = ()
) -> Suite:
    """The tasks and subsets of a suite in the given languages only, and of any given domain.

    Tasks of own data are kept. Tasks with more than 200 pairs of languages cannot be filtered by
    language and are left out.

    Args:
        suite: a suite of mteb tasks.
        languages: ISO 639 codes of two or three letters ("en", "fra"); empty keeps all.
        domains: mteb's names of domains ("legal"), in any case; empty keeps all.

    Raises:
        InputError: no task is left; the message lists the suite's languages and domains.
    """
    wanted = {_ISO_639_3.get(code.lower(), code.lower()) for code in languages}
    wanted_domains = {domain.lower() for domain in domains}
    known = read_task_facts()
    unknown = [task.task for task in suite.tasks if task.data is None and task.task not in known]
    if unknown and (wanted or wanted_domains):
        raise InputError(
            f"the languages and domains of {', '.join(unknown)} are not known, because no shipped "
            f"suite has these tasks; put them into another suite, and score it without a filter"
        )
    facts = {task.task: known.get(task.task, TaskFacts(kind="")) for task in suite.tasks}
    tasks = []
    for task in suite.tasks:
        if task.data is not None:
            tasks.append(task)
        elif not wanted_domains or wanted_domains & set(facts[task.task].domains):
            kept = _in_languages(task, facts[task.task], wanted)
            tasks += [] if kept is None else [kept]
    if all(task.data is not None for task in tasks):
        short = {long: code for code, long in _ISO_639_3.items()}
        codes = {
            code
            for task in suite.tasks
            for subset, subset_codes in facts[task.task].languages.items()
            if task.subsets is None or subset in task.subsets
            for code in subset_codes
        }
        known_languages = ", ".join(sorted(short.get(code, code) for code in codes))
        known_domains = sorted({domain for fact in facts.values() for domain in fact.domains})
        raise InputError(
            f"suite {suite.name} has no task of these languages and domains; its languages are "
            f"{known_languages}, its domains {', '.join(known_domains)}"
        )
    if tuple(tasks) == suite.tasks:
        return suite
    return suite.model_copy(update={"tasks": tuple(tasks), "published": None})


def _in_languages(task: SuiteTask, facts: TaskFacts, wanted: set[str]) -> SuiteTask | None:
    """The task with its subsets in these languages only; None if it has none."""
    if not wanted:
        return task
    languages_of = {
        subset: set(codes)
        for subset, codes in facts.languages.items()
        if task.subsets is None or subset in task.subsets or subset == "default"
    }
    fitting = tuple(
        subset for subset, codes in languages_of.items() if codes <= wanted and subset != "*"
    )
    if not fitting:
        return None
    return (
        task if len(fitting) == len(languages_of) else task.model_copy(update={"subsets": fitting})
    )


def apply_protocol(suite: Suite, protocol: Protocol) -> Suite:
    """The suite as a model's authors would score it; settings of single tasks are kept."""
    facts = read_task_facts()

    def adjusted(task: SuiteTask) -> SuiteTask:
        kind = facts[task.task].kind if task.task in facts else ""
        if task.normalize is not None or kind not in protocol.not_normalized:
            return task
        return task.model_copy(update={"normalize": False})

    return suite.model_copy(
        update={
            "tasks": tuple(adjusted(task) for task in suite.tasks),
            "max_tokens": suite.max_tokens or protocol.max_tokens,
            "normalize": suite.normalize and protocol.normalize,
            "protocol": protocol.name,
        }
    )
