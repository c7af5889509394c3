"""`optimize` turns a model, data and limits into a plan and a pick. The pick is measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gteopt.build.calibration_texts import draw_calibration_texts
from gteopt.commands.choose import choose_by_policy
from gteopt.commands.judges import Judges
from gteopt.commands.optimize import Search, propose_plan
from gteopt.commands.run import run
from gteopt.config.limits import Limits
from gteopt.config.plan import Plan, PlanBench, Screening, Workload, load_plan
from gteopt.config.policy import load_policy
from gteopt.config.recipe import Calibration, load_recipe
from gteopt.errors import InputError
from gteopt.evaluation.user_data import read_texts
from gteopt.paths import ASSETS, shipped_dir
from gteopt.records.results_folder import Results, read_results
from gteopt.report.pick import pick_lines, use_lines


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short texts without labels."""
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    lines = (shipped_dir("eval/mini") / "corpus.jsonl").read_text().splitlines()[:60]
    file.write_text("\n".join(json.loads(line)["text"].replace("\n", " ") for line in lines))
    return file


def proposed(out: Path, texts: Path, search: Search | None = None, **words: str) -> Plan:
    limits = Limits(**words)  # type: ignore[arg-type]
    proposal = propose_plan("nano", Judges(texts=texts), limits, search or Search(), out=out)
    assert load_plan(str(proposal.file)) == proposal.plan
    return proposal.plan


def test_the_plan_holds_the_limits_and_the_recipes_that_can_meet_them(
    tmp_path: Path, texts: Path
) -> None:
    plan = proposed(tmp_path, texts, max_weights="13MB", min_quality="80%")
    assert plan.recipes == ("gptq-int4", "gptq-nf4")  # int8 has 13.7 MB
    assert plan.texts == texts
    assert not isinstance(plan.policy, str)
    assert set(plan.policy.limits) == {"weight_bytes", "neighbour_overlap"}


def test_where_all_recipes_are_too_large_the_token_table_is_quantized_too(
    tmp_path: Path, texts: Path
) -> None:
    plan = proposed(tmp_path, texts, max_weights="9MB")
    assert plan.recipes
    assert all("embed-int8" in name for name in plan.recipes)
    assert all((tmp_path / name).is_file() for name in plan.recipes)


def test_the_suite_is_scored_in_the_languages_of_the_models_card(tmp_path: Path) -> None:
    def scored_languages(language: str, judges: Judges) -> tuple[tuple[str, ...], str]:
        model = shutil.copytree(ASSETS / "nano", tmp_path / language)
        card = (model / "README.md").read_text().replace("[en, fr, pl, zh]", language)
        (model / "README.md").write_text(card)
        proposal = propose_plan(str(model), judges, Limits(), Search(), out=tmp_path / "out")
        return proposal.plan.languages, " ".join(proposal.notes)

    languages, notes = scored_languages("en", Judges())
    assert languages == ("en",)
    assert "scored in en, the languages of the model's card" in notes
    assert scored_languages("[pl, en]", Judges())[0] == ("pl", "en")
    assert scored_languages("fr", Judges(languages=("zh",)))[0] == ("zh",)
    # The suite stays whole if the card names no language, none of the suite's, or all of them.
    for stated in ("multilingual", "de", "[zh, en, fr, pl]"):
        languages, notes = scored_languages(stated, Judges())
        assert (languages, "scored in" in notes) == ((), False)


def test_a_limit_that_nothing_meets_names_the_smallest_recipe(tmp_path: Path, texts: Path) -> None:
    with pytest.raises(InputError) as caught:
        proposed(tmp_path, texts, max_weights="2MB")
    assert "no recipe meets --max-weights 2MB: the smallest is" in str(caught.value)
    assert "Give --max-weights" in str(caught.value)


def test_vllm_gets_formats_that_it_opens(tmp_path: Path, texts: Path) -> None:
    plan = proposed(tmp_path, texts, Search(engine="vllm"))
    assert "gptq-nf4" in plan.recipes
    written = [name for name in plan.recipes if name.endswith(".yaml")]
    assert written
    assert all("compressed-tensors" in (tmp_path / name).read_text() for name in written)


