"""Recorded forward passes give the vectors of the ordinary pass; most tests need a GPU."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import gteopt
from gteopt.encoder.cuda_graphs import LENGTHS, CudaGraphs
from gteopt.speed.texts import exact_texts

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="records on a GPU only")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this GPU could record")
def test_a_pass_that_cannot_be_recorded_is_refused_once_and_said() -> None:
    encoder = gteopt.load("nano", device="cpu")
    assert encoder.cuda_graphs is None  # on a CPU nothing is recorded
    plain = encoder.encode(["one short text"])
    encoder.cuda_graphs = CudaGraphs(lambda ids, n_tokens: ids, torch.device("cuda"))
    with pytest.warns(UserWarning, match=r"could not be recorded \(.+\)"):
        vectors = encoder.encode(["one short text"])
    assert np.array_equal(vectors, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(encoder.encode(["one short text"]), plain)


def test_texts_beyond_the_longest_recording_run_kernel_by_kernel() -> None:
    def forward(ids: torch.Tensor, n_tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nothing is to be recorded")

    graphs = CudaGraphs(forward, torch.device("cuda"))
    assert graphs([1] * (LENGTHS[-1] + 1)) is None
    assert graphs.refused is None


@GPU
@pytest.mark.parametrize("recipe", [None, "rtn-int8", "rtn-int4", "nf4", "rtn-fp8"])
def test_replayed_vectors_are_those_of_the_ordinary_pass(
    recipe: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = "nano"
    if recipe is not None:
        source = str(tmp_path_factory.mktemp("graphs") / recipe)
        gteopt.quantize("nano", recipe, source, device="cuda")
    plain = gteopt.load(source, device="cuda", cuda_graphs=False)
    encoder = gteopt.load(source, device="cuda")
    assert encoder.cuda_graphs is not None
    # Up and down, so that a shorter text comes after a longer one in the same recording.
    for length in (128, 5, 16, 17, 9, 64, 33, 127, 16):
        (text,) = exact_texts(plain, 1, length, seed=length)
        vector, wanted = encoder.encode([text])[0], plain.encode([text])[0]
        assert encoder.cuda_graphs.refused is None
        assert float(vector @ wanted) >= 0.999
    assert encoder.cuda_graphs.n_bytes > 0


@GPU
def test_a_replay_has_the_same_bits_every_time_whatever_came_before() -> None:
    encoder = gteopt.load("nano", device="cuda")
    first = encoder.encode(["a text of a few words"])
    encoder.encode(["a longer one " * 8])
    encoder.encode(["x", "many texts", "at once"])
    assert np.array_equal(encoder.encode(["a text of a few words"]), first)


@GPU
def test_texts_of_many_lengths_have_the_vectors_of_each_alone() -> None:
    """One launch of attention computes all texts, without a mask."""
    encoder = gteopt.load("nano", device="cuda", cuda_graphs=False)
    texts = [text for n in (5, 300, 17, 64, 17, 129) for text in exact_texts(encoder, 2, n, seed=n)]
    together = encoder.encode(texts)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    assert float((together * alone).sum(axis=1).min()) >= 0.999
