"""The command line: parse, call, print. Heavy imports happen inside commands."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from typer.core import TyperGroup

from gteopt.errors import GteoptError, InputError, is_out_of_memory
from gteopt.progress import Steps, shown

if TYPE_CHECKING:
    from gteopt.evaluation.workers import Workers
    from gteopt.recipe import BenchSpec, Effort, Frozen, LayoutChoice, Recipe
    from gteopt.records import Manifest, Publication, Results


class _Interrupted(GteoptError):
    """Ctrl-C."""


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Group(TyperGroup):
    """Says what Ctrl-C leaves behind, whichever command it stops."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that `ctx` names."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _Interrupted(f"interrupted{_left_behind(ctx.invoked_subcommand)}") from interrupt


def _left_behind(command: str | None) -> str:
    """What a command that was stopped in the middle has kept, as the end of a sentence."""
    goes_on = "; what is finished is kept, and the same command goes on from there"
    if command in ("run", "quantize", "pull", "publish"):
        return goes_on
    if command in ("bench", "evaluate"):
        if not any(each.split("=")[0] == "--out" for each in sys.argv):
            return "; nothing is kept, as no --out was given"
        if command == "evaluate":
            return goes_on
        if "--dummy-weights" in sys.argv:
            return "; nothing is kept"
        return "; variants that were measured are kept: name the others to add them"
    return ""


