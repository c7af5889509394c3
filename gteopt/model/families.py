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
        attention: direction the model was trained with, whatever its config says; None where the
            config is right.
        pooling: how token vectors become one vector; "latent" is NV-Embed's latent attention and
            then the mean over the text without its instruction. None where only the folder says.
        start_token: put before every text exactly once; None leaves it to the tokenizer.
        end_token: appended to every text exactly once; last-token pooling reads it. None leaves it
            to the tokenizer.
        query_template: what precedes a query; `{instruction}` is filled in.
        document_prompt: what precedes a document.
        excludes_prompt: whether the mean leaves out what precedes a text.
        default_instruction: used for a query when none is given.
        max_tokens: longest input, start and end token included.
        least_dims: trained for every shorter vector down to this many dimensions (Matryoshka);
            None where the authors state nothing.
    """

    name: str
    title: str
    query_template: str
    default_instruction: str
    max_tokens: int
    attention: Attention | None = None
    pooling: Pooling | None = None
    start_token: str | None = None
    end_token: str | None = None
    document_prompt: str = ""
    excludes_prompt: bool = False
    least_dims: int | None = None


@dataclass(frozen=True)
class Published:
    """A published model: its license, size and the averages on its card (MTEB, C-MTEB, ...).

    Attributes:
        license: None where no package at hand states it.
        dims: of its vectors.
        family: whose facts hold for it; None where its own files say all.
        shape: the shipped `config.json` with its sizes, where that is another model's.
        attention, pooling, max_tokens: as its files say, where its family does not; None where
            that could not be confirmed.
        query_prompt, document_prompt: as its files say, where its family has no template.
        dense: output features of the Dense modules behind its pooling.
        trained_dims: shorter lengths that its authors trained for, longest first.
    """

    license: str | None
    dims: int
    family: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    shape: str = ""
    attention: Attention | None = None
    pooling: Pooling | None = None
    max_tokens: int | None = None
    query_prompt: str = ""
    document_prompt: str = ""
    dense: tuple[int, ...] = ()
    trained_dims: tuple[int, ...] = ()


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
    "octen-embedding": Family(
        name="octen-embedding",
        title="Octen-Embedding: made from Qwen3-Embedding",
        attention="causal",
        pooling="lasttoken",
        end_token="<|endoftext|>",
        query_template="Instruct: {instruction}\nQuery:",
        default_instruction=_SEARCH,
        max_tokens=32_768,
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
    "gritlm": Family(
        name="gritlm",
        title="GritLM: Mistral run bidirectionally, mean of the text alone (arXiv:2402.09906)",
        attention="bidirectional",
        pooling="mean",
        query_template="<|user|>\n{instruction}\n<|embed|>\n",
        document_prompt="<|embed|>\n",
        excludes_prompt=True,
        default_instruction=_SEARCH,
        max_tokens=32_768,
    ),
    "f2llm-v2": Family(
        name="f2llm-v2",
        title="F2LLM-v2: Qwen3, causal, last token",
        pooling="lasttoken",
        query_template="Instruct: {instruction}\nQuery: ",
        default_instruction=_SEARCH,
        max_tokens=40_960,
    ),
    "harrier-oss": Family(
        name="harrier-oss",
        title="harrier-oss: Gemma 3 or Qwen3, causal, last token",
        pooling="lasttoken",
        query_template="Instruct: {instruction}\nQuery:",
        default_instruction=_SEARCH,
        max_tokens=32_768,
    ),
    "kalm-embedding-gemma3": Family(
        name="kalm-embedding-gemma3",
        title="KaLM-Embedding-Gemma3: Gemma 3",
        query_template="Instruct: {instruction} \n Query: ",
        default_instruction=_SEARCH,
        max_tokens=32_768,
    ),
    "multilingual-e5-large-instruct": Family(
        name="multilingual-e5-large-instruct",
        title="multilingual-e5-large-instruct: XLM-RoBERTa, mean",
        pooling="mean",
        query_template="Instruct: {instruction}\nQuery: ",
        default_instruction=_SEARCH,
        max_tokens=512,
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
    "infly/inf-retriever-v1": Published(
        family="gte-qwen", license="apache-2.0", dims=3584, shape="gte-Qwen2-7B-instruct"
    ),
    "infly/inf-retriever-v1-1.5b": Published(
        family="gte-qwen", license="apache-2.0", dims=1536, shape="gte-Qwen2-1.5B-instruct"
    ),
    "nvidia/NV-Embed-v1": Published(
        family="nv-embed", license="cc-by-nc-4.0", dims=4096, scores={"MTEB": 69.32}
    ),
    "nvidia/NV-Embed-v2": Published(
        family="nv-embed", license="cc-by-nc-4.0", dims=4096, shape="NV-Embed-v1"
    ),
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
    "Salesforce/SFR-Embedding-Mistral": Published(
        family="e5-mistral", license="cc-by-nc-4.0", dims=4096, shape="e5-mistral-7b-instruct"
    ),
    "Salesforce/SFR-Embedding-2_R": Published(
        family="e5-mistral", license="cc-by-nc-4.0", dims=4096, shape="e5-mistral-7b-instruct"
    ),
    "Linq-AI-Research/Linq-Embed-Mistral": Published(
        family="e5-mistral", license="cc-by-nc-4.0", dims=4096, shape="e5-mistral-7b-instruct"
    ),
    "Octen/Octen-Embedding-0.6B": Published(
        family="octen-embedding",
        license="apache-2.0",
        dims=1024,
        shape="Qwen3-Embedding-0.6B",
    ),
    "Octen/Octen-Embedding-4B": Published(
        family="octen-embedding",
        license="apache-2.0",
        dims=2560,
        shape="Qwen3-Embedding-4B",
    ),
    "Octen/Octen-Embedding-8B": Published(
        family="octen-embedding",
        license="apache-2.0",
        dims=4096,
        shape="Qwen3-Embedding-8B",
    ),
    "codefuse-ai/F2LLM-v2-80M": Published(
        family="f2llm-v2", license="apache-2.0", dims=320, attention="causal"
    ),
    "codefuse-ai/F2LLM-v2-160M": Published(
        family="f2llm-v2", license="apache-2.0", dims=640, attention="causal"
    ),
    "codefuse-ai/F2LLM-v2-330M": Published(
        family="f2llm-v2", license="apache-2.0", dims=896, attention="causal"
    ),
    "codefuse-ai/F2LLM-v2-0.6B": Published(family="f2llm-v2", license="apache-2.0", dims=1024),
    "codefuse-ai/F2LLM-v2-1.7B": Published(family="f2llm-v2", license="apache-2.0", dims=2048),
    "codefuse-ai/F2LLM-v2-4B": Published(family="f2llm-v2", license="apache-2.0", dims=2560),
    "codefuse-ai/F2LLM-v2-8B": Published(family="f2llm-v2", license="apache-2.0", dims=4096),
    "codefuse-ai/F2LLM-v2-14B": Published(family="f2llm-v2", license="apache-2.0", dims=5120),
    "microsoft/harrier-oss-v1-270m": Published(family="harrier-oss", license="mit", dims=640),
    "microsoft/harrier-oss-v1-0.6b": Published(family="harrier-oss", license="mit", dims=1024),
    "microsoft/harrier-oss-v1-27b": Published(family="harrier-oss", license="mit", dims=5376),
    "tencent/KaLM-Embedding-Gemma3-12B-2511": Published(
        family="kalm-embedding-gemma3",
        license=None,
        dims=3840,
        trained_dims=(3840, 2048, 1024, 512, 256, 128, 64),
    ),
    "GritLM/GritLM-7B": Published(
        family="gritlm", license="apache-2.0", dims=4096, shape="NV-Embed-v1"
    ),
    "intfloat/multilingual-e5-large-instruct": Published(
        family="multilingual-e5-large-instruct", license="mit", dims=1024
    ),
    "nvidia/Nemotron-3-Embed-1B-BF16": Published(
        license="openmdw-1.1",
        dims=2048,
        attention="bidirectional",
        pooling="mean",
        max_tokens=32_768,
        query_prompt="query: ",
        document_prompt="passage: ",
    ),
    "nvidia/Nemotron-3-Embed-8B-BF16": Published(
        license="openmdw-1.1",
        dims=4096,
        attention="bidirectional",
        pooling="mean",
        max_tokens=32_768,
        query_prompt="query: ",
        document_prompt="passage: ",
    ),
    "google/embeddinggemma-300m": Published(
        license="gemma",
        dims=768,
        attention="bidirectional",
        pooling="mean",
        max_tokens=2048,
        query_prompt="task: search result | query: ",
        document_prompt="title: none | text: ",
        dense=(3072, 768),
        trained_dims=(768, 512, 256, 128),
    ),
    "Alibaba-NLP/gte-modernbert-base": Published(
        license="apache-2.0",
        dims=768,
        attention="bidirectional",
        pooling="cls",
        max_tokens=8192,
    ),
    "BAAI/bge-m3": Published(
        license="mit", dims=1024, attention="bidirectional", pooling="cls", max_tokens=8192
    ),
}

_DECODER_FAMILIES = {
    "qwen2": "gte-qwen",
    "mistral": "e5-mistral",
    "qwen3": "qwen3-embedding",
}
_NAMED = tuple(
    FAMILIES[name]
    for name in (
        *("gritlm", "octen-embedding", "f2llm-v2", "harrier-oss", "kalm-embedding-gemma3"),
        "multilingual-e5-large-instruct",
    )
)
"""Families that leave to the folder what another family of the same architecture does not."""


def family_of(
    config: Mapping[str, Any], *, name: str = "", prompts: Iterable[str] = (), pooling: str = ""
) -> Family | None:
    """The family that a checkpoint belongs to, or None.

    NV-Embed's config says so. Any family is known by its name in the model's, and
    - GritLM and gte-Qwen by the remote code that their `auto_map` names (never run here);
    - gte-Qwen by `is_causal: false` where Sentence Transformers files name no other pooling or
      prompts (others have made bidirectional encoders from Qwen2, too);
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
    auto_map = config.get("auto_map")
    code = str(auto_map.get("AutoModel")) if isinstance(auto_map, Mapping) else ""
    named = next((f for f in _NAMED if f.name in name.lower()), None)
    if named is not None or code.startswith("modeling_gritlm7b."):
        return named or FAMILIES["gritlm"]
    if kind not in _DECODER_FAMILIES:
        return None
    family = FAMILIES[_DECODER_FAMILIES[kind]]
    if kind == "qwen2" and code == "modeling_qwen.Qwen2Model":
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
