"""Each family, as its authors publish it, gives the vectors of an independent forward pass.

The checkpoints are small and random, with the published format: config.json, tensor names, module
files. The forward pass is written out here in float64, one unpadded text at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mteb
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gteopt
from gteopt.commands.inspect import inspect
from gteopt.config.recipe import Calibration, LayerScheme, load_recipe
from gteopt.encoder.encoder import Encoder
from gteopt.errors import InputError, IntegrityError, UnsupportedError
from gteopt.model.artifact import read_manifest
from gteopt.model.checkpoint import open_checkpoint
from gteopt.model.families import FAMILIES, PUBLISHED
from gteopt.speed.random_model import read_model_shapes, write_published_settings
from tests.support.architectures import sentence_transformer
from tests.support.models import MODELS, Model, forward_float64, publish

TEXTS = ["A bridge.", "Photosynthesis turns light into sugar, in every leaf of a plant.", "水", ""]
INSTRUCTION = "Find the answer"


IDS = [model.name for model in MODELS]


def text_ids(encoder: Encoder, model: Model, text: str) -> list[int]:
    ids = encoder.tokenization.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*model.start, *ids, *model.end]


def prefixes(model: Model) -> tuple[str, str]:
    """Prefixes of the transformer's tensors without and with the language model's head."""
    nested = "embedding_model." if model.latent is not None else ""
    return nested, f"{nested}model."


@pytest.fixture(scope="module", params=MODELS, ids=IDS)
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Model, Path, dict[str, Tensor]]:
    model: Model = request.param
    folder = tmp_path_factory.mktemp("hub") / model.name
    return model, folder, publish(folder, model, prefix=prefixes(model)[0])


Published3 = tuple[Model, Path, dict[str, Tensor]]


def test_vectors_equal_the_float64_forward_pass_alone_and_batched(published: Published3) -> None:
    model, folder, weights = published
    encoder = gteopt.load(folder, dtype="float32")
    expected = [
        forward_float64(model, weights, text_ids(encoder, model, text), 0) for text in TEXTS
    ]
    vectors = encoder.encode(TEXTS)
    assert np.abs(vectors - np.stack(expected)).max() < 2e-5
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    assert np.abs(alone - vectors).max() < 1e-5
    tokens = encoder.tokenization.tokenize(TEXTS)
    assert np.abs(encoder.embed_tokens(tokens, padding="left") - vectors).max() < 1e-5


def test_queries_carry_the_familys_prompt_and_pooling_leaves_out_what_it_should(
    published: Published3,
) -> None:
    model, folder, weights = published
    encoder = gteopt.load(folder, dtype="float32")
    prompt = model.template.format(INSTRUCTION)
    n_prompt = 0
    if model.latent is not None:  # as the authors' code counts
        n_prompt = len(encoder.tokenization.tokenizer.tokenize(prompt))
    expected = [
        forward_float64(model, weights, text_ids(encoder, model, prompt + text), n_prompt)
        for text in TEXTS
    ]
    vectors = encoder.encode(TEXTS, role="query", instruction=INSTRUCTION)
    assert np.abs(vectors - np.stack(expected)).max() < 2e-5


def test_the_other_attention_direction_gives_clearly_other_vectors(published: Published3) -> None:
    model, folder, weights = published
    encoder = gteopt.load(folder, dtype="float32")
    other = replace(model, causal=not model.causal)
    ids = text_ids(encoder, model, TEXTS[1])
    assert encoder.encode([TEXTS[1]])[0] @ forward_float64(other, weights, ids, 0) < 0.99


def test_a_file_with_the_language_models_head_gives_the_same_vectors(
    published: Published3, tmp_path: Path
) -> None:
    model, folder, _ = published
    publish(tmp_path / model.name, model, prefix=prefixes(model)[1], head=True)
    with_head = gteopt.load(tmp_path / model.name, dtype="float32")
    np.testing.assert_array_equal(
        with_head.encode(TEXTS), gteopt.load(folder, dtype="float32").encode(TEXTS)
    )


def test_a_build_of_each_family_is_close_and_opens_again(
    published: Published3, tmp_path: Path
) -> None:
    model, folder, weights = published
    scheme = LayerScheme(bits=8, group_size=32, symmetric=False)
    recipe = load_recipe("gptq-int4")
    recipe = recipe.model_copy(
        update={
            "weights": recipe.weights.model_copy(update={"scheme": scheme}),
            "calibration": Calibration(n_texts=48, max_tokens=64),
        }
    )
    manifest = gteopt.quantize(folder, recipe, tmp_path / "out", dtype="float32")
    assert len(manifest.layers) == 21
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    trained = [64, 32] if model.name.startswith("Qwen3") else None  # no folder names them
    assert config.get("matryoshka_dimensions") == trained
    assert manifest.base.family == open_checkpoint(folder).family.name  # type: ignore[union-attr]
    base, variant = gteopt.load(folder, dtype="float32"), gteopt.load(tmp_path / "out")
    for role in ("document", "query"):
        cosines = (base.encode(TEXTS, role=role) * variant.encode(TEXTS, role=role)).sum(1)
        assert cosines.min() > 0.999
    assert variant.weight_bytes < 0.9 * base.weight_bytes
    left = {module.name: module.n_parameters for module in manifest.unquantized}
    if model.latent is not None:
        n_latent = sum(t.numel() for name, t in weights.items() if name.startswith("latent_"))
        assert left["latent_attention_model"] == n_latent
        assert manifest.format == "gteopt"
        assert manifest.base.n_parameters == sum(t.numel() for t in weights.values())


def test_sentence_transformers_opens_an_artifact_with_the_same_vectors_or_not_at_all(
    published: Published3, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    model, folder, _ = published
    gteopt.quantize(folder, "bf16", tmp_path / "out", dtype="float32")
    ours = gteopt.load(tmp_path / "out")
    np.testing.assert_allclose(
        ours.encode(TEXTS), gteopt.load(folder, dtype="float32").encode(TEXTS), atol=1e-5
    )
    if model.latent is not None:
        assert not (tmp_path / "out" / "modules.json").exists()
        with pytest.raises(ValueError, match="nvembed"):
            SentenceTransformer(str(tmp_path / "out"))
        return
    theirs = SentenceTransformer(str(tmp_path / "out"))
    np.testing.assert_allclose(theirs.encode(TEXTS), ours.encode(TEXTS), atol=1e-5)
    queries = ours.encode(TEXTS, role="query")
    np.testing.assert_allclose(theirs.encode(TEXTS, prompt_name="query"), queries, atol=1e-5)


def test_shortened_vectors_of_a_nested_model_come_from_its_own_pooling(tmp_path: Path) -> None:
    model = MODELS[-1]
    publish(tmp_path / model.name, model, prefix="embedding_model.")
    gteopt.quantize(tmp_path / model.name, "bf16", tmp_path / "full", dtype="float32")
    gteopt.truncate(tmp_path / "full", tmp_path / "short", dims=16, vectors="int8")
    full, short = gteopt.load(tmp_path / "full"), gteopt.load(tmp_path / "short")
    expected = full.encode(TEXTS)[:, :16]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(short.encode(TEXTS), expected, atol=1e-6)
    assert read_manifest(tmp_path / "short").weight_bytes == full.manifest.weight_bytes  # type: ignore[union-attr]


def test_a_mean_over_the_instruction_is_refused_instead_of_pooled_as_published(
    tmp_path: Path,
) -> None:
    model = MODELS[-1]
    folder = tmp_path / model.name
    publish(folder, model, prefix="embedding_model.")
    config = json.loads((folder / "config.json").read_text())
    assert config["is_mask_instruction"] is True
    (folder / "config.json").write_text(json.dumps({**config, "is_mask_instruction": False}))
    with pytest.raises(UnsupportedError, match="is_mask_instruction is False"):
        gteopt.load(folder)


def test_a_tensor_that_latent_pooling_needs_is_never_random(tmp_path: Path) -> None:
    model = MODELS[-1]
    folder = tmp_path / model.name
    publish(folder, model, prefix="embedding_model.")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "latent_attention_model.cross_attend_blocks.0.fn.to_q.weight"
    from safetensors.torch import load_file

    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"cross_attend_blocks\.0\.fn\.to_q"):
        gteopt.load(folder)


def without_hints(folder: Path) -> None:
    (folder / "modules.json").unlink()
    (folder / "config_sentence_transformers.json").unlink()


def other_prompts(folder: Path) -> None:
    config = {"prompts": {"query": "query: "}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))


@pytest.mark.parametrize("model", [m for m in MODELS if m.causal], ids=lambda m: m.name)
@pytest.mark.parametrize(
    ("folder_name", "change", "known"),
    [
        ("as-published", None, True),
        ("my-model", None, True),  # recognised by its prompts
        ("as-published", without_hints, True),  # recognised by its name
        ("my-model", other_prompts, False),  # another encoder, which runs as its folder says
    ],
)
def test_language_model_configs_are_told_apart_by_name_or_prompts(
    tmp_path: Path,
    model: Model,
    folder_name: str,
    change: Callable[[Path], None] | None,
    known: bool,
) -> None:
    folder = tmp_path / (model.name if folder_name == "as-published" else folder_name)
    publish(folder, model)
    if change is not None:
        change(folder)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.family is not None) == known
    assert (checkpoint.attention, checkpoint.pooling) == ("causal", "lasttoken")


def mean_pooling(folder: Path) -> None:
    config = {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "pooling"), [(mean_pooling, "mean"), (other_prompts, "lasttoken")]
)
def test_another_bidirectional_qwen2_is_run_as_its_folder_says(
    tmp_path: Path, change: Callable[[Path], None], pooling: str
) -> None:
    """`is_causal: false` alone brings no end token, prompt or pooling of gte-Qwen."""
    folder = tmp_path / "my-model"
    model = replace(MODELS[0], auto_map=False, config={**MODELS[0].config, "is_causal": False})
    publish(folder, model)
    assert open_checkpoint(folder).family is not None
    change(folder)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.family, checkpoint.attention, checkpoint.pooling) == (
        None,
        "bidirectional",
        pooling,
    )
    assert checkpoint.end_token is None


def test_what_cannot_be_told_is_refused_until_the_user_names_the_family(tmp_path: Path) -> None:
    model = next(m for m in MODELS if m.name.startswith("e5"))
    folder = tmp_path / "my-model"
    publish(folder, model)
    without_hints(folder)
    with pytest.raises(InputError, match=r"name the family \(--family"):
        open_checkpoint(folder)
    with pytest.raises(InputError, match="did you mean e5-mistral"):
        open_checkpoint(folder, family="e5-mistal")
    with pytest.raises(InputError, match=r"no nv-embed model: its config\.json lacks"):
        open_checkpoint(folder, family="nv-embed")
    named = gteopt.load(folder, family="e5-mistral", dtype="float32")
    gteopt.quantize(folder, "bf16", tmp_path / "out", family="e5-mistral", dtype="float32")
    assert " --family e5-mistral " in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    again = gteopt.load(tmp_path / "out")  # its manifest names the family
    assert again.checkpoint.family == named.checkpoint.family
    np.testing.assert_allclose(again.encode(TEXTS), named.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_mtebs_license_and_the_width_of_their_shape(name: str) -> None:
    meta, ours = mteb.get_model_meta(name), PUBLISHED[name]
    # mteb 2.26 gives gte-Qwen2-1.5B the width of its MLP, so a shipped config goes first.
    shape = read_model_shapes().get(name.rpartition("/")[2], {})
    assert (ours.dims, ours.license) == (shape.get("hidden_size", meta.embed_dim), meta.license)


def test_every_shipped_shape_has_the_published_number_of_parameters() -> None:
    counted_otherwise = {
        # mteb leaves out half of Gemma's four norms a layer, and the norms of queries and keys.
        "harrier-oss-v1-270m": 18 * 2 * (640 + 256),
        "harrier-oss-v1-0.6b": 28 * 2 * 128,
        "harrier-oss-v1-27b": 62 * 2 * (5376 + 128),
        "embeddinggemma-300m": -2 * 768 * 3072,  # mteb counts its Dense modules, too
        "GritLM-7B": -32_000 * 4096,  # mteb counts the language model's head, too
    }
    for full in PUBLISHED:
        name = full.rpartition("/")[2]
        if name not in read_model_shapes():
            continue
        theirs = mteb.get_model_meta(full).n_parameters
        assert theirs is not None
        facts = inspect(name, recipe=load_recipe("bf16"))
        rounded = 10 ** (len(str(theirs)) - len(str(theirs).rstrip("0")))  # some counts are rounded
        off = facts.n_parameters - theirs - counted_otherwise.get(name, 0)
        assert abs(off) < max(1, rounded), name
        assert (facts.id, facts.dims, facts.sha256) == (name, PUBLISHED[full].dims, None)
        assert facts.family == PUBLISHED[full].family


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.1,
    "vocab_size": 20_480,
}
PADDING = {"modernbert": {"pad_token_id": 0}}  # the default lies beyond the small table


@pytest.mark.parametrize(
    "name",
    [
        "codefuse-ai/F2LLM-v2-0.6B",
        "microsoft/harrier-oss-v1-270m",
        "microsoft/harrier-oss-v1-0.6b",
        "intfloat/multilingual-e5-large-instruct",
        "nvidia/Nemotron-3-Embed-8B-BF16",
        "google/embeddinggemma-300m",
        "Alibaba-NLP/gte-modernbert-base",
        "BAAI/bge-m3",
    ],
)
def test_a_small_model_of_a_published_shape_gives_sentence_transformers_vectors(
    name: str, tmp_path: Path
) -> None:
    import transformers

    folder = tmp_path / name.rpartition("/")[2]
    known = read_model_shapes()[folder.name]
    config = {**known, **{key: SMALL[key] for key in known if key in SMALL}}
    config |= PADDING.get(known["model_type"], {})
    write_published_settings(name, config, folder)
    torch.manual_seed(0)
    fields = {key: value for key, value in config.items() if key != "model_type"}
    kind = transformers.AutoConfig.for_model(config["model_type"], **fields)
    transformers.AutoModel.from_config(kind).eval().save_pretrained(folder)
    for dense in folder.glob("*_Dense"):
        sizes = json.loads((dense / "config.json").read_text())
        weight = torch.randn(sizes["out_features"], sizes["in_features"]) / 10
        save_file({"linear.weight": weight}, dense / "model.safetensors")
    encoder = gteopt.load(folder, dtype="float32")
    theirs = sentence_transformer(folder)
    for role in ("query", "document"):
        prompt = encoder.tokenization.prompt(role)
        wanted = np.concatenate([theirs.encode([text], prompt=prompt) for text in TEXTS[:3]])
        np.testing.assert_allclose(encoder.encode(TEXTS[:3], role=role), wanted, atol=1e-5)
    family = PUBLISHED[name].family
    if family is not None:
        asked = FAMILIES[family].query_template.format(instruction=INSTRUCTION)
        assert encoder.tokenization.prompt("query", INSTRUCTION) == asked
    else:
        prompts = PUBLISHED[name].query_prompt, PUBLISHED[name].document_prompt
        encoder_prompts = (
            encoder.tokenization.prompt("query"),
            encoder.tokenization.prompt("document"),
        )
        assert encoder_prompts == prompts


def test_gritlm_averages_the_text_alone_and_sees_it_in_both_directions(tmp_path: Path) -> None:
    """As the authors' `encode` does: the mean leaves out the prompt and its start token."""
    import transformers
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path / "model"
    mistral = next(model for model in MODELS if model.name.startswith("e5"))
    weights = publish(folder, replace(mistral, st=False), prefix="model.", head=True)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "architectures": ["MistralForCausalLM"]}
    code = {"auto_map": {"AutoModel": "modeling_gritlm7b.MistralModel"}}
    path.write_text(json.dumps(config | code))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save_pretrained(folder)
    fields = {key: value for key, value in config.items() if key != "model_type"}
    fields |= {"is_causal": False, "sliding_window": None}
    module = transformers.MistralModel(transformers.MistralConfig(**fields)).eval()
    module.load_state_dict(weights)

    def by_the_authors(text: str, prompt: str) -> np.ndarray:
        ids = torch.tensor([tokenizer(prompt + text)["input_ids"]])
        with torch.no_grad():
            hidden = module(ids).last_hidden_state[0, len(tokenizer(prompt)["input_ids"]) :]
        vector = hidden.mean(0)
        return np.asarray(vector / vector.norm())

    encoder = gteopt.load(folder, dtype="float32")
    gteopt.quantize(folder, "bf16", tmp_path / "out", dtype="float32")
    again, theirs = gteopt.load(tmp_path / "out"), sentence_transformer(tmp_path / "out")
    asked = f"<|user|>\n{INSTRUCTION}\n<|embed|>\n"
    for text in (text for text in TEXTS if text):
        bare = by_the_authors(text, "<|embed|>\n")
        for model in (encoder, again):
            (found_document,) = model.encode([text], role="document")
            np.testing.assert_allclose(found_document, bare, atol=1e-5)
        np.testing.assert_allclose(theirs.encode([text])[0], bare, atol=1e-5)
        (found_query,) = encoder.encode([text], role="query", instruction=INSTRUCTION)
        np.testing.assert_allclose(found_query, by_the_authors(text, asked), atol=1e-5)
    queries = again.encode(TEXTS[:3], role="query")
    their_queries = np.concatenate([theirs.encode([t], prompt_name="query") for t in TEXTS[:3]])
    np.testing.assert_allclose(their_queries, queries, atol=1e-5)


