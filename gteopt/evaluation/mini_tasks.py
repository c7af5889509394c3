"""Define the mini set: five small tasks that ship with gteopt, as subclasses of mteb's tasks.

Hides: where the rows are stored. Refuses to know: encoders, scores.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset, DatasetDict
from mteb import TaskMetadata
from mteb.abstasks import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskRetrieval,
    AbsTaskSTS,
)

from gteopt.paths import shipped_dir

_LANGUAGES = {"en": "eng-Latn", "fr": "fra-Latn", "pl": "pol-Latn", "zh": "cmn-Hans"}
_MINI_PATH = "gteopt/mini"
_MINI_DIR = "eval/mini"


def mini_rows(name: str) -> list[dict[str, Any]]:
    """Rows of one file of the mini set."""
    path = shipped_dir(_MINI_DIR) / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _mini(name: str, kind: str, main_score: str, languages: Any, **more: Any) -> Any:
    return TaskMetadata(
        name=name,
        type=kind,
        main_score=main_score,
        eval_langs=languages,
        # The folder is known only at run time, because the package may be a wheel or a checkout.
        dataset={"path": _MINI_PATH, "revision": "shipped"},
        license="cc0-1.0",
        sample_creation="created",
        **more,
    )


class MiniRetrieval(AbsTaskRetrieval):  # type: ignore[misc]
    """Short queries over documents in four languages; many queries match another language."""

    metadata = _mini(
        "MiniRetrieval",
        "Retrieval",
        "ndcg_at_10",
        list(_LANGUAGES.values()),
        description="Queries and documents on 16 everyday topics, in one multilingual pool.",
        prompt="Given a web search query, retrieve relevant passages that answer the query",
    )

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Read the mini set."""
        relevant: dict[str, dict[str, int]] = {}
        for row in mini_rows("qrels"):
            relevant.setdefault(row["query_id"], {})[row["corpus_id"]] = row["score"]
        columns = ("id", "text")
        data = {
            "corpus": _dataset(mini_rows("corpus"), columns),
            "queries": _dataset(mini_rows("queries"), columns),
            "relevant_docs": relevant,
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": data}}
        self.data_loaded = True


class MiniSTS(AbsTaskSTS):  # type: ignore[misc]
    """Graded similarity of sentence pairs within each language."""

    metadata = _mini(
        "MiniSTS",
        "STS",
        "cosine_spearman",
        {language: [code] for language, code in _LANGUAGES.items()},
        description="Sentence pairs with similarity from 0 to 5, many with one telling difference.",
    )

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Read the mini set."""
        columns = ("sentence1", "sentence2", "score")
        rows = mini_rows("sts")
        self.dataset = {
            language: DatasetDict({"test": _dataset(_of(rows, "language", language), columns)})
            for language in self.hf_subsets
        }
        self.data_loaded = True


class MiniIntentClassification(AbsTaskClassification):  # type: ignore[misc]
    """Intents of messages to a library, all languages together: tests for a shared vector space."""

    metadata = _mini(
        "MiniIntentClassification",
        "Classification",
        "accuracy",
        list(_LANGUAGES.values()),
        description="Messages to a public library, by what the writer wants.",
        prompt="Given a message to a public library, find the corresponding intent",
    )

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Read the mini set."""
        rows = mini_rows("intents")
        self.dataset = DatasetDict(
            {
                split: _dataset(_of(rows, "split", split), ("text", "label"))
                for split in ("train", "test")
            }
        )
        self.data_loaded = True


class _WithoutReplacement(random.Random):
    """A generator whose `choices` never returns an item twice."""

    def choices(self, population: Any, *args: Any, k: int = 1, **kwargs: Any) -> list[Any]:
        return self.sample(population, k=min(k, len(population)))


class MiniTopicClustering(AbsTaskClustering):  # type: ignore[misc]
    """Topics of the retrieval task's documents, within each language.

    k-means runs ten times over all documents of a language, in different orders. The task differs
    from mteb's clusterings in two ways, because it has few texts. It draws without replacement: two
    copies of a text share a cluster whatever the model, which raises the score of any model. It
    uses adjusted mutual information, because V-measure is far above 0 by chance on few texts.
    """

    metadata = _mini(
        "MiniTopicClustering",
        "Clustering",
        "ami",
        {language: [code] for language, code in _LANGUAGES.items()},
        description="Passages to be grouped by topic.",
        prompt="Identify the topic of the given passages",
    )
    max_fraction_of_documents_to_embed = None

    def __init__(self, seed: int = 42, **kwargs: Any) -> None:
        super().__init__(seed, **kwargs)
        self.rng_state = _WithoutReplacement(seed)

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Read the mini set."""
        rows = mini_rows("corpus")
        self.dataset = {}
        for language in self.hf_subsets:
            in_language = _of(rows, "language", language)
            columns = {
                "sentences": [row["text"] for row in in_language],
                "labels": [row["topic"] for row in in_language],
            }
            self.dataset[language] = DatasetDict({"test": Dataset.from_dict(columns)})
        self.data_loaded = True


class MiniBitextMining(AbsTaskBitextMining):  # type: ignore[misc]
    """Find the translation of each English sentence among similar sentences."""

    metadata = _mini(
        "MiniBitextMining",
        "BitextMining",
        "f1",
        {f"en-{other}": ["eng-Latn", _LANGUAGES[other]] for other in ("fr", "pl", "zh")},
        description="Sentences with their translations; neighbours differ in one detail.",
    )

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Read the mini set."""
        rows = mini_rows("bitext")
        self.dataset = {}
        for pair in self.hf_subsets:
            first, second = pair.split("-")
            columns = {
                "sentence1": [row[first] for row in rows],
                "sentence2": [row[second] for row in rows],
            }
            self.dataset[pair] = DatasetDict({"test": Dataset.from_dict(columns)})
        self.data_loaded = True


MINI_TASKS: dict[str, type[AbsTask]] = {
    task.metadata.name: task
    for task in (
        MiniRetrieval,
        MiniSTS,
        MiniIntentClassification,
        MiniTopicClustering,
        MiniBitextMining,
    )
}


def _dataset(rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> Dataset:
    return Dataset.from_list([{column: row[column] for column in columns} for row in rows])


def _of(rows: Sequence[dict[str, Any]], field: str, value: str) -> list[dict[str, Any]]:
    return [row for row in rows if row[field] == value]
