"""The table of model families and of their published models.

Hides: which facts a checkpoint's own files leave out or get wrong (attention direction, the tokens
around a text, the prompt template), and how a family is recognised. Refuses to know: torch, files,
how the facts are applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Pooling = Literal["lasttoken", "mean", "cls", "latent", "modules"]
"""How token vectors become one; with "modules", Sentence Transformers' own modules pool."""
Attention = Literal["bidirectional", "causal"]


@dataclass(frozen=True)
class Family:
    """Facts that hold for every model of a family.

    Attributes:
        name: its models' names contain it, in upper or lower case.
        title: name, architecture and pooling in a line.
        attention: direction that the model was trained with, whatever its config says; None if the
            config is right.
        pooling: how token vectors become one vector. "latent" is NV-Embed's latent attention and
            then the mean over the text without its instruction. None if only the folder says.
        start_token: put before every text exactly once; None leaves it to the tokenizer.
        end_token: appended to every text exactly once; last-token pooling reads it. None leaves it
            to the tokenizer.
        query_template: text before a query; `{instruction}` is filled in.
        document_prompt: text before a document.
        excludes_prompt: whether the mean leaves out the tokens of the prompt.
        default_instruction: instruction of a query that has none.
        max_tokens: longest input with start and end token.
        least_dims: the model was trained for halved lengths down to this (Matryoshka); None if the
            authors state nothing.
    """

    name: str
    title: str
    attention: Attention | None = None
    pooling: Pooling | None = None
    start_token: str | None = None
    end_token: str | None = None
    query_template: str = "Instruct: {instruction}\nQuery: "
    document_prompt: str = ""
    excludes_prompt: bool = False
    default_instruction: str = (
        "Given a web search query, retrieve relevant passages that answer the query"
    )
    max_tokens: int = 32_768
    least_dims: int | None = None