def test_inspect_tells_the_familys_facts(tmp_path: Path) -> None:
    facts = {}
    for model in MODELS:
        owner = next(name for name in PUBLISHED if name.endswith(model.name)).split("/")[0]
        folder = tmp_path / owner / model.name
        publish(folder, model, prefix=prefixes(model)[0])
        facts[model.name] = inspect(f"{owner}/{model.name}", hub_dir=tmp_path)
    assert {f.license for f in facts.values()} == {"apache-2.0", "mit", "cc-by-nc-4.0"}
    # The limit of the folder holds; without one, the limit of the family.
    stated = [512 if model.st else None for model in MODELS]
    trained = [32_768, 32_768, 32_768, 4096, 32_768]
    limits = [limit or family for limit, family in zip(stated, trained, strict=True)]
    assert [facts[name].max_tokens for name in IDS] == limits
    assert facts["Qwen3-Embedding-0.6B"].matryoshka_dims == (64, 32)
    assert facts["NV-Embed-v1"].pooling == "latent"
    assert facts["NV-Embed-v1"].license == "cc-by-nc-4.0"
    around = [(facts[name].start_token, facts[name].end_token) for name in IDS]
    assert around == [(None, "<|endoftext|>")] * 3 + [("<s>", "</s>")] * 2
    assert all(model_facts.published_scores for model_facts in facts.values())
    assert any("the folder cuts texts at 512 tokens" in note for note in facts[IDS[0]].notes)


def test_replayed_blocks_give_the_models_own_output_however_often(published: Published3) -> None:
    """Published configs say `use_cache: true`, but no run may see keys of an earlier one."""
    from gteopt.build.replay import (
        open_blocks,
        order_block_layers,
        replay_behind_blocks,
        replay_block_,
    )

    _, folder, _ = published
    assert "use_cache" not in json.loads((folder / "config.json").read_text())  # true by default
    encoder = gteopt.load(folder, dtype="float32")
    tokens = sorted(encoder.tokenization.tokenize(TEXTS, role="query"), key=len)
    blocks, inputs = open_blocks(encoder, tokens)
    for block in blocks:
        for _ in range(2):
            order_block_layers(block, inputs)
        replay_block_(block, inputs)
    replayed = replay_behind_blocks(encoder, blocks, [batch.hidden for batch in inputs], inputs)
    np.testing.assert_allclose(replayed.numpy(), encoder.embed_tokens(tokens), atol=1e-5)
