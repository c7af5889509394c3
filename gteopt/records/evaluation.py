"""Records of scores, of differences with their intervals, and of published scores."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gteopt.config.policy import DEFAULT_MARGIN
from gteopt.config.recipe import VectorCode
from gteopt.frozen import Frozen
from gteopt.records.environment import Conditions, MachineRecord

Verdict = Literal["equivalent", "better", "worse", "undecided"]
"""The claim about a difference, given its interval and a margin that does not matter."""
Correction = Literal["family", "row"]
"""What the verdicts' error rate covers: all claims of a table together, or each row alone."""


class ScoreDifference(Frozen):
    """Variant - baseline, on the 0 to 1 scale of scores, with a 95 % paired bootstrap interval.

    Attributes:
        low, high: ends of the interval.
        verdict: "equivalent" where both one-sided tests against the margin pass. "worse" or
            "better" where the interval excludes zero. Both hold after the report's `correction`.
        p: two-sided p-value of the hypothesis of no difference, not corrected.
        freedom: degrees of freedom of the standard error; None for a normal distribution.
    """

    value: float
    low: float
    high: float
    verdict: Verdict
    p: float
    freedom: float | None = None


class SequentialTest(Frozen):
    """A sequential test: the difference was tested before all items were scored.

    Attributes:
        n_scored: number of scored items, taken from the start of a random order.
        n_all: number of all items.
        nominal: two-sided level of a single test that gives `error_rate` over all tests.
        error_rate: two-sided error rate of the verdict, over all tests together.
    """

    n_scored: int
    n_all: int
    nominal: float
    error_rate: float

    @property
    def is_part(self) -> bool:
        """Whether scoring stopped before the last item."""
        return self.n_scored < self.n_all


class PublishedComparison(Frozen):
    """The baseline's measured score beside a published score of the same model.

    Both scores are over the same queries and pairs, so an interval over these would not explain the
    difference. Known causes are listed instead.

    Attributes:
        score: published score, 0 to 1.
        baseline_score: measured score, 0 to 1.
        other_conditions: conditions that differ, or that may differ.
        same_data: whether both scores are over one data revision. False excludes the task from
            means; None is unknown.
        n_tasks: number of tasks in both means.
        source: the model's revision that was run, or "external" for a claim of its card. For a
            suite, the source of the scores.
    """

    score: float
    baseline_score: float
    other_conditions: tuple[str, ...] = ()
    same_data: bool | None = None
    n_tasks: int = 1
    source: str

    @property
    def difference(self) -> float:
        """Measured score minus published score."""
        return self.baseline_score - self.score


