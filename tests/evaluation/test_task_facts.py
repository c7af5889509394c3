"""Facts of tasks are mteb's own. They filter and change suites without importing mteb."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from gteopt.config.yaml_files import list_shipped_names
from gteopt.errors import InputError
from gteopt.evaluation.suites import Suite, SuiteTask, read_protocol, read_suite
from gteopt.evaluation.task_facts import (
    apply_protocol,
    filter_suite,
    read_task_facts,
    task_amount,
)


def suite_of(*tasks: str | dict[str, Any]) -> Suite:
    entries = [{"task": task} if isinstance(task, str) else task for task in tasks]
    return Suite.model_validate({"schema": "gteopt.suite/1", "name": "test", "tasks": entries})


def test_every_task_of_a_shipped_suite_is_known() -> None:
    facts = read_task_facts()
    for name in list_shipped_names("eval/suites"):
        for task in read_suite(name).tasks:
            amount = task_amount(task)
            assert amount is not None, task.task
            assert amount.n_texts > 0 or facts[task.task].kind == "Retrieval", task.task


@pytest.mark.parametrize("name", ["Banking77Classification", "STS22", "NFCorpus"])
def test_facts_are_those_of_mteb(name: str) -> None:
    import mteb

    metadata = mteb.get_task(name).metadata
    facts = read_task_facts()[name]
    assert facts.kind == metadata.type
    assert facts.data == metadata.dataset["path"]
    assert facts.domains == tuple(sorted(domain.lower() for domain in metadata.domains))
    scripts = metadata.hf_subsets_to_langscripts
    for subset, codes in facts.languages.items():
        assert set(codes) == {code.partition("-")[0] for code in scripts[subset]}


def test_texts_and_characters_are_mtebs_statistics() -> None:
    import mteb

    stats = mteb.get_task("NFCorpus").metadata.descriptive_stats["test"]
    size = read_task_facts()["NFCorpus"].sizes["test"]["default"]
    assert size.n_documents == stats["documents_text_statistics"]["unique_texts"]
    assert size.n_texts == stats["queries_text_statistics"]["unique_texts"]
    capped = task_amount(SuiteTask(task="NFCorpus", splits=("test",)), max_tokens=64)
    assert capped is not None
    assert capped.n_tokens <= 64 * capped.n_texts


def test_a_suite_is_filtered_by_language_and_domain() -> None:
    polish = filter_suite(read_suite("mteb-multi"), languages=["pl"])
    known = read_task_facts()
    for task in polish.tasks:
        languages = known[task.task].languages
        for subset in task.subsets or tuple(languages):
            assert set(languages[subset]) == {"pol"}
    assert len(polish.tasks) >= 5
    legal = filter_suite(read_suite("rteb"), domains=["Legal"])
    assert legal.tasks
    assert all("legal" in known[task.task].domains for task in legal.tasks)
    english = read_suite("mteb-en")
    assert filter_suite(english, languages=["en"]).tasks == english.tasks
    pairs = filter_suite(suite_of("MiniBitextMining"), languages=["en", "fr"])
    assert pairs.tasks[0].subsets == ("en-fr",)


def test_a_filter_that_leaves_nothing_says_what_there_is() -> None:
    with pytest.raises(InputError, match=r"its languages are en, its domains academic.*written"):
        filter_suite(read_suite("mteb-en"), languages=["xx"])


def test_protocols_change_length_and_normalization_as_the_authors_scripts_do() -> None:
    suite = suite_of("Banking77Classification", "STSBenchmark")
    gte = apply_protocol(suite, read_protocol("gte-authors"))
    assert (gte.max_tokens, gte.normalize, gte.protocol) == (512, False, "gte-authors")
    e5 = apply_protocol(suite, read_protocol("e5-authors"))
    assert (e5.max_tokens, e5.normalize) == (512, True)
    assert [task.normalize for task in e5.tasks] == [False, None]
    assert len({changed.sha256({}) for changed in (suite, gte, e5)}) == 3


def test_facts_and_suites_are_read_without_mteb_or_torch() -> None:
    code = (
        "import sys\n"
        "from gteopt.evaluation.suites import read_suite\n"
        "from gteopt.evaluation.task_facts import filter_suite\n"
        "filter_suite(read_suite('mteb-multi'), languages=['pl'])\n"
        "print({'mteb', 'torch', 'datasets'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