app = typer.Typer(
    name="gteopt",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Turn a text-embedding model into the cheapest variant that still ranks like it.\n\n"
    "Start with `gteopt run recipes/plans/demo.yaml`, or `gteopt inspect nano`.",
)
# Piped output has no width of its own; rich would assume 80 columns and drop some of a table's.
_out = Console(width=None if sys.stdout.isatty() else 120)
_err = Console(stderr=True)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
HubDir = Annotated[
    Path | None,
    typer.Option(
        help="read models and data sets from DIR/ORG/NAME; the network is never touched",
        envvar="GTEOPT_HUB_DIR",
        metavar="DIR",
    ),
]
BackendOption = Annotated[
    Literal["torch", "openvino"],
    typer.Option(
        help="what computes the variants (the baseline is torch's): openvino is the faster one on "
        "a CPU with VNNI or AMX"
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(help="score with one process a device: cuda:0,cuda:1, or cpu,cpu", metavar="LIST"),
]
Ray = Annotated[
    str | None,
    typer.Option(
        help="score on a Ray cluster: auto (the one that this machine is in), or HOST:PORT",
        metavar="auto|ADDRESS",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print the record as JSON on stdout")]
Family = Annotated[
    str | None,
    typer.Option(
        help="family of the base, where neither its files nor its name tell: gte-qwen, "
        "qwen3-embedding, e5-mistral, nv-embed"
    ),
]
EffortOption = Annotated[
    Literal["fast", "standard", "best"] | None,
    typer.Option(
        help="of GPTQ recipes: the solver alone, or its result tuned against the base's "
        "vectors for 400 or 1600 steps (beyond 2 billion weights scales, norms and biases of "
        "each block against the base's, for 100 or 400); mixed-nf4 of all-MiniLM-L6-v2 takes "
        "4, 15 and 60 minutes of one core; the recipe's own when left out"
    ),
]
EmbedInt8 = Annotated[
    bool, typer.Option("--embed-int8", help="keep the token embedding table in int8 too")
]
LayoutOption = Annotated[
    Literal["auto", "gptq", "compressed-tensors", "bitsandbytes", "gteopt"] | None,
    typer.Option(
        help="how quantized weights lie on disk: whose checkpoint format, or gteopt's own; the "
        "recipe's own when left out"
    ),
]
KeptDtype = Annotated[str, typer.Option(help="of what stays unquantized")]


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number that can be counted with")
    return value


ActivationGb = Annotated[
    float,
    typer.Option(
        min=0,
        callback=_finite,
        help="memory for the calibration texts' hidden states; the others lie on disk beside "
        "the artifact while it is built",
    ),
]
Out = Annotated[Path, typer.Option(help="folder of the new artifact; must not exist yet")]
Base = Annotated[str, typer.Argument(help="'nano', a folder, or ORG/NAME")]
Repo = Annotated[str, typer.Option(help="ORG/NAME on the model hub", metavar="ORG/NAME")]
Artifacts = Annotated[list[str], typer.Argument(help="artifact folders, or bases")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from gteopt import __version__

        typer.echo(f"gteopt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="show the traceback of an error")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="show the version and stop", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    del debug, version  # main looks for --debug itself, as it must know before anything is parsed


@app.command()
def run(
    plan: Annotated[str, typer.Argument(help="a plan's YAML file, or the name of a shipped plan")],
    out: Annotated[Path | None, typer.Option(help="results folder instead of the plan's")] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(min=0, help="of this machine in dollars, instead of the plan's"),
    ] = None,
    hub_dir: HubDir = None,
    device: Device = "auto",
    devices: Devices = None,
    ray: Ray = None,
    as_json: AsJson = False,
) -> None:
    """Build, measure, score and choose: a whole plan, or what is left of it.

    Example: `gteopt run recipes/plans/demo.yaml`
    """
    from gteopt.plan import run as run_plan
    from gteopt.recipe import find_yaml, load_plan

    document = load_plan(plan)
    if out is not None:
        document = document.model_copy(update={"out": out})
    if price_per_hour is not None:
        priced = document.bench.model_copy(update={"price_per_hour": price_per_hour})
        document = document.model_copy(update={"bench": priced})
    beside = find_yaml("recipes/plans", plan).parent
    with _workers(devices, ray, device) as workers, _progress() as progress:
        results = run_plan(
            document,
            beside=beside,
            hub_dir=hub_dir,
            device=device,
            workers=workers,
            progress=progress,
        )
    _show_results(results, as_json=as_json)
    if not as_json:
        _out.print(f"Report: {document.out / 'report.html'}", soft_wrap=True)


@app.command()
def quantize(
    base: Base,
    out: Out,
    recipe: Annotated[
        str, typer.Option(help="a shipped recipe (`gteopt recipes`), or a file")
    ] = "mixed-nf4",
    effort: EffortOption = None,
    embed_int8: EmbedInt8 = False,
    layout: LayoutOption = None,
    hub_dir: HubDir = None,
    revision: Annotated[str | None, typer.Option(help="commit or tag on the Hub")] = None,
    family: Family = None,
    dtype: KeptDtype = "bfloat16",
    activation_gb: ActivationGb = 4,
    device: Device = "auto",
    devices: Annotated[
        str | None,
        typer.Option(
            help="solve layers that read the same inputs side by side on these: cuda:0,cuda:1, or "
            "cpu,cpu; the first one calibrates",
            metavar="LIST",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make one variant of a base.

    Example: `gteopt quantize nano --recipe gptq-int4 --out artifacts/nano-int4`
    """
    from gteopt.build import quantize as build
    from gteopt.machine import parse_devices

    wanted = _wanted(recipe, effort, embed_int8=embed_int8, layout=layout)
    with _progress() as progress:
        manifest = build(
            base,
            wanted,
            out,
            hub_dir=hub_dir,
            revision=revision,
            family=family,
            dtype=dtype,
            activation_bytes=int(activation_gb * 2**30),
            device=device,
            devices=parse_devices(devices) if devices is not None else (),
            progress=progress,
        )
    _show_manifest(manifest, out, as_json=as_json)


def _wanted(
    recipe: str, effort: Effort | None, *, embed_int8: bool, layout: LayoutChoice | None
) -> Recipe:
    """The recipe with what other options change in it."""
    from gteopt.recipe import load_recipe

    wanted = load_recipe(recipe)
    if effort is not None:
        wanted = wanted.with_effort(effort)
    if embed_int8:
        wanted = wanted.with_int8_embedding()
    return wanted if layout is None else wanted.with_layout(layout)


@app.command()
def truncate(
    artifact: Annotated[Path, typer.Argument(help="artifact folder")],
    out: Out,
    dims: Annotated[
        int | None, typer.Option(min=1, help="dimensions to keep; all when left out")
    ] = None,
    method: Annotated[
        Literal["slice", "pca", "auto"], typer.Option(help="first, principal, or what keeps more")
    ] = "slice",
    vectors: Annotated[
        Literal["float32", "int8", "binary"], typer.Option(help="how a vector is stored")
    ] = "float32",
    rescore: Annotated[int, typer.Option(min=1, help="candidates per result on codes")] = 4,
    hub_dir: HubDir = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Make an artifact with the same weights and shorter or smaller vectors.

    Example: `gteopt truncate artifacts/nano-int4 --dims 64 --vectors int8 --out artifacts/nano-64`
    """
    from gteopt.build import truncate as shorten

    with _progress() as progress:
        manifest = shorten(
            artifact,
            out,
            dims=dims,
            method=method,
            vectors=vectors,
            rescore=rescore,
            hub_dir=hub_dir,
            device=device,
            progress=progress,
        )
    _show_manifest(manifest, out, as_json=as_json)


@app.command()
def bench(
    artifacts: Artifacts,
    baseline: Annotated[
        str | None, typer.Option(help="what ratios refer to; the first artifact when left out")
    ] = None,
    dummy_weights: Annotated[
        bool,
        typer.Option(
            "--dummy-weights",
            help="build the one model named, of a published shape, with random weights, and the "
            "recipes of it",
        ),
    ] = False,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="with --dummy-weights: rtn-int8, rtn-int4 and nf4 when left out"),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="with --dummy-weights: build only so many blocks")
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="TEXTSxTOKENS, or TEXTSx~TOKENS for log-normal lengths of that median; or a set, "
            "without the lengths that the model does not take: short (32x32, 32x128, 8x512; the "
            "default on a CPU), long (128x128, 32x512, 8x2048, 2x8192, 1x32768, 128x~128; the "
            "default on a GPU)"
        ),
    ] = None,
    query_tokens: Annotated[int, typer.Option(min=1, help="of the single query")] = 16,
    queries: Annotated[int, typer.Option(min=10, help="single queries that are timed")] = 50,
    repeats: Annotated[int, typer.Option(min=1, help="counted runs of each workload")] = 5,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            min=0, callback=_finite, help="of this machine in dollars: gives cost per tokens"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="results folder: adds to its bench.json")] = None,
    hub_dir: HubDir = None,
    device: Device = "auto",
    backend: BackendOption = "torch",
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory, each artifact interleaved with the baseline.

    Example: `gteopt bench artifacts/nano-int4 --baseline nano --out artifacts/results`
    """
    from gteopt.bench import default_workloads
    from gteopt.plan import measure, measure_dummy
    from gteopt.recipe import WORKLOADS
    from gteopt.tables import bench_table, limits_table

    names = workload or [default_workloads(device)]
    spec = _bench_spec(names, query_tokens, queries, repeats)
    sources = _named([*([baseline] if baseline else []), *artifacts])
    if not dummy_weights and (recipe or layers is not None):
        raise InputError("--recipe and --layers belong to --dummy-weights")
    if out is not None and out.is_file():
        raise InputError(f"--out {out} is a file; results need a folder")
    if dummy_weights and len(sources) != 1:
        raise InputError("--dummy-weights takes one model and no --baseline")
    skip = any(name in WORKLOADS for name in names)
    with _progress() as progress:
        if dummy_weights:
            report = measure_dummy(
                artifacts[0],
                recipe or ["rtn-int8", "rtn-int4", "nf4"],
                spec,
                out,
                skip_too_long=skip,
                n_layers=layers,
                device=device,
                backend=backend,
                price_per_hour=price_per_hour,
                progress=progress,
            )
        else:
            report = measure(
                sources,
                spec,
                out,
                baseline=next(iter(sources)),
                hub_dir=hub_dir,
                skip_too_long=skip,
                device=device,
                backend=backend,
                price_per_hour=price_per_hour,
                progress=progress,
            )
    _show(report, bench_table(report), as_json=as_json)
    if not as_json:
        _out.print(limits_table(report))


_WHERE = frozenset({"hub_dir", "device", "devices", "ray", "out", "cache_gb", "as_json"})
"""Options that decide where an evaluation runs and what it keeps, not what it finds."""


def _asked(context: typer.Context) -> tuple[str, ...]:
    """The options that were typed and decide what is found, as `EvalReport.asked` has them."""
    words: list[str] = []
    for option in context.command.params:
        name, value = str(option.name), context.params.get(str(option.name))
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name in {"artifacts", *_WHERE}:
            continue
        # Where a file lies is nobody else's business; what it is called is.
        if isinstance(value, Path) or (name in ("suite", "baseline") and Path(str(value)).exists()):
            value = Path(str(value)).resolve().name
        words += [option.opts[0], str(value)]
    return tuple(words)


def _bench_spec(names: Sequence[str], query_tokens: int, n_queries: int, repeats: int) -> BenchSpec:
    from gteopt.recipe import WORKLOADS, BenchSpec, Workload

    found: list[Workload] = []
    wrong = []
    for name in names:
        match = re.fullmatch(r"([1-9]\d*)x(~?)([1-9]\d*)", name, re.ASCII)
        if name in WORKLOADS:
            found += WORKLOADS[name]
        elif match is None:
            wrong.append(name)
        else:
            lengths: Literal["equal", "lognormal"] = "lognormal" if match[2] else "equal"
            found.append(Workload(batch_size=int(match[1]), tokens=int(match[3]), lengths=lengths))
    if wrong:
        raise InputError(
            f"--workload {', '.join(wrong)}: write TEXTSxTOKENS (8x128), TEXTSx~TOKENS for lengths "
            f"around a median (64x~128), or a set: {', '.join(WORKLOADS)}"
        )
    return BenchSpec(
        query_tokens=query_tokens,
        n_queries=n_queries,
        repeats=repeats,
        workloads=tuple(dict.fromkeys(found)),
    )


@app.command()
def evaluate(
    context: typer.Context,
    artifacts: Artifacts,
    suite: Annotated[
        str | None, typer.Option(help="a shipped suite (`gteopt suites`), or a file")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="own data as one more task: a BEIR folder, or a .csv or .jsonl of labelled pairs"
        ),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="own texts without labels, one a line: fidelity alone")
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="what the queries of --data are for")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="the base to judge against; the artifacts' own when left out"),
    ] = None,
    dims: Annotated[
        str | None,
        typer.Option(help="lengths to score each in, from the same encodings: 256,128,64"),
    ] = None,
    vectors: Annotated[
        str | None, typer.Option(help="codes to score each length in: float32,int8,binary")
    ] = None,
    margin: Annotated[
        float,
        typer.Option(help="a difference of scores, 0 to 1, that does not matter; see policies"),
    ] = 0.01,
    out: Annotated[Path | None, typer.Option(help="results folder; makes runs resumable")] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="that models compute in: bfloat16 or float32; auto is bfloat16 for a base, for an "
            "artifact what it was built in"
        ),
    ] = "auto",
    cache_gb: Annotated[
        float,
        typer.Option(
            min=0,
            callback=_finite,
            help="most that cached vectors take; those of earlier tasks make room first",
        ),
    ] = 20,
    cache_dtype: Annotated[
        Literal["float16", "float32"],
        typer.Option(help="of cached vectors; float32 for scores to the sixth digit"),
    ] = "float16",
    hub_dir: HubDir = None,
    device: Device = "auto",
    backend: BackendOption = "torch",
    devices: Devices = None,
    ray: Ray = None,
    as_json: AsJson = False,
) -> None:
    """Score artifacts on a suite and measure their fidelity to the baseline.

    Example: `gteopt evaluate artifacts/nano-int4 --suite mini --out artifacts/results`
    """
    from gteopt.evaluation import EncodeOptions, load_suite, with_data
    from gteopt.plan import Setup, base_of, compare_texts, parse_grid, score
    from gteopt.tables import eval_table, fidelity_table, grid_table

    sources = _named([baseline or base_of(artifacts), *artifacts])
    if texts is not None and (suite or data):
        raise InputError("--texts has no labels to score; give it without --suite and --data")
    if instruction is not None and data is None:
        raise InputError("--instruction goes with --data; a suite's file names those of its tasks")
    loaded = load_suite(suite) if suite else None
    if data is not None:
        loaded = with_data(loaded, data, instruction=instruction)
    if loaded is None and texts is None:
        raise InputError("nothing to evaluate on; give --suite, --data or --texts")
    if not 0 < margin < 1:
        raise InputError(f"--margin {margin:g}: give a share of a score, between 0 and 1")
    grid = parse_grid(dims, vectors) if dims or vectors else None
    options = EncodeOptions(cache_bytes=int(cache_gb * 1e9), dtype=cache_dtype)
    with _workers(devices, ray, device) as workers, _progress() as progress:
        how = Setup(
            hub_dir=hub_dir,
            device=device,
            dtype=dtype,
            backend=backend,
            grid=grid,
            workers=workers,
            options=options,
            asked=_asked(context),
        )
        if texts is not None:
            close = compare_texts(sources, texts, out, how=how, progress=progress)
        elif loaded is not None:
            reports = score(sources, loaded, out, how=how, margin=margin, progress=progress)
    if texts is not None:
        _show_all(list(close.values()), fidelity_table(close), as_json=as_json)
        return
    table = eval_table(reports) if grid is None else grid_table(reports)
    _show_all(list(reports.values()), table, as_json=as_json)


@app.command()
def choose(
    results_dir: Annotated[Path, typer.Argument(help="folder with bench.json, eval/ or fidelity/")],
    policy: Annotated[str, typer.Option(help="a shipped policy, or a file")],
    as_json: AsJson = False,
) -> None:
    """Pick the variant that a policy asks for, by its limits and its margin.

    Verdicts in eval/ are settled against that margin, and report.html is written anew.

    Example: `gteopt choose artifacts/demo --policy smallest-index`
    """
    from gteopt.plan import judge
    from gteopt.recipe import load_policy

    results = judge(results_dir, load_policy(policy))
    if as_json:
        assert results.choice is not None
        _print_json(json.loads(results.choice.model_dump_json(by_alias=True)))
    else:
        _show_results(results, as_json=False)


@app.command()
def report(
    results_dir: Annotated[Path, typer.Argument(help="folder with bench.json, eval/ or fidelity/")],
    as_json: AsJson = False,
) -> None:
    """Write report.html from what a results folder holds, and print its table.

    Example: `gteopt report artifacts/demo`
    """
    from gteopt.plan import title_of
    from gteopt.records import read_results
    from gteopt.report import write_report

    results = read_results(results_dir)
    path = write_report(results_dir, results, title=title_of(results_dir))
    _show_results(results, as_json=as_json)
    if not as_json:
        _out.print(f"Report: {path}", soft_wrap=True)


@app.command()
def export(
    artifact: Annotated[str, typer.Argument(help="artifact folder, or ORG/NAME")],
    out: Annotated[Path, typer.Argument(help="folder to make")],
    hub_dir: HubDir = None,
    revision: Annotated[str | None, typer.Option(help="commit or tag on the Hub")] = None,
) -> None:
    """Write an artifact as a folder that Sentence Transformers opens with backend="openvino".

    Example: `gteopt export artifacts/nano-int8 nano-int8-openvino`
    """
    from gteopt.layout import export_openvino

    export_openvino(artifact, out, hub_dir=hub_dir, revision=revision)
    n_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    _out.print(f"{out}: {decimal(n_bytes, precision=2)}", soft_wrap=True)
    _out.print(f'SentenceTransformer("{out}", backend="openvino")', markup=False, soft_wrap=True)


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="artifact folder")], as_json: AsJson = False
) -> None:
    """Check every file of an artifact against its manifest.

    Example: `gteopt verify artifacts/nano-int4`
    """
    from gteopt.artifact import verify as check

    manifest = check(artifact)
    if as_json:
        _print_json({"artifact": str(artifact), "files": len(manifest.files), "whole": True})
    else:
        n_bytes = sum(file.n_bytes for file in manifest.files)
        _out.print(
            f"{artifact}: {len(manifest.files)} files, {decimal(n_bytes, precision=2)}, "
            "all as recorded"
        )


@app.command()
def publish(
    artifact: Annotated[Path, typer.Argument(help="artifact folder")],
    repo: Repo,
    results: Annotated[
        Path | None,
        typer.Option(help="folder with bench.json and eval/ of this artifact, for its card"),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="the base's license, where the base does not say or gteopt asks"),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="make the repository private when it is created")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="write the folder that would be sent; no network")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="of --dry-run: where; ARTIFACT-published when left out"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send an artifact to the model hub, with a card that says what it is and what was measured.

    The access token is what `hf auth login` stored, or `HF_TOKEN`.

    Example: `gteopt publish artifacts/nano-int4 --repo me/nano-int4 --dry-run`
    """
    from gteopt.publish import prepare, write_folder
    from gteopt.publish import publish as send

    if out is not None and not dry_run:
        raise InputError("--out is where --dry-run writes; nothing is written without it")
    datasets = None
    if results is not None:
        from gteopt.evaluation.tasks import hub_datasets

        datasets = hub_datasets()
    folder = prepare(artifact, repo, results=results, license=license, datasets=datasets)
    if folder.terms.binds is not None:
        _err.print(
            f"{repo} will be under {folder.terms.license}: {folder.terms.binds}",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    if dry_run:
        out = out or artifact.with_name(f"{artifact.name}-published")
        done = write_folder(folder, out)
    else:
        done = send(folder, private=private)
    _show_publication(done, out, as_json=as_json)


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(help="ORG/NAME on the model hub")],
    out: Annotated[
        Path | None, typer.Option(help="folder of the artifact; artifacts/NAME when left out")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit")] = None,
    as_json: AsJson = False,
) -> None:
    """Bring a published artifact and check every file against its manifest.

    Example: `gteopt pull me/nano-int4 --out artifacts/nano-int4`
    """
    from gteopt.publish import pull as bring

    out = out or Path("artifacts", Path(repo).name)
    _show_manifest(bring(repo, out, revision=revision), out, as_json=as_json)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="a base or an artifact")],
    recipe: Annotated[
        str | None,
        typer.Option(help="a shipped recipe, or a file; every shipped one when left out"),
    ] = None,
    effort: EffortOption = None,
    embed_int8: EmbedInt8 = False,
    layout: LayoutOption = None,
    hub_dir: HubDir = None,
    revision: Annotated[str | None, typer.Option(help="commit or tag on the Hub")] = None,
    family: Family = None,
    dtype: KeptDtype = "bfloat16",
    activation_gb: ActivationGb = 4,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N; this machine need not have it")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Show what a model is and what every recipe would make of it, before anything is built.

    Of a model on the Hub only what describes it is downloaded, not its weights. Given the options
    of a `gteopt quantize`, it predicts the size, the memory and the disk space of that build.

    Example: `gteopt inspect nano --recipe gptq-int4 --effort best`
    """
    from gteopt.inspect import inspect as look
    from gteopt.tables import estimates_table, facts_table, layers_table

    if recipe is None and (effort or embed_int8 or layout):
        raise InputError("--effort, --embed-int8 and --layout change a recipe; give --recipe")
    wanted = None
    if recipe is not None:
        wanted = _wanted(recipe, effort, embed_int8=embed_int8, layout=layout)
    found = look(
        source,
        hub_dir=hub_dir,
        revision=revision,
        family=family,
        recipe=wanted,
        dtype=dtype,
        device=device,
        activation_bytes=int(activation_gb * 2**30),
    )
    if as_json:
        _print_json(json.loads(found.model_dump_json(by_alias=True)))
        return
    _out.print(facts_table(found))
    if found.manifest is not None:
        _out.print(layers_table(found.manifest))
        if (allocation := found.manifest.allocation) is not None:
            _out.print(
                f"bits chosen by layer: {allocation.bits_per_weight:.3f} bits a weight of "
                f"{allocation.budget:g}, predicted loss {allocation.predicted_loss:.2g} (each "
                f"layer's found by {allocation.found_by})"
            )
        if (tuning := found.manifest.tuning) is not None:
            _out.print(
                f"tuned by {tuning.by} for {tuning.n_steps} steps: error on the calibration texts "
                f"{tuning.error_before:.5f} -> {tuning.error_after:.5f}, "
                f"{tuning.codes_changed:.1%} of the codes changed"
            )
    elif found.estimates:
        _out.print(estimates_table(found))


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that ship with gteopt.

    Example: `gteopt recipes`
    """
    from gteopt.recipe import load_recipe, shipped_names

    found = [load_recipe(name) for name in shipped_names("recipes")]
    rows = [{"name": each.name, "summary": each.summary} for each in found]
    _show_list("recipes", rows, as_json=as_json)


