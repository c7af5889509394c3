"""What a user may write in YAML, what it means, and the messages for mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from gteopt.config.plan import Plan, load_plan
from gteopt.config.policy import Policy, load_policy
from gteopt.config.recipe import LayerScheme, Recipe, load_recipe
from gteopt.config.yaml_files import ShippedKind, find_yaml, list_shipped_names, read_yaml
from gteopt.errors import InputError
from gteopt.paths import shipped_dir

RECIPE: dict[str, Any] = {
    "schema": "gteopt.recipe/1",
    "name": "mine",
    "weights": {
        "method": "gptq",
        "scheme": {"bits": 4, "group_size": 128, "symmetric": False},
    },
}
SHIPPED: list[tuple[ShippedKind, type[BaseModel]]] = [
    ("recipes", Recipe),
    ("recipes/plans", Plan),
    ("recipes/policies", Policy),
]


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate(RECIPE | changes)


def problems(tmp_path: Path, text: str, document: type[BaseModel] = Recipe) -> list[str]:
    """The problems that are reported for a YAML file, without the path of its folder."""
    path = tmp_path / "f.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_yaml(path, document)
    return str(caught.value).replace(str(path), "f.yaml").split("\n  - ")


def test_every_problem_of_a_file_is_said_at_once_with_its_line(tmp_path: Path) -> None:
    text = """\
schema: gteopt.recipe/1
name: Bad Name
weights:
  method: gptq
  scheme: {bits: 5, group_size: 128}
  acct_order: true
dims: {n: 0, methd: pca}
vectors:
  code: int9
"""
    assert problems(tmp_path, text) == [
        "f.yaml has 7 problem(s):",
        "f.yaml:2: name: String should match pattern '^[a-z0-9][a-z0-9._-]*$' (found 'Bad Name')",
        "f.yaml:5: weights.scheme.bits: Input should be 2, 3, 4 or 8 (found 5)",
        "f.yaml:5: field 'weights.scheme.symmetric' is missing",
        "f.yaml:6: unknown field 'weights.acct_order': did you mean act_order?",
        "f.yaml:7: dims.n: Input should be greater than or equal to 1 (found 0)",
        "f.yaml:7: unknown field 'dims.methd': did you mean method?",
        "f.yaml:9: vectors.code: Input should be 'auto', 'float32', 'int8', 'int4', 'binary', "
        "'rabitq' or 'pq' (found 'int9'); did you mean int8 or int4?",
    ]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("{method: gptqq}", "weights.method: Input should be one of 'none', 'rtn', 'gptq'"),
        ("{method: gptqq}", "(found 'gptqq'); did you mean gptq?"),
        ("{scheme: {bits: 4}}", "field 'weights.method' is missing"),
        # act_order is a field of gptq, so it must not be suggested for itself.
        ("{method: none, act_order: true}", "unknown field 'weights.act_order': known: method"),
    ],
)
def test_a_wrong_method_or_a_field_of_another_method_is_named(
    tmp_path: Path, weights: str, expected: str
) -> None:
    text = f"schema: gteopt.recipe/1\nname: x\nweights: {weights}\n"
    _, problem = problems(tmp_path, text)
    assert problem.startswith("f.yaml:3: ")
    assert expected in problem


def test_typos_inside_lists_and_mappings_get_a_suggestion(tmp_path: Path) -> None:
    plan = """\
schema: gteopt.plan/1
name: p
base: nano
recipes: [a]
bench:
  workloads:
    - {batch_sise: 8, tokens: 32}
out: o
"""
    assert problems(tmp_path, plan, Plan)[1:] == [
        "f.yaml:7: field 'bench.workloads.0.batch_size' is missing",
        "f.yaml:7: unknown field 'bench.workloads.0.batch_sise': did you mean batch_size?",
    ]
    policy = """\
schema: gteopt.policy/1
name: p
limits:
  p95_ms: {mim: 1}
  retentoin: {min: 1}
