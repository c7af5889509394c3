"""What is known of each family of base models.

Hides: which facts a checkpoint's own files leave out or get wrong (attention direction, the tokens
around a text, the prompt template), and what a family is recognised by. Refuses to know: torch,
files, how it is applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Pooling = Literal["lasttoken", "mean", "cls", "latent", "modules"]
"""How token vectors become one; "modules" is a sequence that only Sentence Transformers runs."""
Attention = Literal["bidirectional", "causal"]


@dataclass(frozen=True)
class Family:
    """Facts that hold for every model of a family.

    Attributes:
        name: also part of its models' names, in any case.
        attention: direction the model was trained with, whatever its config says.
        pooling: how token vectors become one vector; "latent" is NV-Embed's latent attention and
            then the mean over the text without its instruction.
        start_token: put before every text exactly once; None where there is none.
        end_token: appended to every text exactly once; last-token pooling reads it.
        query_template: what precedes a query; `{instruction}` is filled in. Documents get nothing.
        default_instruction: used for a query when none is given.
        max_tokens: longest input, start and end token included.
        least_dims: trained for every shorter vector down to this many dimensions (Matryoshka);
            None where the authors state nothing.
    """

    name: str
    title: str
    attention: Attention
    pooling: Pooling
    end_token: str
    query_template: str
    default_instruction: str
    max_tokens: int
    start_token: str | None = None
    least_dims: int | None = None


@dataclass(frozen=True)
class Published:
    """A published model: its license, size and the averages on its card (MTEB, C-MTEB, ...)."""

    family: str
    license: str
    dims: int
    scores: Mapping[str, float] = field(default_factory=dict)


_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"

FAMILIES: dict[str, Family] = {
    "gte-qwen": Family(
        name="gte-qwen",
        title="gte-Qwen: Qwen2 run bidirectionally, last token",
        attention="bidirectional",
        pooling="lasttoken",
        end_token="<|endoftext|>",
        query_template="Instruct: {instruction}\nQuery: ",
        default_instruction=_SEARCH,
        max_tokens=32_768,
    ),
    "qwen3-embedding": Family(
        name="qwen3-embedding",
        title="Qwen3-Embedding: Qwen3, causal, last token",
        attention="causal",
        pooling="lasttoken",
        end_token="<|endoftext|>",
        query_template="Instruct: {instruction}\nQuery:",
        default_instruction=_SEARCH,
        max_tokens=32_768,
        least_dims=32,
    ),
    "e5-mistral": Family(
        name="e5-mistral",
        title="e5-mistral: Mistral, causal, last token",
        attention="causal",
        pooling="lasttoken",
        start_token="<s>",
        end_token="</s>",
        query_template="Instruct: {instruction}\nQuery: ",
        default_instruction=_SEARCH,
        max_tokens=4096,
    ),
    "nv-embed": Family(
        name="nv-embed",
        title="NV-Embed: Mistral run bidirectionally, latent-attention pooling (arXiv:2405.17428)",
        attention="bidirectional",
        pooling="latent",
        start_token="<s>",
        end_token="</s>",
        query_template="Instruct: {instruction}\nQuery: ",
        default_instruction="Given a question, retrieve passages that answer the question",
        max_tokens=32_768,
    ),
}

PUBLISHED: dict[str, Published] = {
    "Alibaba-NLP/gte-Qwen2-7B-instruct": Published(
        family="gte-qwen",
        license="apache-2.0",
        dims=3584,
        scores={"MTEB": 70.24, "C-MTEB": 72.05, "MTEB-fr": 68.25, "MTEB-pl": 67.86},
    ),
    "Alibaba-NLP/gte-Qwen2-1.5B-instruct": Published(
        family="gte-qwen",
        license="apache-2.0",
        dims=1536,
        scores={"MTEB": 67.16, "C-MTEB": 67.65, "MTEB-fr": 66.60, "MTEB-pl": 64.04},
    ),
    "Alibaba-NLP/gte-Qwen1.5-7B-instruct": Published(
        family="gte-qwen",
        license="apache-2.0",
        dims=4096,
        scores={"MTEB": 67.34, "C-MTEB": 69.52},
    ),
    "intfloat/e5-mistral-7b-instruct": Published(
        family="e5-mistral", license="mit", dims=4096, scores={"MTEB": 66.63, "C-MTEB": 60.81}
    ),
    "infly/inf-retriever-v1": Published(family="gte-qwen", license="apache-2.0", dims=3584),
    "infly/inf-retriever-v1-1.5b": Published(family="gte-qwen", license="apache-2.0", dims=1536),
    "nvidia/NV-Embed-v1": Published(
        family="nv-embed", license="cc-by-nc-4.0", dims=4096, scores={"MTEB": 69.32}
    ),
    "nvidia/NV-Embed-v2": Published(family="nv-embed", license="cc-by-nc-4.0", dims=4096),
    "Qwen/Qwen3-Embedding-0.6B": Published(
        family="qwen3-embedding",
        license="apache-2.0",
        dims=1024,
        scores={"MTEB(eng, v2)": 70.70, "C-MTEB": 66.33, "MTEB(Multilingual)": 64.33},
    ),
    "Qwen/Qwen3-Embedding-4B": Published(
        family="qwen3-embedding",
        license="apache-2.0",
        dims=2560,
        scores={"MTEB(eng, v2)": 74.60, "C-MTEB": 72.27, "MTEB(Multilingual)": 69.45},
    ),
    "Qwen/Qwen3-Embedding-8B": Published(
        family="qwen3-embedding",
        license="apache-2.0",
        dims=4096,
        scores={"MTEB(eng, v2)": 75.22, "C-MTEB": 73.84, "MTEB(Multilingual)": 70.58},
    ),
}

_DECODER_FAMILIES = {
    "qwen2": "gte-qwen",
    "mistral": "e5-mistral",
    "qwen3": "qwen3-embedding",
}


def family_of(
    config: Mapping[str, Any], *, name: str = "", prompts: Iterable[str] = (), pooling: str = ""
) -> Family | None:
    """The family that a checkpoint belongs to, or None.

    NV-Embed's config says so. The others' are those of the language models they were made from, and
    a family is known by its name, or
    - gte-Qwen by the remote code that its `auto_map` names (never run here), or by `is_causal:
      false` where Sentence Transformers files name no other pooling or prompts (others have made
      bidirectional encoders from Qwen2, too);
    - e5-mistral and Qwen3-Embedding by what Sentence Transformers reads: last-token pooling and a
      prompt of the family's form.
    Any other encoder is run as its folder says.

    Args:
        config: of `config.json`.
        name: Hub id or name of the folder.
        prompts: in `config_sentence_transformers.json`.
        pooling: what the modules say; "" where no file says.
    """
    kind = str(config.get("model_type"))
    if kind == "nvembed" or "latent_attention_config" in config:
        return FAMILIES["nv-embed"]
    if kind not in _DECODER_FAMILIES:
        return None
    family = FAMILIES[_DECODER_FAMILIES[kind]]
    auto_map = config.get("auto_map") or {}
    if kind == "qwen2" and auto_map.get("AutoModel") == "modeling_qwen.Qwen2Model":
        return family
    if pooling not in ("", "lasttoken"):
        return None
    before, after = family.query_template.split("{instruction}")
    said = [each for each in prompts if each]
    is_prompted = any(each.startswith(before) and each.endswith(after) for each in said)
    if kind == "qwen2":
        is_marked = config.get("is_causal") is False and (is_prompted or not said)
    else:
        is_marked = is_prompted and pooling == "lasttoken"
    return family if is_marked or family.name in name.lower() else None