@app.command()
def suites(as_json: AsJson = False) -> None:
    """List the evaluation suites that ship with gteopt.

    Example: `gteopt suites`
    """
    from gteopt.evaluation.suites import Suite
    from gteopt.recipe import find_yaml, read_yaml, shipped_names

    found = [read_yaml(find_yaml("eval/suites", n), Suite) for n in shipped_names("eval/suites")]
    rows = [
        {
            "name": each.name,
            "summary": each.summary,
            "tasks": str(len(each.tasks)),
            "minutes (7B, H200)": f"{each.minutes:g}" if each.minutes else "",
        }
        for each in found
    ]
    _show_list("suites", rows, as_json=as_json)


def main() -> None:
    """The console script: one line and exit code 1 for what the user can mend, 2 for usage.

    130 after Ctrl-C, as shells have it.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports home unless told not to
    warnings.filterwarnings("ignore", module=r"(?!gteopt)")
    warnings.showwarning = _show_warning
    try:
        app()
    except GteoptError as error:
        if "--debug" in sys.argv:
            raise
        _fail(str(error), 130 if isinstance(error, _Interrupted) else 1)
    except ValueError as error:
        from pydantic import ValidationError

        if "--debug" in sys.argv or not isinstance(error, ValidationError):
            raise
        from gteopt.recipe import invalid

        _fail(str(invalid(f"what was asked for ({error.title})", error)))
    except OSError as error:
        if "--debug" in sys.argv:
            raise
        where = f" ({error.filename})" if error.filename else ""
        full = error.errno in _NO_ROOM or error.errno is None  # safetensors' have no number
        kept = _left_behind(_command())
        advice = kept if full else "; give a place that exists and may be written to"
        _fail(f"{error.strerror or error}{where}{advice}")
    except (RuntimeError, MemoryError) as error:
        if "--debug" in sys.argv or not is_out_of_memory(error):
            raise
        said, kept = str(error).partition("\n")[0], _left_behind(_command())
        _fail(f"memory ran out ({said}); ask for less at once, or for another --device{kept}")


def _command() -> str | None:
    return next((each for each in sys.argv[1:] if not each.startswith("-")), None)


def _show_warning(message: Warning | str, *_where: object, **_more: object) -> None:
    """A warning as a sentence; where in the code it came from helps no user."""
    _err.print(f"gteopt: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _fail(message: str, code: int = 1) -> None:
    _err.print(f"gteopt: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


@contextmanager
def _workers(devices: str | None, ray: str | None, device: str) -> Iterator[Workers | None]:
    """Who encodes texts; None is this process."""
    if devices is None and ray is None:
        yield None
        return
    if devices is not None and ray is not None:
        raise InputError("--devices is for this machine, --ray for a cluster; give one of them")
    import torch

    from gteopt.evaluation.workers import local_workers, ray_workers
    from gteopt.machine import parse_devices

    with ExitStack() as stack:
        if devices is not None:
            workers = stack.enter_context(local_workers(parse_devices(devices)))
        else:
            assert ray is not None
            # Where --json writes, Ray tells which of a cluster's processes died.
            stack.enter_context(redirect_stdout(sys.stderr))
            opened = ray_workers(ray, device=device, n_threads=torch.get_num_threads())
            workers = stack.enter_context(opened)
        yield workers


def _progress() -> AbstractContextManager[Steps]:
    return shown(_err)


def _named(sources: list[str]) -> dict[str, str]:
    """Short names for sources: the folder's last part, where that tells them apart."""
    named: dict[str, str] = {}
    for source in sources:
        name = Path(source).name or source
        if name in named and named[name] != source:
            raise InputError(
                f"two artifacts are called {name} ({named[name]}, {source}); rename one folder"
            )
        named[name] = source
    return named