class TaskScore(Frozen):
    """One task, split and subset (language).

    Attributes:
        score: the task's main score as mteb computes it, 0 to 1.
        baseline_score: the baseline's score on the same data in the same environment.
        instruction: instruction that was put before queries; None where the model takes none.
        difference: score minus baseline score, with its interval; None where `no_interval` says
            why.
        unit: what the interval resamples ("query", "pair", "document").
        n_units: number of these units.
        chance: expected score of a random model; None where it is not known.
        above_chance: whether the baseline's score is significantly above chance. If not, the task
            is left out of the suite's mean.
        published: the published score, only for the baseline of a published model.
        sequential: set where `evaluate --stop-when decided` tested the difference early. If scoring
            stopped early, both scores are over the items scored until then.
    """

    task: str
    task_type: str
    split: str
    subset: str
    metric: str
    score: float
    baseline_score: float
    instruction: str | None
    dataset_revision: str
    n_samples: int
    difference: ScoreDifference | None = None
    unit: str | None = None
    n_units: int | None = None
    chance: float | None = None
    above_chance: bool | None = None
    no_interval: str | None = None
    published: PublishedComparison | None = None
    sequential: SequentialTest | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether the score is over only a part of the items."""
        return self.sequential is not None and self.sequential.is_part


class FailedTask(Frozen):
    """A task that could not be scored, and why; it makes a report partial."""

    task: str
    reason: str


class Fidelity(Frozen):
    """Closeness to the baseline on the suite's texts, without labels.

    Attributes:
        mean_cosine: mean cosine of stored vectors with the baseline's vectors of the same texts.
            Dimensions that a stored vector lacks count as zero.
        p1_cosine: 1st percentile of these cosines.
        neighbour_overlap: mean share of the baseline's 10 nearest neighbours that are among the
            variant's 10, on the vectors as stored (truncated, coded, rescored).
        n_queries: queries whose neighbours were searched.
        n_documents: documents that were searched.
        n_all_documents: distinct documents of all tasks; estimated to 2 % where only a sample of
            them was searched.
        spearman: Spearman correlation of the variant's similarities with the baseline's, over
            pairs of texts, on the vectors as stored.
    """

    n_texts: int
    mean_cosine: float
    p1_cosine: float
    neighbour_overlap: float
    spearman: float
    n_queries: int
    n_documents: int
    n_all_documents: int

    @property
    def among(self) -> str:
        """The number of queries and searched documents, in words."""
        documents = f"{self.n_documents:,}"
        if self.n_all_documents > self.n_documents:
            digits = len(str(self.n_all_documents)) - 2  # the estimate has two correct digits
            documents += f" of about {round(self.n_all_documents, -digits):,}"
        return f"of {self.n_queries:,} queries among {documents} documents, tasks pooled"


class ReferenceAverage(Frozen):
    """An average score on a model's card.

    Attributes:
        benchmark: the benchmark's name on the card.
        suite: shipped suite of the same benchmark, whose tasks may have changed since.
        n_tasks: number of tasks in the average.
        score: 0 to 1.
    """

    benchmark: str
    suite: str
    n_tasks: int
    score: float


class ReferenceScore(Frozen):
    """A published main score, 0 to 1.

    Attributes:
        revision: the model's revision, or "external" for a claim of its card.
        protocol: protocol of the run; "mteb" for the results repository's own runs.
    """

    task: str
    split: str
    subset: str
    score: float
    revision: str
    dataset_revision: str | None
    protocol: str = "mteb"


class Reference(Frozen):
    """`eval/reference/<model>.json`: published scores of one model.

    Attributes:
        model: id on the Hub.
        source: source of `scores`, with its revision.
        averages_source: source of `averages`.
        authors_protocol: protocol behind the card's figures.
        authors_precision: dtype that the card's vectors were computed in; None where the card does
            not say.
    """

    schema_: Literal["gteopt.reference/1"] = Field(default="gteopt.reference/1", alias="schema")
    model: str
    source: str
    averages_source: str | None
    averages: tuple[ReferenceAverage, ...]
    authors_protocol: str = "authors"
    authors_precision: str | None = None
    scores: tuple[ReferenceScore, ...]


class SuiteForecast(Frozen):
    """The mean of a whole suite, predicted from a part of its tasks.

    Attributes:
        suite: name of the whole suite.
        score: predicted mean, 0 to 1.
        error: largest error of the prediction for a share `rate` of models.
        n_tasks: number of tasks in the predicted mean.
        n_models: number of models behind `error`; they were not used to choose the tasks.
    """

    suite: str
    score: float
    error: float
    rate: float
    n_tasks: int
    n_models: int


class EvalReport(Frozen):
    """Result of `evaluate` for one variant on one suite.

    Attributes:
        score, baseline_score: mean over tasks, with subsets averaged within a task first. Tasks
            where the baseline is not above chance are left out; `notes` names them.
        retention: score / baseline_score; None where `no_retention` says why.
        partial: some task failed or stopped early; the mean is over the other tasks, so it must not
            be compared with other reports.
        difference: difference of the scores over the tasks that have an interval; the set of tasks
            is taken as fixed. None where no task has an interval.
        retention_low, retention_high: 95 % interval of retention, from the same resamples.
        n_interval_tasks: number of tasks behind `difference` and the interval of retention.
        margin: a difference of scores that does not matter; verdicts are tested against it.
        n_claims: number of differences that were tested together (tasks x variants).
        correction: what the verdicts' error rate covers; "family" uses Holm's correction.
        dims, code, bytes_per_vector: of the vectors that were scored.
        n_asked_texts: texts whose vectors the tasks needed, counted in the run that scored them.
        n_encoded_texts: number of these texts that were encoded; the others came from the cache.
        n_cut_texts: number of these texts that were cut to the model's maximum length.
        notes: unusual events, such as a damaged cache or batches that did not fit the memory.
        protocol: protocol of the scores.
        whole_suite: prediction for the whole suite from the scored part; None where all tasks were
            scored.
        published: mean over the tasks that have a published score of the same data; only for the
            baseline of a published model.
        published_average: average of the same benchmark on the model's card, over whatever tasks it
            has; None where there is none.
        asked: options of `gteopt evaluate` that repeat this evaluation, with file names without
            folders; empty where it did not come from the command line.
    """

    schema_: Literal["gteopt.eval/1"] = Field(default="gteopt.eval/1", alias="schema")
    variant: str
    artifact_sha256: str
    baseline: str
    baseline_sha256: str
    suite: str
    suite_sha256: str
    tasks: tuple[TaskScore, ...]
    failed: tuple[FailedTask, ...]
    partial: bool
    score: float
    baseline_score: float
    retention: float | None
    no_retention: str | None = None
    difference: ScoreDifference | None = None
    retention_low: float | None = None
    retention_high: float | None = None
    n_interval_tasks: int = 0
    margin: float = DEFAULT_MARGIN
    n_claims: int = 0
    correction: Correction = "family"
    dims: int
    code: VectorCode
    bytes_per_vector: int
    n_asked_texts: int = 0
    n_encoded_texts: int = 0
    n_cut_texts: int = 0
    notes: tuple[str, ...] = ()
    protocol: str = "gteopt"
    whole_suite: SuiteForecast | None = None
    published: PublishedComparison | None = None
    published_average: ReferenceAverage | None = None
    asked: tuple[str, ...] = ()
    fidelity: Fidelity
    machine: MachineRecord
    versions: Conditions


class ItemComparison(Frozen):
    """Comparison of two files of item scores; fields as in `EvalReport`."""

    schema_: Literal["gteopt.item-comparison/1"] = Field(
        default="gteopt.item-comparison/1", alias="schema"
    )
    variant: str
    artifact_sha256: str
    baseline: str
    baseline_sha256: str
    suite: str
    suite_sha256: str
    protocol: str
    tasks: tuple[TaskScore, ...]
    score: float
    baseline_score: float
    difference: ScoreDifference | None
    retention_low: float | None
    retention_high: float | None
    n_interval_tasks: int
    margin: float
    correction: Correction
    notes: tuple[str, ...] = ()


class FidelityReport(Frozen):
    """Result of `evaluate --texts` for one variant: a user's own texts, without labels.

    Attributes:
        texts: name of the file; `texts_sha256` covers the texts and their order.
        dims, code, bytes_per_vector: of the vectors that were compared.
        n_asked_texts: texts whose vectors were needed.
        n_encoded_texts: number of these texts that were encoded in this run for this row. The
            others came from the cache of an earlier run or of another row with the same weights.
        n_cut_texts: see `EvalReport`.
        notes: see `EvalReport`.
    """

    schema_: Literal["gteopt.fidelity/1"] = Field(default="gteopt.fidelity/1", alias="schema")
    variant: str
    artifact_sha256: str
    baseline: str
    baseline_sha256: str
    texts: str
    texts_sha256: str
    dims: int
    code: VectorCode
    bytes_per_vector: int
    n_asked_texts: int
    n_encoded_texts: int
    n_cut_texts: int = 0
    notes: tuple[str, ...]
    fidelity: Fidelity
    machine: MachineRecord
    versions: Conditions


class TaskEstimate(Frozen):
    """Estimated size of one task.

    Attributes:
        n_texts: distinct texts; None where the task's size is not known.
        n_tokens: tokens, estimated from the texts' characters.
    """

    task: str
    n_texts: int | None = None
    n_tokens: int | None = None


class EvaluationEstimate(Frozen):
    """Result of `evaluate --dry-run`: the texts to encode, the time, the disk space.

    Attributes:
        models: models that would encode.
        n_texts, n_tokens: for one model, over the tasks whose size is known.
        tokens_per_s: speed of one model on this machine; None where it is not known.
        rate_source: where the speed comes from, or why there is none.
        seconds: time for all models, without the scoring.
        vector_bytes: bytes of one model's cached vectors, up to the cache's limit.
        missing: tasks whose data is not on this machine.
        download_bytes: approximate download for the missing tasks.
        price_per_hour, dollars: price of this machine, and the price of `seconds` on it.
    """

    schema_: Literal["gteopt.estimate/1"] = Field(default="gteopt.estimate/1", alias="schema")
    suite: str
    models: tuple[str, ...]
    tasks: tuple[TaskEstimate, ...]
    n_texts: int
    n_tokens: int
    tokens_per_s: float | None
    rate_source: str
    seconds: float | None
    vector_bytes: int
    missing: tuple[str, ...]
    download_bytes: int
    price_per_hour: float | None = None
    dollars: float | None = None