objective: {minimise: weight_bites}
"""
    unknown_field, unknown_limit, unknown_objective = problems(tmp_path, policy, Policy)[1:]
    assert unknown_field == "f.yaml:4: unknown field 'limits.p95_ms.mim': did you mean min?"
    assert unknown_limit.startswith("f.yaml:5: limits.retentoin: ")
    assert "did you mean retention" in unknown_limit
    assert unknown_objective.startswith("f.yaml:6: objective.minimise: ")
    assert "did you mean weight_bytes" in unknown_objective


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\nb: 2\n", "f.yaml:2: not valid YAML: expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", "f.yaml:2: not valid YAML"),
        ("name: 2024-13-45\n", "f.yaml: not valid YAML: month must be in 1..12"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: not valid YAML"),
        ("", "f.yaml: expected a mapping of fields, found NoneType"),
        ("- a\n", "f.yaml: expected a mapping of fields, found list"),
    ],
)
def test_what_is_not_a_yaml_mapping_is_refused_with_its_line(
    tmp_path: Path, text: str, expected: str
) -> None:
    assert problems(tmp_path, text)[0].startswith(expected)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        read_yaml(path, Recipe)


def test_a_field_given_twice_is_refused_where_yaml_would_keep_the_last(tmp_path: Path) -> None:
    text = yaml.safe_dump(RECIPE, sort_keys=False) + "dims:\n  n: 4\n  n: 8\nname: other\n"
    assert problems(tmp_path, text)[1:] == [
        "f.yaml:12: field 'name' is given twice, first on line 2",
        "f.yaml:11: field 'n' is given twice, first on line 10",
    ]


def test_an_alias_is_not_a_repetition(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(
        "schema: gteopt.policy/1\nname: p\nlimits:\n  retention: &a {min: 0.5}\n  spearman: *a\n"
        "objective: {minimise: p95_ms}\n"
    )
    limits = read_yaml(path, Policy).limits
    assert limits["retention"] == limits["spearman"]


def test_another_schema_is_refused(tmp_path: Path) -> None:
    _, problem = problems(tmp_path, "schema: gteopt.recipe/2\nname: x\n")
    assert problem.startswith("f.yaml:1: schema: Input should be 'gteopt.recipe/1'")


W8A8: dict[str, Any] = {
    "bits": 8,
    "group_size": "per_channel",
    "symmetric": True,
    "activation_bits": 8,
}


def test_int8_activations_are_accepted_on_symmetric_int8_rows() -> None:
    assert LayerScheme.model_validate(W8A8).activation_bits == 8


@pytest.mark.parametrize("change", [{"bits": 4}, {"group_size": 64}, {"symmetric": False}])
def test_int8_activations_are_refused_on_any_other_scheme(change: dict[str, Any]) -> None:
    with pytest.raises(
        ValidationError, match="needs bits: 8, group_size: per_channel, symmetric: true"
    ):
        LayerScheme.model_validate(W8A8 | change)
    LayerScheme.model_validate(W8A8 | change | {"activation_bits": 16})


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (
            {"number_format": "e4m3", "bits": 4},
            "e4m3 needs bits: 8, group_size: per_channel",
        ),
        (
            {"number_format": "e4m3", "activation_bits": 16, "symmetric": False},
            "e4m3 needs bits: 8",
        ),
        (
            {"number_format": "e4m3", "activation_symmetric": False},
            "needs activation_bits: 8, number_format: int",
        ),
        ({"activation_bits": 16, "activation_symmetric": False}, "needs activation_bits: 8"),
        ({"activation_bits": 16, "activation_outliers": 6.0}, "needs activation_bits: 8"),
        ({"number_format": "nf4"}, "nf4 needs bits: 4, group_size: 64 or 128, symmetric: true"),
        (
            {"number_format": "nf4", "bits": 4, "group_size": 32},
            "nf4 needs bits: 4, group_size: 64",
        ),
    ],
)
def test_schemes_that_no_kernel_has_are_refused(scheme: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        LayerScheme.model_validate(W8A8 | {"activation_bits": 16} | scheme)


@pytest.mark.parametrize(
    ("scheme", "weights", "reason"),
    [
        (
            W8A8 | {"number_format": "e4m3"},
            {"effort": "best"},
            "number_format: e4m3 or double_quantization: true are not tuned",
        ),
        (W8A8, {"effort": "best"}, "activation_bits: 8, number_format"),
        (W8A8 | {"activation_bits": 16}, {"smooth": True}, "smooth: true needs activation_bits: 8"),
        (W8A8, {"budget": 4.25}, "a budget chooses among schemes with activation_bits: 16"),
        (W8A8, {"choices": [W8A8]}, "choices need a budget"),
    ],
)
def test_what_gptq_does_not_do_is_refused(
    scheme: dict[str, Any], weights: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        recipe(weights={"method": "gptq", "scheme": scheme, **weights})
    recipe(weights={"method": "gptq", "scheme": W8A8, "smooth": True})


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("{}", "give min, max or both"),
        ("{min: 2, max: 1}", "min 2 is above max 1; no value can keep both"),
        ("{min: .nan}", "limits.p95_ms.min: Input should be a finite number"),
    ],
)
def test_a_limit_that_cannot_be_judged_or_kept_is_refused(
    tmp_path: Path, limit: str, expected: str
) -> None:
    text = f"schema: gteopt.policy/1\nname: p\nlimits:\n  p95_ms: {limit}\n"
    _, problem = problems(tmp_path, text + "objective: {minimise: p95_ms}\n", Policy)
    assert problem.startswith("f.yaml:4: ")
    assert expected in problem


@pytest.mark.parametrize("objective", ["{}", "{minimise: p95_ms, maximise: retention}"])
def test_an_objective_is_exactly_one_metric(tmp_path: Path, objective: str) -> None:
    text = f"schema: gteopt.policy/1\nname: p\nobjective: {objective}\n"
    assert problems(tmp_path, text, Policy)[1:] == [
        "f.yaml:3: objective: give exactly one of minimise and maximise"
    ]


def test_the_hash_ignores_name_and_summary() -> None:
    renamed = recipe(name="other", summary="words")
    assert renamed.sha256() == recipe().sha256()
    assert renamed.weights_sha256() == recipe().weights_sha256()


CHANGES: list[dict[str, Any]] = [
    {"weights": {"method": "none"}},
    {"weights": RECIPE["weights"] | {"method": "rtn"}},
    {"weights": RECIPE["weights"] | {"act_order": False}},
    {"weights": RECIPE["weights"] | {"damping": 0.02}},
    {"weights": RECIPE["weights"] | {"clip_search": False}},
    {"weights": RECIPE["weights"] | {"fallback": "per_channel"}},
    {"weights": RECIPE["weights"] | {"skip": ["*.mlp.*"]}},
    {"weights": RECIPE["weights"] | {"scheme": {"bits": 3, "group_size": 128, "symmetric": False}}},
    {"weights": RECIPE["weights"] | {"scheme": {"bits": 4, "group_size": 64, "symmetric": False}}},
    {"weights": RECIPE["weights"] | {"scheme": {"bits": 4, "group_size": 128, "symmetric": True}}},
    {"calibration": {"texts": "a.txt"}},
    {"calibration": {"column": "body"}},
    {"calibration": {"split": "test"}},
    {"calibration": {"n_texts": 128}},
    {"calibration": {"max_tokens": 256}},
    {"calibration": {"seed": 1}},
    {"dims": {"n": 128}},
    {"dims": {"n": 64}},
    {"dims": {"n": 128, "method": "pca"}},
    {"vectors": {"code": "int8"}},
    {"vectors": {"code": "binary"}},
    {"vectors": {"rescore": 8}},
]


def test_the_hash_changes_with_everything_else() -> None:
    hashes = {recipe(**change).sha256() for change in CHANGES} | {recipe().sha256()}
    assert len(hashes) == len(CHANGES) + 1


def test_the_hash_of_the_weights_depends_on_what_decides_them_alone() -> None:
    vectors_only: dict[str, Any] = {"dims": {"n": 8}, "vectors": {"code": "binary"}}
    more_texts: dict[str, Any] = {"calibration": {"n_texts": 9}}
    assert recipe(**vectors_only).weights_sha256() == recipe().weights_sha256()
    assert recipe(**more_texts).weights_sha256() != recipe().weights_sha256()
    rtn: dict[str, Any] = {"weights": RECIPE["weights"] | {"method": "rtn"}}
    assert recipe(**rtn, **more_texts).weights_sha256() == recipe(**rtn).weights_sha256()
    assert recipe(**rtn).weights_sha256() != recipe().weights_sha256()


def test_a_recipe_comes_back_from_its_json_equal() -> None:
    for change in CHANGES:
        written = recipe(**change)
        assert Recipe.model_validate_json(written.model_dump_json(by_alias=True)) == written


@pytest.mark.parametrize(
    ("kind", "document", "path"),
    [
        pytest.param(kind, document, path, id=f"{kind}/{path.stem}")
        for kind, document in SHIPPED
        for path in sorted(shipped_dir(kind).glob("*.yaml"))
    ],
)
def test_every_shipped_file_is_valid_and_named_as_its_file(
    kind: ShippedKind, document: type[BaseModel], path: Path
) -> None:
    content = read_yaml(path, document)
    assert isinstance(content, Recipe | Plan | Policy)
    assert content.name == path.stem
    assert content.summary
    assert path.stem in list_shipped_names(kind)


@pytest.mark.parametrize("name", list_shipped_names("recipes/plans"))
def test_every_shipped_plan_names_recipes_and_a_policy_that_exist(name: str) -> None:
    plan = load_plan(name)
    folder = shipped_dir("recipes/plans")
    recipes = [load_recipe(recipe_name, beside=folder) for recipe_name in plan.recipes]
    assert len({loaded.sha256() for loaded in recipes}) == len(recipes)
    assert isinstance(plan.policy, str)
    load_policy(plan.policy, beside=folder)


def test_an_unknown_name_gets_the_nearest_shipped_one() -> None:
    with pytest.raises(InputError, match=r"unknown policy 'balancd': did you mean balanced\?"):
        load_policy("balancd")


def test_a_relative_file_is_found_beside_the_plan_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, current = tmp_path / "plans", tmp_path / "here"
    for folder in (beside, current):
        folder.mkdir()
        (folder / "r.yaml").touch()
    monkeypatch.chdir(current)
    assert find_yaml("recipes", "r.yaml", beside=beside) == beside / "r.yaml"
    (beside / "r.yaml").unlink()
    assert find_yaml("recipes", "r.yaml", beside=beside).resolve() == (current / "r.yaml").resolve()


def test_a_file_that_does_not_exist_is_refused_with_the_shipped_names() -> None:
    with pytest.raises(InputError, match=r"policy file no/such.yaml does not exist.*balanced"):
        load_policy("no/such.yaml")