def _print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


def _show(record: Frozen, table: Table, *, as_json: bool) -> None:
    if as_json:
        _print_json(json.loads(record.model_dump_json(by_alias=True)))
    else:
        _out.print(table)


def _show_all(records: Sequence[Frozen], table: Table, *, as_json: bool) -> None:
    if as_json:
        _print_json([json.loads(each.model_dump_json(by_alias=True)) for each in records])
    else:
        _out.print(table)


def _show_results(results: Results, *, as_json: bool) -> None:
    from gteopt.tables import fidelity_table, terminal_table

    if as_json:
        _print_json(json.loads(results.model_dump_json(by_alias=True)))
        return
    if results.benched or results.evals:
        _out.print(terminal_table(results))
    if results.fidelity:
        _out.print(fidelity_table(results.fidelity))
    if results.choice is not None:
        _out.print(results.choice.reason, soft_wrap=True)


def _show_manifest(manifest: Manifest, out: Path, *, as_json: bool) -> None:
    if as_json:
        _print_json(json.loads(manifest.model_dump_json(by_alias=True)))
        return
    ratio = manifest.weight_bytes / manifest.base.weight_bytes
    _out.print(
        f"{out}: {manifest.recipe.name} of {manifest.base.id}, weights "
        f"{decimal(manifest.weight_bytes, precision=2)} ({ratio:.0%} of {manifest.base.dtype}), "
        f"{manifest.vectors.dims} dimensions, {manifest.vectors.bytes_per_vector} bytes a vector",
        soft_wrap=True,
    )
    if (seen := manifest.calibration) is not None and seen.n_cut:
        _out.print(
            f"{seen.n_cut} of {seen.n_texts} calibration texts were longer than {seen.max_tokens} "
            f"tokens and were cut there",
            soft_wrap=True,
        )


