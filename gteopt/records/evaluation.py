"""Records of scores, of differences with their intervals, and of published scores."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gteopt.config.policy import DEFAULT_MARGIN
from gteopt.config.recipe import VectorCode
from gteopt.frozen import Frozen
from gteopt.records.environment import Conditions, Machine

Verdict = Literal["equivalent", "better", "worse", "undecided"]
"""What may be said of a difference, given its interval and a margin that does not matter."""
Correction = Literal["family", "row"]
"""What a verdict's error rate holds for: all claims of a table together, or each row alone."""


class Difference(Frozen):
    """Variant - baseline, on the 0 to 1 scale of scores, with a 95 % paired bootstrap interval.

    Attributes:
        low, high: ends of the interval.
        verdict: "equivalent" where both one-sided tests against the margin are passed; "worse" or
            "better" where the interval leaves out zero. Both survive the report's `correction`.
        p: two-sided p-value of a difference of zero, not corrected.
        freedom: degrees of freedom of the standard error; None is a normal distribution.
    """

    value: float
    low: float
    high: float
    verdict: Verdict
    p: float
    freedom: float | None = None


class Sequential(Frozen):
    """How a score came about whose difference was looked at before all items were scored.

    Attributes:
        n_scored: items that were scored: the first of a random order.
        n_all: items that there are.
        nominal: two-sided level of one look that makes `error_rate` over all looks.
        error_rate: of the verdict, two-sided, over all looks together.
    """

    n_scored: int
    n_all: int
    nominal: float
    error_rate: float

    @property
    def is_part(self) -> bool:
        """Whether scoring was stopped before the end."""
        return self.n_scored < self.n_all


class BesidePublished(Frozen):
    """The baseline's own score beside a published one of the same model.

    Both are of the same queries and pairs, so that no interval over these says anything of the
    difference. What may be behind it is named instead.

    Attributes:
        score: published, 0 to 1.
        baseline_score: ours.
        other_conditions: what is known to be otherwise, or is not known to be the same.
        same_data: whether both are of one data revision; False keeps the task out of means, None
            is not known.
        n_tasks: that both are means over.
        source: the model's revision that was run, or "external": what its card claims; of a suite,
            where the scores come from.
    """

    score: float
    baseline_score: float
    other_conditions: tuple[str, ...] = ()
    same_data: bool | None = None
    n_tasks: int = 1
    source: str

    @property
    def difference(self) -> float:
        """Ours less the published one."""
        return self.baseline_score - self.score


class TaskScore(Frozen):
    """One task, split and subset (language).

    Attributes:
        score: the task's main score, 0 to 1 as mteb gives it.
        baseline_score: the baseline's on the same data in the same environment.
        instruction: what queries were prefixed with; None where the model takes none.
        difference: from the baseline, with its interval; None where `no_interval` says why.
        unit: what the interval resamples ("query", "pair", "document").
        n_units: how many of them there are.
        chance: expected score of a model that knows nothing; None where that is not known.
        above_chance: whether the baseline's score is surely above it; where it is not, the score is
            left out of the suite's mean.
        published: of the baseline of a published model alone, what was published for it.
        sequential: where `evaluate --stop-when decided` looked at the difference on the way. Both
            scores of a task that was stopped are over the items until then.
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
    difference: Difference | None = None
    unit: str | None = None
    n_units: int | None = None
    chance: float | None = None
    above_chance: bool | None = None
    no_interval: str | None = None
    published: BesidePublished | None = None
    sequential: Sequential | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether the score is over a part of the items."""
        return self.sequential is not None and self.sequential.is_part


class FailedTask(Frozen):
    """A task that could not be scored, and why; a report that has one is partial."""

    task: str
    reason: str