@dataclass(frozen=True)
class PublishedModel:
    """A published model.

    Attributes:
        license: None if no source at hand states it.
        dims: dimensions of its vectors.
        family: the family whose facts hold for it; None if its own files say everything.
        scores: averages on its card by benchmark (MTEB, C-MTEB, ...).
        shape: name of the other model whose shipped `config.json` has its sizes; "" if its own
            is shipped.
        attention, pooling, max_tokens: from its files, if its family states none; None if that
            could not be confirmed.
        query_prompt, document_prompt: from its files, if its family has no template.
        dense: output features of the Dense modules after its pooling.
        trained_dims: lengths that its authors trained for, longest first.
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


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            "gte-qwen",
            "gte-Qwen: Qwen2 run bidirectionally, last token",
            attention="bidirectional",
            pooling="lasttoken",
            end_token="<|endoftext|>",
        ),
        Family(
            "qwen3-embedding",
            "Qwen3-Embedding: Qwen3, causal, last token",
            attention="causal",
            pooling="lasttoken",
            end_token="<|endoftext|>",
            query_template="Instruct: {instruction}\nQuery:",
            least_dims=32,
        ),
        Family(
            "octen-embedding",
            "Octen-Embedding: made from Qwen3-Embedding",
            attention="causal",
            pooling="lasttoken",
            end_token="<|endoftext|>",
            query_template="Instruct: {instruction}\nQuery:",
        ),
        Family(
            "e5-mistral",
            "e5-mistral: Mistral, causal, last token",
            attention="causal",
            pooling="lasttoken",
            start_token="<s>",
            end_token="</s>",
            max_tokens=4096,
        ),
        Family(
            "nv-embed",
            "NV-Embed: Mistral run bidirectionally, latent-attention pooling (arXiv:2405.17428)",
            attention="bidirectional",
            pooling="latent",
            start_token="<s>",
            end_token="</s>",
            default_instruction="Given a question, retrieve passages that answer the question",
        ),
        Family(
            "gritlm",
            "GritLM: Mistral run bidirectionally, mean of the text alone (arXiv:2402.09906)",
            attention="bidirectional",
            pooling="mean",
            query_template="<|user|>\n{instruction}\n<|embed|>\n",
            document_prompt="<|embed|>\n",
            excludes_prompt=True,
        ),
        Family(
            "f2llm-v2",
            "F2LLM-v2: Qwen3, causal, last token",
            pooling="lasttoken",
            max_tokens=40_960,
        ),
        Family(
            "harrier-oss",
            "harrier-oss: Gemma 3 or Qwen3, causal, last token",
            pooling="lasttoken",
            query_template="Instruct: {instruction}\nQuery:",
        ),
        Family(
            "kalm-embedding-gemma3",
            "KaLM-Embedding-Gemma3: Gemma 3",
            query_template="Instruct: {instruction} \n Query: ",
        ),
        Family(
            "multilingual-e5-large-instruct",
            "multilingual-e5-large-instruct: XLM-RoBERTa, mean",
            pooling="mean",
            max_tokens=512,
        ),
    )
}

PUBLISHED: Mapping[str, PublishedModel] = {
    "Alibaba-NLP/gte-Qwen2-7B-instruct": PublishedModel(
        "apache-2.0",
        3584,
        "gte-qwen",
        scores={"MTEB": 70.24, "C-MTEB": 72.05, "MTEB-fr": 68.25, "MTEB-pl": 67.86},
    ),
    "Alibaba-NLP/gte-Qwen2-1.5B-instruct": PublishedModel(
        "apache-2.0",
        1536,
        "gte-qwen",
        scores={"MTEB": 67.16, "C-MTEB": 67.65, "MTEB-fr": 66.60, "MTEB-pl": 64.04},
    ),
    "Alibaba-NLP/gte-Qwen1.5-7B-instruct": PublishedModel(
        "apache-2.0", 4096, "gte-qwen", scores={"MTEB": 67.34, "C-MTEB": 69.52}
    ),
    "intfloat/e5-mistral-7b-instruct": PublishedModel(
        "mit", 4096, "e5-mistral", scores={"MTEB": 66.63, "C-MTEB": 60.81}
    ),
    "infly/inf-retriever-v1": PublishedModel(
        "apache-2.0", 3584, "gte-qwen", shape="gte-Qwen2-7B-instruct"
    ),
    "infly/inf-retriever-v1-1.5b": PublishedModel(
        "apache-2.0", 1536, "gte-qwen", shape="gte-Qwen2-1.5B-instruct"
    ),
    "nvidia/NV-Embed-v1": PublishedModel("cc-by-nc-4.0", 4096, "nv-embed", scores={"MTEB": 69.32}),
    "nvidia/NV-Embed-v2": PublishedModel("cc-by-nc-4.0", 4096, "nv-embed", shape="NV-Embed-v1"),
    "Qwen/Qwen3-Embedding-0.6B": PublishedModel(
        "apache-2.0",
        1024,
        "qwen3-embedding",
        scores={"MTEB(eng, v2)": 70.70, "C-MTEB": 66.33, "MTEB(Multilingual)": 64.33},
    ),
    "Qwen/Qwen3-Embedding-4B": PublishedModel(
        "apache-2.0",
        2560,
        "qwen3-embedding",
        scores={"MTEB(eng, v2)": 74.60, "C-MTEB": 72.27, "MTEB(Multilingual)": 69.45},
    ),
    "Qwen/Qwen3-Embedding-8B": PublishedModel(
        "apache-2.0",
        4096,
        "qwen3-embedding",
        scores={"MTEB(eng, v2)": 75.22, "C-MTEB": 73.84, "MTEB(Multilingual)": 70.58},
    ),
    "Salesforce/SFR-Embedding-Mistral": PublishedModel(
        "cc-by-nc-4.0", 4096, "e5-mistral", shape="e5-mistral-7b-instruct"
    ),
    "Salesforce/SFR-Embedding-2_R": PublishedModel(
        "cc-by-nc-4.0", 4096, "e5-mistral", shape="e5-mistral-7b-instruct"
    ),
    "Linq-AI-Research/Linq-Embed-Mistral": PublishedModel(
        "cc-by-nc-4.0", 4096, "e5-mistral", shape="e5-mistral-7b-instruct"
    ),
    "Octen/Octen-Embedding-0.6B": PublishedModel(
        "apache-2.0", 1024, "octen-embedding", shape="Qwen3-Embedding-0.6B"
    ),
    "Octen/Octen-Embedding-4B": PublishedModel(
        "apache-2.0", 2560, "octen-embedding", shape="Qwen3-Embedding-4B"
    ),
    "Octen/Octen-Embedding-8B": PublishedModel(
        "apache-2.0", 4096, "octen-embedding", shape="Qwen3-Embedding-8B"
    ),
    "codefuse-ai/F2LLM-v2-80M": PublishedModel("apache-2.0", 320, "f2llm-v2", attention="causal"),
    "codefuse-ai/F2LLM-v2-160M": PublishedModel("apache-2.0", 640, "f2llm-v2", attention="causal"),
    "codefuse-ai/F2LLM-v2-330M": PublishedModel("apache-2.0", 896, "f2llm-v2", attention="causal"),
    "codefuse-ai/F2LLM-v2-0.6B": PublishedModel("apache-2.0", 1024, "f2llm-v2"),
    "codefuse-ai/F2LLM-v2-1.7B": PublishedModel("apache-2.0", 2048, "f2llm-v2"),
    "codefuse-ai/F2LLM-v2-4B": PublishedModel("apache-2.0", 2560, "f2llm-v2"),
    "codefuse-ai/F2LLM-v2-8B": PublishedModel("apache-2.0", 4096, "f2llm-v2"),
    "codefuse-ai/F2LLM-v2-14B": PublishedModel("apache-2.0", 5120, "f2llm-v2"),
    "microsoft/harrier-oss-v1-270m": PublishedModel("mit", 640, "harrier-oss"),
    "microsoft/harrier-oss-v1-0.6b": PublishedModel("mit", 1024, "harrier-oss"),
    "microsoft/harrier-oss-v1-27b": PublishedModel("mit", 5376, "harrier-oss"),
    "tencent/KaLM-Embedding-Gemma3-12B-2511": PublishedModel(
        None, 3840, "kalm-embedding-gemma3", trained_dims=(3840, 2048, 1024, 512, 256, 128, 64)
    ),
    "GritLM/GritLM-7B": PublishedModel("apache-2.0", 4096, "gritlm", shape="NV-Embed-v1"),
    "intfloat/multilingual-e5-large-instruct": PublishedModel(
        "mit", 1024, "multilingual-e5-large-instruct"
    ),
    "nvidia/Nemotron-3-Embed-1B-BF16": PublishedModel(
        "openmdw-1.1",
        2048,
        attention="bidirectional",
        pooling="mean",
        max_tokens=32_768,
        query_prompt="query: ",
        document_prompt="passage: ",
    ),
    "nvidia/Nemotron-3-Embed-8B-BF16": PublishedModel(
        "openmdw-1.1",
        4096,
        attention="bidirectional",
        pooling="mean",
        max_tokens=32_768,
        query_prompt="query: ",
        document_prompt="passage: ",
    ),
    "google/embeddinggemma-300m": PublishedModel(
        "gemma",
        768,
        attention="bidirectional",
        pooling="mean",
        max_tokens=2048,
        query_prompt="task: search result | query: ",
        document_prompt="title: none | text: ",
        dense=(3072, 768),
        trained_dims=(768, 512, 256, 128),
    ),
    "Alibaba-NLP/gte-modernbert-base": PublishedModel(
        "apache-2.0", 768, attention="bidirectional", pooling="cls", max_tokens=8192
    ),
    "BAAI/bge-m3": PublishedModel(
        "mit", 1024, attention="bidirectional", pooling="cls", max_tokens=8192
    ),
}

_DECODER_FAMILIES = {"qwen2": "gte-qwen", "mistral": "e5-mistral", "qwen3": "qwen3-embedding"}
_BY_NAME_FIRST = (
    *("gritlm", "octen-embedding", "f2llm-v2", "harrier-oss", "kalm-embedding-gemma3"),
    "multilingual-e5-large-instruct",
)
"""Families to recognise by name first: another family of the same architecture would match too."""


def family_of(
    config: Mapping[str, Any], *, name: str = "", prompts: Iterable[str] = (), pooling: str = ""
) -> Family | None:
    """The family that a checkpoint belongs to; None if its folder alone says how it runs.

    A family is recognised by its name in the model's name. There are other signs:
    - NV-Embed: its config.json;
    - GritLM and gte-Qwen: the remote code that their `auto_map` names (never run here);
    - gte-Qwen: `is_causal: false`, unless Sentence Transformers' files name another pooling or
      other prompts (there are more bidirectional encoders from Qwen2);
    - e5-mistral and Qwen3-Embedding: last-token pooling and a prompt of the family's form in
      Sentence Transformers' files.

    Args:
        config: content of `config.json`.
        name: Hub id, or name of the folder.
        prompts: the prompts in `config_sentence_transformers.json`.
        pooling: the pooling of the modules; "" if no file states it.
    """
    kind = str(config.get("model_type"))
    if kind == "nvembed" or "latent_attention_config" in config:
        return FAMILIES["nv-embed"]
    auto_map = config.get("auto_map")
    code = str(auto_map.get("AutoModel")) if isinstance(auto_map, Mapping) else ""
    named = next((family for family in _BY_NAME_FIRST if family in name.lower()), None)
    if named is not None or code.startswith("modeling_gritlm7b."):
        return FAMILIES[named or "gritlm"]
    if kind not in _DECODER_FAMILIES:
        return None
    family = FAMILIES[_DECODER_FAMILIES[kind]]
    if kind == "qwen2" and code == "modeling_qwen.Qwen2Model":
        return family
    if pooling not in ("", "lasttoken"):
        return None
    before, after = family.query_template.split("{instruction}")
    stated = [prompt for prompt in prompts if prompt]
    is_prompted = any(prompt.startswith(before) and prompt.endswith(after) for prompt in stated)
    if kind == "qwen2":
        is_marked = config.get("is_causal") is False and (is_prompted or not stated)
    else:
        is_marked = is_prompted and pooling == "lasttoken"
    return family if is_marked or family.name in name.lower() else None
