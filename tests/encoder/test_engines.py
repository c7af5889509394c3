"""Lists of engines name OpenVINO only where its backend supports the model and its layers."""

from __future__ import annotations

from pathlib import Path

import gteopt
from gteopt.config.recipe import load_recipe
from tests.support.architectures import make


def test_openvino_is_not_named_for_weights_that_it_lacks() -> None:
    engines = {estimate.recipe: estimate.engines for estimate in gteopt.inspect("nano").estimates}
    for recipe in ("bf16", "int8", "int8-static", "gptq-nf4", "mixed-nf4"):
        assert "openvino" in engines[recipe]
    for recipe in ("fp8", "rtn-fp8", "int8-bnb"):
        assert "gteopt" in engines[recipe]
        assert "openvino" not in engines[recipe]


def test_openvino_is_not_named_for_an_architecture_that_it_lacks(tmp_path: Path) -> None:
    base = make("modernbert", tmp_path / "base")
    (estimate,) = gteopt.inspect(base, recipe=load_recipe("rtn-int8")).estimates
    assert estimate.problem is None
    assert "gteopt" in estimate.engines
    assert "openvino" not in estimate.engines
    gteopt.quantize(base, "rtn-int8", tmp_path / "artifact")
    assert gteopt.inspect(tmp_path / "artifact").engines == estimate.engines
