"""Memory grows with the length of a text, not with its square."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gteopt
from tests.support.models import MODELS, Model, publish


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the size of the largest tensor that an operation returns."""

    n_values: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.n_values = max(self.n_values, leaf.numel())
        return out


def largest(encoder: gteopt.Encoder, lengths: list[int]) -> int:
    ids = [[*(3 + i % 200 for i in range(n - 1)), 2] for n in lengths]
    mode = Largest()  # type: ignore[no-untyped-call]
    with mode:
        vectors = encoder.embed_tokens(ids)
    assert np.isfinite(vectors).all()
    return mode.n_values


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_no_tensor_grows_with_the_square_of_the_length(tmp_path: Path, model: Model) -> None:
    from dataclasses import replace

    config = {**model.config, "num_hidden_layers": 1}
    if model.window is not None:
        config["sliding_window"] = 4096  # as published: as long as the longest input
    model = replace(model, config=config)
    prefix = "embedding_model." if model.latent is not None else ""
    publish(tmp_path / model.name, model, prefix=prefix)
    encoder = gteopt.load(tmp_path / model.name, dtype="float32")
    n = 2048
    short, long = largest(encoder, [n]), largest(encoder, [2 * n])
    assert long <= 2 * short
    assert long < n * n  # a mask [2 n, 2 n] would be four times that
    assert largest(encoder, [2 * n, 2 * n - 500]) <= long  # padding needs no mask either


def test_a_long_text_has_one_vector_in_any_company(tmp_path: Path) -> None:
    model = MODELS[0]
    publish(tmp_path / model.name, model)
    (tmp_path / model.name / "sentence_bert_config.json").write_text('{"max_seq_length": 4096}')
    encoder = gteopt.load(tmp_path / model.name, dtype="float32")
    texts = ["bridge " * 500, "short", "river " * 700]
    assert max(len(ids) for ids in encoder.tokenization.tokenize(texts)) > 2048
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    assert np.abs(encoder.encode(texts) - alone).max() < 1e-5
