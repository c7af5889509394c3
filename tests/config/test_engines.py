"""Lists of engines name those that open a variant, and no other."""

from __future__ import annotations

from gteopt.config.engines import engines_of
from gteopt.config.recipe import load_recipe


def test_an_architecture_that_few_engines_know_leaves_the_others_out() -> None:
    copied = load_recipe("bf16")
    assert "vllm" in engines_of(copied, None, architecture="qwen2")
    of_table = engines_of(copied, None, architecture="static_embedding")
    assert of_table == ("sentence-transformers", "gteopt")
    assert engines_of(copied, None, architecture="nvembed") == ("gteopt", "openvino")
    coded = copied.model_copy(
        update={"vectors": copied.vectors.model_copy(update={"code": "int8"})}
    )
    assert engines_of(coded, None, architecture="static_embedding") == ("gteopt",)
    assert engines_of(coded, None, architecture="qwen2") == ("gteopt", "openvino")
    assert engines_of(coded, None, architecture="modernbert", openvino=False) == ("gteopt",)