def test_an_index_limit_shortens_vectors(tmp_path: Path, texts: Path) -> None:
    plan = proposed(tmp_path, texts, max_vector_bytes="64B")
    assert len(plan.recipes) > 3
    assert any("64-int8" in name for name in plan.recipes)
    assert any("64-bytes" in name for name in plan.recipes)


def test_many_own_texts_are_calibrated_on_and_judged_on_and_none_is_both(tmp_path: Path) -> None:
    own_texts = [f"Order {i} left the warehouse in {i % 7 + 2} boxes." for i in range(240)]
    (tmp_path / "own.txt").write_text("\n".join(own_texts))
    plan = proposed(tmp_path / "out", tmp_path / "own.txt", max_weights="13MB")
    assert plan.texts is not None
    judged = set(read_texts(plan.texts))
    recipe = load_recipe(str(tmp_path / "out" / plan.recipes[0]))
    drawn = {entry.text for entry in draw_calibration_texts(recipe.calibration)}
    assert judged | (drawn & set(own_texts)) == set(own_texts)
    assert not judged & drawn
    assert len(drawn & set(own_texts)) == 60
    builtin = drawn - set(own_texts)
    assert builtin <= {entry.text for entry in draw_calibration_texts(Calibration())}
    assert len(builtin) == Calibration().n_texts - 60


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> tuple[Plan, Results]:
    plan = Plan(
        schema="gteopt.plan/1",
        name="unlabelled",
        base="nano",
        recipes=("rtn-int8", "rtn-int4", "nf4"),
        texts=texts,
        screening=Screening(n_texts=40, keep=1),
        bench=PlanBench(
            n_queries=10, repeats=6, warmup=1, workloads=(Workload(batch_size=2, tokens=16),)
        ),
        policy=Limits(min_quality="60%").policy(labelled=False),
        out=tmp_path_factory.mktemp("unlabelled"),
    )
    return plan, run(plan)


def test_without_labels_the_pick_is_measured_and_is_no_unquantized_base(
    unlabelled: tuple[Plan, Results],
) -> None:
    plan, results = unlabelled
    assert results.choice is not None
    picked = results.choice.picked
    assert picked in plan.recipes
    assert picked in results.fidelity
    assert picked in results.benched
    assert "retention" not in results.choice.reason
    assert not [
        candidate
        for candidate in results.choice.candidates
        if candidate.name == picked and candidate.broken
    ]
    assert set(results.benched) == {"bf16", picked}  # one variant passed screening


def test_the_last_lines_say_the_price_and_the_commands(unlabelled: tuple[Plan, Results]) -> None:
    plan, results = unlabelled
    lines = pick_lines(results)
    assert lines[0].startswith("Pick: ")
    assert "of weights instead of 16.79 MB" in lines[0]
    assert "x the baseline's speed (" in lines[0]
    assert "of the 10 nearest neighbours" in lines[0]
    assert lines[1].startswith("Runner-up: ")
    use = "\n".join(use_lines(results, plan.out))
    assert f"gteopt serve {plan.out}" in use
    assert "gteopt.load(" in use


def test_a_second_run_finds_everything_done(unlabelled: tuple[Plan, Results]) -> None:
    plan, first_results = unlabelled
    steps: list[str] = []

    def note(what: str, done: int, total: int) -> None:
        steps.append(what)

    assert run(plan, progress=note).fidelity.keys() == first_results.fidelity.keys()
    assert not [step for step in steps if step.startswith(("quantizing", "measuring"))]


def test_another_policy_can_judge_what_has_no_labels(unlabelled: tuple[Plan, Results]) -> None:
    plan, _ = unlabelled
    results = choose_by_policy(plan.out, load_policy("balanced"))
    assert results.choice is not None
    assert "retention_low" not in results.choice.policy.limits
    assert "not measured" not in results.choice.reason
    assert read_results(plan.out).choice == results.choice