class Fidelity(Frozen):
    """Closeness to the baseline on the suite's own texts; no labels.

    Attributes:
        mean_cosine: mean cosine of what is stored with the baseline's vector of the same text. A
            stored vector stands for one of full length: dimensions that were left out are zero.
        p1_cosine: its 1st percentile.
        neighbour_overlap: mean share of the baseline's 10 nearest neighbours that are among the
            variant's 10, on the vectors as stored (truncated, coded, rescored).
        n_queries: queries whose neighbours were looked for.
        n_documents: documents among which the neighbours were looked for.
        n_all_documents: different documents of all tasks; where only a sample of them is looked at,
            estimated from it, to 2 %.
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
        """In words, which neighbours were looked for."""
        whole = f"{self.n_documents:,}"
        if self.n_all_documents > self.n_documents:
            digits = len(str(self.n_all_documents)) - 2  # as many as the estimate is good for
            whole += f" of about {round(self.n_all_documents, -digits):,}"
        return f"of {self.n_queries:,} queries among {whole} documents, tasks pooled"


class ReferenceAverage(Frozen):
    """An average on a model's card.

    Attributes:
        benchmark: what the card calls it.
        suite: shipped suite of the same benchmark, whose tasks may have moved since.
        n_tasks: that it is over.
        score: 0 to 1.
    """

    benchmark: str
    suite: str
    n_tasks: int
    score: float


class ReferenceScore(Frozen):
    """A published main score, 0 to 1.

    Attributes:
        revision: the model's, or "external" for what its card claims.
        protocol: by which it was made: "mteb" for the results repository's own runs.
    """

    task: str
    split: str
    subset: str
    score: float
    revision: str
    dataset_revision: str | None
    protocol: str = "mteb"


class Reference(Frozen):
    """`eval/reference/<model>.json`: what is published of one model.

    Attributes:
        model: id on the Hub.
        source: where `scores` come from, with its state.
        averages_source: where `averages` come from.
        authors_protocol: by which the card's figures were made.
        authors_precision: in which its vectors were computed; None where the card does not say.
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
    """The mean of a whole suite, foretold from a part of its tasks.

    Attributes:
        suite: the whole.
        score: 0 to 1.
        error: forecasts were at most this far off for a share `rate` of models.
        n_tasks: whose mean is foretold.
        n_models: that told the error, and had no say in the choice of tasks.
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
        score, baseline_score: mean over tasks (subsets averaged within a task first) without those
            where the baseline is not above chance; `notes` names these.
        retention: score / baseline_score; None where `no_retention` says why.
        partial: some task failed or was stopped once decided; the mean is over the others and
            comparable only with itself.
        difference: of the scores, over the tasks that have an interval, which are taken as given;
            None where no task has one.
        retention_low, retention_high: 95 % interval of retention, from the same resamples.
        n_interval_tasks: how many tasks `difference` and the ends of retention are over.
        margin: differences up to this are of no matter; what verdicts are against.
        n_claims: how many differences were tested together (tasks x variants).
        correction: what the error rate of the verdicts holds for (Holm where it is the family).
        dims, code, bytes_per_vector: of the vectors that were scored.
        n_asked_texts: texts whose vectors the tasks asked for, each in the run that scored it.
        n_encoded_texts: of these, encoded; the others came from the cache.
        n_cut_texts: of these, longer than the model takes, and cut there.
        notes: anything out of the ordinary: a damaged cache, batches that did not fit the memory.
        protocol: by which the scores were made.
        whole_suite: what the scored part of a suite says of all of it; None where nothing is left
            out.
        published: of the baseline of a published model alone: the mean over the tasks that have a
            published score of the same data.
        published_average: the average on the model's card that the suite goes by, whatever tasks
            it is over; None where there is none.
        asked: options of `gteopt evaluate` that ask for this, files by their names without their
            folders; empty where it was not the command line that asked.
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
    difference: Difference | None = None
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
    published: BesidePublished | None = None
    published_average: ReferenceAverage | None = None
    asked: tuple[str, ...] = ()
    fidelity: Fidelity
    machine: Machine
    versions: Conditions


class ItemComparison(Frozen):
    """Two files of item scores beside each other; fields as in `EvalReport`."""

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
    difference: Difference | None
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
        dims, code, bytes_per_vector: of what was compared.
        n_asked_texts: texts whose vectors were needed.
        n_encoded_texts: of these, encoded in this run and for this row; the others came from the
            cache, where an earlier run or row of the same weights had put them.
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
    machine: Machine
    versions: Conditions


class TaskEstimate(Frozen):
    """What scoring one task takes, as far as it is known beforehand.

    Attributes:
        n_texts: distinct texts; None where nothing is known of the task.
        n_tokens: estimated from their characters.
    """

    task: str
    n_texts: int | None = None
    n_tokens: int | None = None


class EvaluationEstimate(Frozen):
    """Result of `evaluate --dry-run`: what would be encoded, how long, on how much disk.

    Attributes:
        models: that would encode.
        n_texts, n_tokens: of one model, over the tasks that are known.
        tokens_per_s: of one model on this machine; None where nothing tells it.
        rate_source: where the rate comes from, or why there is none.
        seconds: for all models, encoding alone.
        vector_bytes: of one model's cached vectors, as much as the cache may keep.
        missing: tasks whose data are not here.
        download_bytes: about what would be downloaded for these.
        price_per_hour, dollars: of this machine, and for `seconds` of it.
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