def _show_publication(done: Publication, out: Path | None, *, as_json: bool) -> None:
    if as_json:
        _print_json(json.loads(done.model_dump_json(by_alias=True)))
        return
    from gteopt.artifact import is_read

    table = Table(title=f"{out or done.url}", title_justify="left", box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("")
    for each in done.files:
        state = "" if done.commit is None else "sent" if each.sent else "was there"
        table.add_row(each.path, f"{each.n_bytes:,} bytes", state)
    for path in done.deleted:
        table.add_row(path, "", "deleted, of an earlier version")
    for path in done.kept:
        table.add_row(path, "", "kept, not of the artifact")
    _out.print(table)
    n_bytes = sum(each.n_bytes for each in done.files)
    whole = f"{len(done.files)} files, {decimal(n_bytes, precision=2)}"
    if done.commit is None:
        _out.print(
            f"Not sent: {whole} for {done.repo}, written to {out}. The hub was not asked what is "
            f"there: files that only an earlier version had will be deleted, others kept.",
            soft_wrap=True,
        )
        return
    sent = sum(each.n_bytes for each in done.files if each.sent)
    _out.print(
        f"{done.url} holds {whole}, {decimal(sent, precision=2)} of it sent now, "
        f"commit {done.commit[:12]}",
        soft_wrap=True,
    )
    if unknown := [path for path in done.kept if is_read(Path(path))]:
        _err.print(
            f"gteopt.load refuses {done.repo} while it holds {', '.join(unknown)}, which some "
            f"loader might read and no hash covers; `gteopt pull` passes it over",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )


def _show_list(title: str, rows: list[dict[str, str]], *, as_json: bool) -> None:
    if as_json:
        _print_json(rows)
        return
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*row.values())
    _out.print(table)


if __name__ == "__main__":
    main()
