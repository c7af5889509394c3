"""Instructions of gte-Qwen2's authors for mteb tasks; a query is prefixed with its instruction.

Source: `scripts/eval_mteb.py` beside the weights of Alibaba-NLP/gte-Qwen2-7B-instruct. The
published averages of the model were measured with this script. For tasks that are not listed here,
the script uses the descriptions of E5-mistral (Wang et al. 2023, arXiv:2401.00368, appendix), which
are in mteb's metadata. Three tasks are not in the script. They have its instruction for tasks of
the same kind.

Symmetric tasks (similarity, classification, clustering, pairs) put the instruction on every text.
The script does the same for the retrieval tasks in `SYMMETRIC`, whose documents are like queries.
Other model families that take instructions get the same instructions, on queries alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskInstruction:
    """The instruction that the texts of one task are prefixed with.

    Attributes:
        text: None for a model that takes no instructions.
        on_documents: whether the documents of a search have the instruction too.
    """

    text: str | None = None
    on_documents: bool = False


_SIMILAR = "Retrieve semantically similar text"
_PASSAGES = "Given a question, retrieve passages that answer the question"
_DUPLICATES = (
    "Given a question, retrieve detailed question descriptions from Stackexchange that are "
    "duplicates to the given question"
)
_SUMMARIES = "Given a news summary, retrieve other semantically similar summaries"
_PAPERS = "Identify the main category of scholar papers based on the titles"
_NEWS = "Identify the topic or theme of the given news articles"


def _alike(names: str, instruction: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), instruction)


_FORUMS = (
    "Android English Gaming Gis Mathematica Physics Programmers Stats Tex Unix Webmasters Wordpress"
)
_CQADUPSTACK = [f"CQADupstack{forum}Retrieval" for forum in _FORUMS.split()]

INSTRUCTIONS: dict[str, str] = {
    **_alike(
        "BIOSSES SICK-R STS12 STS13 STS14 STS15 STS16 STS17 STS22 STSBenchmark "
        "AFQMC ATEC BQ LCQMC PAWSX QBQTC STSB SICKFr STSBenchmarkMultilingualSTS CDSC-R SICK-R-PL "
        "PawsXPairClassification CDSC-E PpcPC PSC SICK-E-PL",
        _SIMILAR,
    ),
    **_alike("SummEval SummEvalFr", _SUMMARIES),
    **dict.fromkeys(_CQADUPSTACK, _DUPLICATES),
    **_alike(
        "AlloprofReranking SyntecReranking AlloprofRetrieval BSARDRetrieval MintakaRetrieval "
        "SyntecRetrieval XPQARetrieval",
        _PASSAGES,
    ),
    "MasakhaNEWSClassification": _NEWS,  # not in the script
    "AlloProfClusteringP2P": (
        "Identify the main category of Allo Prof document based on the titles and descriptions"
    ),
    "AlloProfClusteringS2S": (
        "Identify the main category of Allo Prof document based on the titles"
    ),
    "HALClusteringS2S": (
        "Identify the main category of academic passage based on the titles and contents"
    ),
    "MasakhaNEWSClusteringP2P": f"{_NEWS} based on the titles and contents",
    "MasakhaNEWSClusteringS2S": f"{_NEWS} based on the titles",
    "MLSUMClusteringP2P": (
        "Identify the topic or theme of the given articles based on the titles and contents"
    ),
    "MLSUMClusteringS2S": "Identify the topic or theme of the given articles based on the titles",
    "CBD": "Classify the sentiment of polish tweet reviews",
    "PolEmo2.0-IN": "Classify the sentiment of in-domain (medicine and hotels) online reviews",
    "PolEmo2.0-OUT": (
        "Classify the sentiment of out-of-domain (products and school) online reviews"
    ),
    "AllegroReviews": "Classify the sentiment of reviews from e-commerce marketplace Allegro",
    "PAC": (
        'Classify the sentence into one of the two types: "BEZPIECZNE_POSTANOWIENIE_UMOWNE" and '
        '"KLAUZULA_ABUZYWNA"'
    ),
    "EightTagsClustering": (  # the script has these two spaces too
        "Identify of headlines from social media posts in Polish  into 8 categories: film, "
        "history, food, medicine, motorization, work, sport and technology"
    ),
    "PlscClusteringS2S": _PAPERS,  # not in the script
    "PlscClusteringP2P": f"{_PAPERS} and abstracts",  # not in the script
}

SYMMETRIC: frozenset[str] = frozenset({"ArguAna", "QuoraRetrieval", *_CQADUPSTACK})


def instructs_documents(family: str | None, task: str) -> bool:
    """Whether a family's authors put the instruction on the documents of a search too.

    This includes the translations of ArguAna (ArguAna-PL, ArguAna-Fa). Their documents and queries
    are both arguments.
    """
    return family == "gte-qwen" and (task in SYMMETRIC or task.startswith("ArguAna"))
