"""What is known of each family of base models.

Hides: which facts a checkpoint's own files leave out or get wrong (attention direction, the end
token that pooling reads, the prompt template). Refuses to know: torch, files, how it is applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Pooling = Literal["lasttoken", "mean", "cls"]
Attention = Literal["bidirectional", "causal"]


@dataclass(frozen=True)
class Family:
    """Facts that hold for every model of a family.

    Attributes:
        attention: direction the model was trained with, whatever its config says.
        pooling: how token vectors become one vector.
        end_token: appended to every text exactly once; last-token pooling reads it.
        query_template: what precedes a query; `{instruction}` is filled in. Documents get nothing.
        default_instruction: used for a query when none is given.
        max_tokens: longest input, end token included.
    """

    name: str
    title: str
    attention: Attention
    pooling: Pooling
    end_token: str
    query_template: str
    default_instruction: str
    max_tokens: int


@dataclass(frozen=True)
class Published:
    """A published model: its license and the averages on its card (MTEB, C-MTEB, ...)."""

    family: str
    license: str
    scores: Mapping[str, float] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "gte-qwen": Family(
        name="gte-qwen",
        title="gte-Qwen: Qwen2 run bidirectionally, last token",
        attention="bidirectional",
        pooling="lasttoken",
        end_token="<|endoftext|>",
        query_template="Instruct: {instruction}\nQuery: ",
        default_instruction=(
            "Given a web search query, retrieve relevant passages that answer the query"
        ),
        max_tokens=32_768,
    ),
}

PUBLISHED: dict[str, Published] = {
    "Alibaba-NLP/gte-Qwen2-7B-instruct": Published(
        family="gte-qwen",
        license="apache-2.0",
        scores={"MTEB": 70.24, "C-MTEB": 72.05, "MTEB-fr": 68.25, "MTEB-pl": 67.86},
    ),
    "Alibaba-NLP/gte-Qwen1.5-7B-instruct": Published(
        family="gte-qwen", license="apache-2.0", scores={"MTEB": 67.34, "C-MTEB": 69.52}
    ),
}


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family that a checkpoint's `config.json` belongs to, or None.

    gte-Qwen checkpoints say `model_type: qwen2` like a plain language model; what tells them apart
    is `is_causal: false`, or the remote code that their `auto_map` names (never run here).
    """
    if config.get("model_type") == "qwen2":
        auto_map = config.get("auto_map") or {}
        names_gte_code = auto_map.get("AutoModel") == "modeling_qwen.Qwen2Model"
        if config.get("is_causal") is False or names_gte_code:
            return FAMILIES["gte-qwen"]
    return None
