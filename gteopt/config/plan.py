"""Plans: one base, several recipes, a suite, bench workloads and a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, field_validator, model_validator

from gteopt.config.amounts import parse_seconds
from gteopt.config.policy import Policy
from gteopt.config.recipe import Effort
from gteopt.config.yaml_files import find_yaml, read_yaml
from gteopt.errors import suggest_names
from gteopt.frozen import Frozen


class Workload(Frozen):
    """One throughput measurement: `batch_size` texts of exactly `tokens` tokens.

    Attributes:
        batch_size: texts that are encoded together.
        tokens: tokens of each text, or their median.
        lengths: "equal", or "lognormal": seeded random lengths with median `tokens` and a standard
            deviation of 0.8 in their logarithm. They are limited to between an eighth and four
            times the median, and encoded in batches of at most 32.
    """

    batch_size: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=1)]
    lengths: Literal["equal", "lognormal"] = "equal"

    @property
    def longest(self) -> int:
        """Most tokens that one of the texts can have."""
        return self.tokens if self.lengths == "equal" else 4 * self.tokens

    @property
    def name(self) -> str:
        """The command line's spelling: "8x128", or "64x~128" for lengths around a median."""
        return f"{self.batch_size}x{'' if self.lengths == 'equal' else '~'}{self.tokens}"


WorkloadSet = Literal["short", "long"]
WORKLOADS: dict[WorkloadSet, tuple[Workload, ...]] = {
    "short": (
        Workload(batch_size=32, tokens=32),
        Workload(batch_size=32, tokens=128),
        Workload(batch_size=8, tokens=512),
    ),
    "long": (
        *(Workload(batch_size=16_384 // n, tokens=n) for n in (128, 512, 2048, 8192)),
        Workload(batch_size=1, tokens=32_768),
        Workload(batch_size=128, tokens=128, lengths="lognormal"),
    ),
}
"""Default workloads: "short" on a CPU, "long" on a GPU.

"long" has batches of 16,384 tokens, one text of 32,768 tokens, and texts of mixed lengths.
"""


class BenchSpec(Frozen):
    """What `bench` measures.

    Attributes:
        query_tokens: length of the single query whose latency is measured.
        n_queries: single queries timed per variant.
        workloads: the throughput grid; a plan may name a set of `WORKLOADS`, "short" or "long".
        warmup: runs before each measurement that are not counted.
        repeats: counted runs of each workload, interleaved over the variants. With 6 or more, speed
            ratios get an interval.
    """

    query_tokens: Annotated[int, Field(ge=1)] = 16
    n_queries: Annotated[int, Field(ge=10)] = 50
    workloads: Annotated[tuple[Workload, ...], Field(min_length=1)] = WORKLOADS["short"]
    warmup: Annotated[int, Field(ge=0)] = 2
    repeats: Annotated[int, Field(ge=1)] = 7

    @field_validator("workloads", mode="before")
    @classmethod
    def _of_a_set(cls, workloads: object) -> object:
        if not isinstance(workloads, str):
            return workloads
        if workloads not in WORKLOADS:
            raise ValueError(f"unknown set of workloads; {suggest_names(workloads, WORKLOADS)}")
        return WORKLOADS[workloads]


class PlanBench(BenchSpec):
    """What a plan measures, and the price of its machine.

    Attributes:
        price_per_hour: price of the machine in dollars, for costs; it changes no measurement.
    """

    price_per_hour: Annotated[FiniteFloat, Field(ge=0)] | None = None

    @property
    def spec(self) -> BenchSpec:
        """What is measured."""
        return BenchSpec.model_validate(self.model_dump(exclude={"price_per_hour"}))


ColumnRole = Literal["sentence1", "sentence2", "score", "query", "positive", "negative", "text"]
"""What a column of a user's own table holds."""


class Screening(Frozen):
    """A quick comparison of all variants, so that only the promising ones are measured in full.

    Attributes:
        n_texts: texts on which each variant is compared with the baseline.
        keep: largest number of variants to measure in full.
    """

    n_texts: Annotated[int, Field(ge=20)] = 300
    keep: Annotated[int, Field(ge=1)] = 3


class Plan(Frozen):
    """One base, several recipes, data to judge on, bench workloads and a policy.

    Attributes:
        name: small letters, digits, dots, hyphens, underscores.
        summary: one line for tables.
        base: "nano", a folder, or `<org>/<name>`.
        recipes: shipped names, or files relative to the plan's folder.
        suite: a shipped name or a file; `mini` where neither `data` nor `texts` is given.
        data: your own labelled data, scored as one more task: a path relative to the working
            directory, or the name of a data set (ORG/NAME).
        columns: which column of `data` or `texts` holds what; needed where names do not tell.
        texts: your own texts without labels; fidelity is then judged instead of scores.
        languages: languages of the suite to score; empty scores all.
        budget: time for the suite ("30m"); tasks that fit it are chosen. All tasks are scored when
            left out.
        effort: effort of GPTQ recipes; each recipe's own when left out.
        screening: quick comparison before variants are measured in full; not done when left out.
        bench: what is measured.
        policy: a shipped name, a file relative to the plan's folder, or the policy itself.
        out: results folder.
    """

    schema_: Literal["gteopt.plan/1"] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    summary: str = ""
    base: str
    recipes: Annotated[tuple[str, ...], Field(min_length=1)]
    suite: str | None = None
    data: Path | None = None
    columns: dict[ColumnRole, str] = Field(default_factory=dict)
    texts: Path | None = None
    languages: tuple[str, ...] = ()
    budget: str | None = None
    effort: Effort | None = None
    screening: Screening | None = None
    bench: PlanBench = PlanBench()
    policy: str | Policy = "balanced"
    out: Path

    @model_validator(mode="after")
    def _has_one_kind_of_data(self) -> Self:
        if self.texts is not None and (self.suite is not None or self.data is not None):
            raise ValueError("texts has no labels to score; leave out suite and data")
        if self.columns and self.data is None and self.texts is None:
            raise ValueError("columns needs data or texts, whose columns it names")
        if self.languages and self.suite is None and (self.data or self.texts):
            raise ValueError("languages needs a suite to choose from")
        if self.budget is not None:
            parse_seconds("budget", self.budget)
            if self.suite is None:
                raise ValueError("budget needs a suite to choose tasks from")
        return self

    @property
    def suite_name(self) -> str | None:
        """The suite to score; `mini` where the plan names no data at all."""
        has_own = self.data is not None or self.texts is not None
        return self.suite or (None if has_own else "mini")


def load_plan(name_or_file: str) -> Plan:
    """A shipped plan by name, or one from a YAML file."""
    return read_yaml(find_yaml("recipes/plans", name_or_file), Plan)
