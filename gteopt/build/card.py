"""Write the card of an artifact: a README.md with its facts and how each engine opens it.

Hides: the model hub's metadata, and which engine reads which format. Refuses to know: torch, files,
how anything was measured. All facts come from the manifest and the folder's configs, so the same
artifact always has the same card.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, get_args

import yaml

from gteopt.config.recipe import Effort, FormatChoice, FormatName, Recipe, load_recipe
from gteopt.config.yaml_files import list_shipped_names
from gteopt.errors import InputError
from gteopt.model.checkpoint import NANO, Checkpoint
from gteopt.model.config_file import DECODERS
from gteopt.model.families import FAMILIES, PUBLISHED
from gteopt.records.manifest import Manifest

CARD = "README.md"
_PLACE = "FOLDER"
"""Placeholder in commands for a folder that is not known yet."""

_LIBRARIES: dict[FormatName, str] = {
    "gptq": "gptqmodel optimum",
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
}
"""Libraries that transformers needs to read a format."""
_TEI = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "mpnet"})
"""Architectures that Text Embeddings Inference runs on a GPU in other dtypes than float16."""
_MARLIN_BITS = (4, 8)
"""Bits of packed weights for which vLLM and SGLang have kernels."""
_EFFORTS: tuple[Effort | None, ...] = (None, "fast", "standard", "best")


def render_card(
    manifest: Manifest,
    checkpoint: Checkpoint,
    *,
    place: str = _PLACE,
    metadata: Mapping[str, Any] | None = None,
    findings: Sequence[str] = (),
) -> str:
    """The text of README.md: hub metadata, facts, engines with their commands, how it was made.

    Args:
        manifest: the artifact's manifest; `files` is not read, because the card is one of them.
        checkpoint: the base or the artifact: both know attention, pooling and prompts.
        place: name of the model in commands, such as its name on the hub.
        metadata: more hub metadata; replaces values of the same name.
        findings: more sections, placed before the section on how it was made.
    """
    sections = [
        _front_matter(manifest, metadata or {}),
        f"# {manifest.base.id.rpartition('/')[2]}, {manifest.recipe.name}",
        _summary(manifest),
        _facts(manifest, checkpoint),
        "## Use",
        _use(manifest, checkpoint).replace(_PLACE, place),
        "## Engines",
        "\n".join(f"- {line}" for line in _engines(manifest, checkpoint)).replace(_PLACE, place),
        *findings,
        "## How it was made",
        _made(manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(manifest: Manifest, metadata: Mapping[str, Any]) -> str:
    """Model card metadata; `base_model` only if the base is a model of the Hub."""
    content: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
    }
    if re.fullmatch(r"[\w.-]+/[\w.-]+", manifest.base.id):
        content["base_model"] = manifest.base.id
        if manifest.layers:
            content["base_model_relation"] = "quantized"
    if manifest.base.license is not None:
        content["license"] = manifest.base.license
    content["tags"] = ["sentence-transformers", "feature-extraction", "gteopt"]
    if manifest.format not in (None, "gteopt"):
        content["tags"].append(manifest.format)
    if bits := sorted({layer.scheme.bits for layer in manifest.layers}):
        content["tags"] += [f"{n}-bit" for n in bits]
    content |= metadata
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---"


def _summary(manifest: Manifest) -> str:
    base = manifest.base
    name = f"[{base.id}](https://huggingface.co/{base.id})" if "/" in base.id else f"`{base.id}`"
    summary = manifest.recipe.summary.strip().rstrip(".")
    return (
        f"A variant of {name}, made by gteopt with recipe `{manifest.recipe.name}`"
        + (f": {summary}." if summary else ".")
        + f" Its weights take {_megabytes(manifest.weight_bytes)}, "
        f"{manifest.weight_bytes / base.weight_bytes:.2f} of the original's "
        f"{_megabytes(base.weight_bytes)} in {base.dtype}."
    )


def _facts(manifest: Manifest, checkpoint: Checkpoint) -> str:
    base, vectors = manifest.base, manifest.vectors
    revision = f", revision `{base.revision}`" if base.revision else ""
    rows = [
        ("base", f"`{base.id}`{revision}, SHA-256 `{base.sha256[:16]}`"),
        ("parameters", f"{base.n_parameters:,}"),
        ("quantized", _quantized(manifest)),
        ("format", f"`{manifest.format}`" if manifest.format else f"unquantized, {base.dtype}"),
        ("vector", f"{vectors.dims} dimensions, {vectors.code}, {vectors.bytes_per_vector} bytes"),
        *([] if checkpoint.is_table else [("attention", _attention(checkpoint))]),
        ("pooling", checkpoint.pooling + (", normalised" if checkpoint.normalise else "")),
        ("longest text", f"{checkpoint.max_tokens:,} tokens"),
    ]
    if share := manifest.expert_share:
        rows.append(("experts", f"{share:.0%} of all weights, left as they are"))
    if trained := vectors.still_trained(checkpoint.matryoshka_dims):
        lengths = ", ".join(map(str, trained))
        rows.append(("Matryoshka", f"trained to be cut to {lengths} (`matryoshka_dimensions`)"))
    if vectors.method != "full":
        how = f"{vectors.method}{', rotated for the code' if vectors.rotated else ''}"
        rows.append(("shortened by", f"{how}, from {base.dims} dimensions"))
    if vectors.similarity == "dot":
        rows.append(("similarity", "dot product: rows keep the length that shortening leaves them"))
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {text} |" for name, text in rows)


def _quantized(manifest: Manifest) -> str:
    if not manifest.layers:
        return "nothing"
    sizes = [layer.out_features * layer.in_features for layer in manifest.layers]
    bits = [layer.bits_per_weight for layer in manifest.layers]
    mean = sum(s * b for s, b in zip(sizes, bits, strict=True)) / sum(sizes)
    text = f"{len(sizes)} linear layers, {mean:.2f} bits a weight with scales"
    if any(layer.scheme.activation_bits == 8 for layer in manifest.layers):
        text += ", 8-bit activations"
    if manifest.embedding is not None:
        text += f"; the token table, {manifest.embedding.bits_per_weight:.2f} bits a weight"
    return text


def _attention(checkpoint: Checkpoint) -> str:
    return checkpoint.attention + _causal_note(checkpoint)


def _causal_note(checkpoint: Checkpoint) -> str:
    """A note on bidirectional decoders: an engine that ignores the setting gives other vectors."""
    if _runs_both_ways(checkpoint):
        return " (`is_causal: false` in config.json)"
    return ""


def _runs_both_ways(checkpoint: Checkpoint) -> bool:
    is_decoder = checkpoint.config["model_type"] in DECODERS
    return is_decoder and checkpoint.attention == "bidirectional"


def _use(manifest: Manifest, checkpoint: Checkpoint) -> str:
    prompted = checkpoint.query_template is not None or bool(checkpoint.prompt("query"))
    if manifest.format == "gteopt" or checkpoint.latent is not None:
        role = ', role="query"' if prompted else ""
        code = (
            'import gteopt\n\nencoder = gteopt.load("FOLDER")\n'
            f'queries = encoder.encode(["how do plants make energy"]{role})\n'
            'documents = encoder.encode(["Photosynthesis turns light into chemical energy."])\n'
            "print(queries @ documents.T)"
        )
        return f"```python\n{code}\n```"
    install = ["pip", "install", "sentence-transformers"]
    if manifest.format is not None:
        install.append(_LIBRARIES[manifest.format])
    prompt = ', prompt_name="query"' if prompted else ""
    code = (
        "from sentence_transformers import SentenceTransformer\n\n"
        'model = SentenceTransformer("FOLDER")\n'
        f'queries = model.encode(["how do plants make energy"]{prompt})\n'
        'documents = model.encode(["Photosynthesis turns light into chemical energy."])\n'
        "print(model.similarity(queries, documents))"
    )
    return f"```sh\n{' '.join(install)}\n```\n\n```python\n{code}\n```"


def _engines(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[str]:
    """One line for each engine: how it opens this folder, or why it must not be used."""
    from gteopt.encoder.openvino import openvino_can_hold  # which imports torch

    code = manifest.vectors.code
    yield (
        '**gteopt**: `gteopt.load("FOLDER")`'
        + (f"; it makes the {code} codes too" if code != "float32" else "")
        + ". Every file is checked against its hash."
    )
    if checkpoint.is_table:
        yield (
            '**Sentence Transformers**: `SentenceTransformer("FOLDER")`. Nothing else opens a '
            "table of token vectors."
        )
        return
    if checkpoint.latent is not None:
        yield (
            "Nothing else opens this folder: its latent-attention pooling is no module of Sentence "
            "Transformers, and other engines would pool in another way."
        )
        return
    if openvino_can_hold(checkpoint.config, (layer.scheme for layer in manifest.layers)):
        yield (
            "**OpenVINO**, the fastest on CPUs: "
            '`gteopt.load("FOLDER", backend="openvino")`, or `gteopt export FOLDER NEW`, then '
            '`SentenceTransformer("NEW", backend="openvino")` without gteopt.'
        )
    if manifest.format == "gteopt":
        yield "Nothing else opens the format `gteopt`; no `model.safetensors` is there to misread."
        return
    yield from _libraries(manifest, checkpoint)
    yield from _servers(manifest, checkpoint)


def _libraries(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[str]:
    """How Sentence Transformers and transformers open it, with the libraries that they need."""
    libraries = ""
    if manifest.format is not None:
        libraries = "".join(f" and `{name}`" for name in _LIBRARIES[manifest.format].split())
    five = "`transformers` 5 or later (4.57 ignores `is_causal: false`)"
    needs = five if _runs_both_ways(checkpoint) else "`transformers`"
    yield (
        f'**Sentence Transformers**: `SentenceTransformer("FOLDER")`, with {needs}{libraries}. '
        f"gteopt's tests compare its vectors with gteopt's."
    )
    yield (
        f'**transformers**: `AutoModel.from_pretrained("FOLDER")`, likewise; then '
        f"{_pooling_words(checkpoint)}"
        + (" and apply `vectors_dense`" if manifest.vectors.method != "full" else "")
        + "."
    )


def _servers(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[str]:
    """How vLLM, Text Embeddings Inference and SGLang open the folder, or why they must not."""
    format, both_ways = manifest.format, _runs_both_ways(checkpoint)
    model_type = str(checkpoint.config["model_type"])
    refused = _refused_by_servers(manifest)
    if refused is not None:
        yield f"Not vLLM or SGLang: {refused}."
    else:
        yield (
            "**vLLM**: `vllm serve FOLDER --runner pooling`"
            + (" (it reads `is_causal: false`)" if both_ways else "")
            + _unproven(manifest)
        )
    if format is not None:
        yield "Not Text Embeddings Inference: it reads no quantized weights."
    elif model_type in _TEI:
        yield (
            "**Text Embeddings Inference**: `text-embeddings-router --model-id FOLDER`"
            + _unproven(manifest)
        )
    elif model_type in DECODERS:
        yield (
            "Not Text Embeddings Inference without a trial: it runs decoders in float16, and some "
            "models overflow in float16."
        )
    if refused is not None:
        return
    if both_ways:
        yield (
            "Not SGLang without a trial: its known versions ignore `is_causal` in config.json and "
            "attend causally, which gives other vectors."
        )
    elif model_type in DECODERS and format in (None, "gptq", "compressed-tensors"):
        yield (
            "**SGLang**: `python -m sglang.launch_server --model-path FOLDER --is-embedding`"
            + _unproven(manifest)
        )


def _refused_by_servers(manifest: Manifest) -> str | None:
    """Why vLLM and SGLang do not read these packed weights; None if they do.

    Source: their code of 2026, `auto_gptq.py` and `compressed_tensors_wNa16.py` in vLLM, and the
    copies of these files in SGLang. vLLM's pull request 38288 removed all kernels but Marlin's.
    """
    kinds = {layer.scheme for layer in manifest.layers}
    if manifest.format not in ("gptq", "compressed-tensors"):
        return None
    if len(kinds) > 1:
        return "they join queries, keys and values into one layer, but here their bits may differ"
    (scheme,) = kinds
    if scheme.activation_bits == 8:
        return None
    if scheme.bits not in _MARLIN_BITS:
        return f"they read 4 and 8 bits, not {scheme.bits}"
    if manifest.format == "gptq" and not scheme.symmetric:
        return (
            "in this format they read symmetric weights only; they read these weights if they are "
            "built with `--format compressed-tensors`"
        )
    return None


def _unproven(manifest: Manifest) -> str:
    note = "; according to its documentation (gteopt's tests do not run it)"
    if manifest.vectors.method != "full":
        note += ": check that it applies `vectors_dense`, or cut and normalise its vectors"
    return f"{note}."


def _pooling_words(checkpoint: Checkpoint) -> str:
    words = {
        "lasttoken": "take the last token's state",
        "mean": "average the tokens' states",
        "cls": "take the first token's state",
    }
    return words[checkpoint.pooling] + (", normalise" if checkpoint.normalise else "")


def _made(manifest: Manifest) -> str:
    """The command that builds the artifact again, and the recipe unless it ships with gteopt."""
    recipe, base = manifest.recipe, manifest.base
    flags = _shipped(recipe)
    command = ["gteopt", "quantize", base.id, "--recipe"]
    command += flags if flags is not None else ["recipe.yaml"]
    if base.revision is not None:
        command += ["--revision", base.revision]
    if base.family in FAMILIES and base.id != NANO and base.id not in PUBLISHED:
        command += ["--family", base.family]  # a user may have had to name it
    if base.dtype != "bfloat16":
        command += ["--dtype", base.dtype]
    command += ["--out", "FOLDER"]
    text = f"```sh\n{' '.join(command)}\n```"
    if flags is None:
        content = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        content = {"schema": recipe.schema_, **content}
        if manifest.calibration is not None and "texts" in content.get("calibration", {}):
            content["calibration"]["texts"] = manifest.calibration.source
        dumped = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        text += f"\n\nwith recipe.yaml\n\n```yaml\n{dumped}```"
    if base.id != NANO and "/" not in base.id:
        text += f"\n\n`{base.id}` was a folder."
    if manifest.calibration is not None:
        texts = manifest.calibration
        text += (
            f"\n\nCalibration: {texts.n_texts} texts of `{texts.source}`, {texts.n_tokens:,} tokens"
            + (f" ({texts.n_cut} were cut at {texts.max_tokens})" if texts.n_cut else "")
            + f", SHA-256 `{texts.sha256[:16]}`; no labels."
        )
    used = ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
    text += (
        f"\n\n`gteopt.json` has the rest: every layer with its scheme and error, everything that "
        f"is not quantized, the hash of every file. Versions: {used}."
    )
    return text + (f" The base's license, {base.license}, applies." if base.license else "")


def _shipped(recipe: Recipe) -> list[str] | None:
    """The shipped name and the flags that give exactly this recipe; None if there are none."""
    if recipe.name not in list_shipped_names("recipes"):
        return None
    for effort, embedding, format in product(
        _EFFORTS, (False, True), (None, *get_args(FormatChoice))
    ):
        try:
            variant = load_recipe(recipe.name)
            variant = variant if effort is None else variant.with_effort(effort)
            variant = variant.with_int8_embedding() if embedding else variant
            variant = variant if format is None else variant.with_format(format)
        except InputError:
            continue
        if variant.sha256() == recipe.sha256():
            flags = [] if effort is None else ["--effort", effort]
            flags += ["--embed-int8"] if embedding else []
            flags += [] if format is None else ["--format", format]
            return [recipe.name, *flags]
    return None


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
