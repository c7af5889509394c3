"""A published artifact comes back whole over real HTTP, and no file holds the token."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml
from filelock import FileLock
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import (
    eval_results_to_model_index,
    model_index_to_eval_results,
)

import gteopt
from gteopt.config.plan import BenchSpec
from gteopt.config.policy import DEFAULT_MARGIN
from gteopt.config.recipe import load_recipe
from gteopt.errors import GteoptError, InputError, UnsupportedError
from gteopt.model.artifact import artifact_sha256, read_manifest, verify
from gteopt.model.checkpoint import open_checkpoint
from gteopt.publishing.licenses import read_license_terms
from gteopt.publishing.publish import prepare_publication
from gteopt.records.bench import BenchReport, LatencyRecord, ThroughputRecord, VariantBench
from gteopt.records.environment import MachineRecord
from gteopt.records.evaluation import EvalReport, FailedTask, Fidelity, ScoreDifference, TaskScore
from gteopt.records.files import read_record, write_record
from tests.support.hub_server import Hub, running
from tests.support.hub_user import REPO, TOKEN, User, contents

TEXTS = ["Bridges carry loads to the ground.", "一座桥", "Pont"]
MACHINE = MachineRecord(
    cpu="a CPU", n_cores=2, memory_bytes=8 * 10**9, gpu=None, os="o", python="3"
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that only gteopt opens: its weights lie in several files of a folder."""
    out = tmp_path_factory.mktemp("publish") / "small"
    gteopt.quantize("nano", load_recipe("rtn-int4").model_copy(update={"format": "gteopt"}), out)
    return out


@pytest.fixture
def hub() -> Iterator[Hub]:
    yield from running(TOKEN, owner="me")


@pytest.fixture
def user(hub: Hub, tmp_path: Path) -> User:
    return User(hub, tmp_path / "home")


def on_hub(hub: Hub) -> dict[str, bytes]:
    return {path: data for path, data in hub.repos[REPO].files.items() if path != ".gitattributes"}


def large_files(artifact: Path) -> dict[str, str]:
    """SHA-256, by path, of the files that are sent as large files."""
    files = read_manifest(artifact).files
    return {f.path: f.sha256 for f in files if f.path.endswith(("safetensors", "tokenizer.json"))}


def test_a_published_artifact_comes_back_the_same_and_the_token_is_kept_nowhere(
    user: User, artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "back"
    published = user.publish(artifact, "--private")
    assert user.hub.repos[REPO].private
    assert published["commit"] == user.hub.repos[REPO].commits[-1][0]
    assert all(file["sent"] for file in published["files"])
    assert user.run("pull", REPO, "--out", out).returncode == 0
    assert contents(out) == on_hub(user.hub)
    assert artifact_sha256(out) == published["artifact_sha256"]
    assert verify(out).published_from == artifact_sha256(artifact)
    local, pulled = contents(artifact), contents(out)
    assert {path for path in local if local[path] != pulled[path]} == {"README.md", "gteopt.json"}
    np.testing.assert_array_equal(
        gteopt.load(out).encode(TEXTS), gteopt.load(artifact).encode(TEXTS)
    )
    again = user.run("pull", REPO, "--out", out)
    assert (again.returncode, contents(out) == pulled) == (0, True)
    all_files = [contents(tmp_path), contents(artifact.parent), on_hub(user.hub)]
    assert [
        path for files in all_files for path, data in files.items() if TOKEN.encode() in data
    ] == []


def test_what_the_card_says_of_loading_is_true(user: User, tmp_path: Path) -> None:
    """An unquantized artifact, which needs no other library, loads from the Hub and when pulled.

    Tokenizers of chat models write a template that is no JSON.
    """
    plain, out = tmp_path / "plain", tmp_path / "pulled"
    base = tmp_path / "base"
    shutil.copytree(open_checkpoint("nano").folder, base)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    gteopt.quantize(base, "bf16", plain, dtype="float32")
    assert "chat_template.jinja" in {file.path for file in read_manifest(plain).files}
    user.publish(plain, "--license", "cc-by-nc-sa-4.0")
    card = on_hub(user.hub)["README.md"].decode()
    for line in (f'gteopt.load("{REPO}")', f'SentenceTransformer("{REPO}")'):
        assert line in card
    assert user.run("pull", REPO, "--out", out).returncode == 0
    script = (
        "import numpy as np, gteopt\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"texts = {TEXTS!r}\n"
        f'vectors = [gteopt.load("{REPO}", dtype="float32").encode(texts)]\n'
        f'vectors += [SentenceTransformer(p).encode(texts) for p in ("{REPO}", {str(out)!r})]\n'
        f"np.save({str(tmp_path / 'vectors.npy')!r}, np.stack(vectors))\n"
    )
    env = os.environ | {
        "HF_ENDPOINT": user.hub.endpoint,
        "HF_HOME": str(user.home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    subprocess.run([sys.executable, "-c", script], env=env, check=True, capture_output=True)
    wanted = gteopt.load(plain, dtype="float32").encode(TEXTS)
    for vectors in np.load(tmp_path / "vectors.npy"):
        np.testing.assert_allclose(vectors, wanted, atol=2e-6)


def test_a_second_publication_sends_nothing_and_a_new_card_only_itself(
    user: User, artifact: Path, tmp_path: Path
) -> None:
    user.publish(artifact)
    n_commits = len(user.hub.repos[REPO].commits)
    user.hub.forget_traffic()
    again = user.publish(artifact)
    assert not any(file["sent"] for file in again["files"])
    assert {line.split()[0] for line in user.hub.requests} == {"GET", "HEAD"}
    assert len(user.hub.repos[REPO].commits) == n_commits
    write_results(tmp_path / "results", artifact_sha256(artifact))
    user.hub.forget_traffic()
    third = user.publish(artifact, "--results", tmp_path / "results")
    assert [f["path"] for f in third["files"] if f["sent"]] == ["README.md", "gteopt.json"]
    assert user.hub.received == {}
    user.run("pull", REPO, "--out", tmp_path / "back")
    # What was pulled may be published again, with results of the artifact that was measured.
    datasets = {"STSBenchmark": "mteb/stsbenchmark-sts"}
    prepared = prepare_publication(
        tmp_path / "back", REPO, results=tmp_path / "results", datasets=datasets
    )
    assert prepared.files["gteopt.json"].sha256 == third["artifact_sha256"]


def test_a_connection_cut_in_a_file_costs_that_file_only(user: User, artifact: Path) -> None:
    large = large_files(artifact)
    cut = large["weights/rest.safetensors"]
    user.hub.cut_upload[cut] = 1_000_000
    user.publish(artifact)
    sizes = {file.sha256: file.n_bytes for file in read_manifest(artifact).files}
    for sha256 in large.values():
        extra = 1_000_000 if sha256 == cut else 0
        assert user.hub.received[sha256] == pytest.approx(sizes[sha256] + extra, abs=1 << 16)
    assert set(on_hub(user.hub)) == set(contents(artifact))


def test_two_publications_to_one_repository_never_run_at_once(user: User, artifact: Path) -> None:
    locks = user.home / "hf" / "gteopt"
    locks.mkdir(parents=True)
    with FileLock(locks / f"{REPO.replace('/', '--')}.lock"):
        ran = user.run("publish", artifact, "--repo", REPO)
    assert ran.returncode == 1
    assert "another process is publishing" in " ".join(ran.stderr.split())
    assert REPO not in user.hub.repos
    user.publish(artifact)
    assert set(on_hub(user.hub)) == set(contents(artifact))


def test_a_killed_publication_goes_on_and_is_never_half_seen(user: User, artifact: Path) -> None:
    large = large_files(artifact)
    held = large["tokenizer.json"]
    user.hub.hold_upload.add(held)
    child = user.start("publish", artifact, "--repo", REPO)
    assert user.hub.held.wait(120)
    while set(user.hub.storage) != set(large.values()) - {held}:
        assert child.poll() is None
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert on_hub(user.hub) == {}
    user.hub.hold_upload.clear()
    user.hub.release.set()
    user.hub.forget_traffic()
    user.publish(artifact)
    assert set(user.hub.received) == {held}
    assert set(on_hub(user.hub)) == set(contents(artifact))


def test_a_killed_xet_upload_goes_on_too(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    """The client uses huggingface_hub's preferred protocol and is killed after the largest file."""
    user = User(hub, tmp_path / "home", xet=True)
    hub.n_shards = 1
    child = user.start("publish", artifact, "--repo", REPO)
    assert hub.held.wait(120)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    large = {path: hub.storage.get(sha256) for path, sha256 in large_files(artifact).items()}
    assert [path for path, data in large.items() if data] == ["weights/rest.safetensors"]
    assert on_hub(hub) == {}
    hub.release.set()
    hub.n_shards = 1 << 30
    hub.forget_traffic()
    user.publish(artifact)
    # Chunks that arrived but were not settled may be sent again. That depends on the order in which
    # the client packs them. Settled chunks are never sent again.
    assert hub.xet_bytes < sum(len(on_hub(hub)[path]) for path in large if not large[path])
    assert hub.received == {}
    assert set(on_hub(hub)) == set(contents(artifact))
    for path, sha256 in large_files(artifact).items():
        assert hashlib.sha256(on_hub(hub)[path]).hexdigest() == sha256
    hub.forget_traffic()
    user.publish(artifact)
    assert hub.xet_bytes == 0


def test_a_killed_pull_goes_on_and_leaves_nothing_that_looks_whole(
    user: User, artifact: Path, tmp_path: Path
) -> None:
    user.publish(artifact)
    path, out, partial = (
        "weights/rest.safetensors",
        tmp_path / "back",
        tmp_path / ".back.pull.partial",
    )
    size = len(user.hub.repos[REPO].files[path])
    # All but the last 100 bytes: the client writes to disk in pieces of 10 MB.
    user.hub.hold_download[path] = size - 100
    child = user.start("pull", REPO, "--out", out)
    assert user.hub.held.wait(120)

    def noted(name: str) -> bool:
        """Whether the client has a file's commit, hash and time, so that it keeps the file."""
        notes = partial / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        return notes.is_file() and len(notes.read_text().splitlines()) == 3

    while {p for p in on_hub(user.hub) if not noted(p)} != {path}:
        assert child.poll() is None
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert not out.exists()
    user.hub.release.set()
    user.hub.forget_traffic()
    user.hub.cut_download[path] = size - 100
    assert user.run("pull", REPO, "--out", out).returncode == 0
    # A killed client fetches the current file again. After a cut connection it goes on.
    assert set(user.hub.served) - {"gteopt.json"} == {path}
    assert size <= user.hub.served[path] < size + 1000
    assert contents(out) == on_hub(user.hub)
    assert not partial.exists()


def test_a_repository_that_was_tampered_with_is_refused_and_named(
    user: User, artifact: Path, tmp_path: Path
) -> None:
    user.publish(artifact)
    files = user.hub.repos[REPO].files
    path, out = "weights/block-001.safetensors", tmp_path / "back"
    intact = files[path]
    files[path] = intact[:-1] + bytes([intact[-1] ^ 1])
    ran = user.run("pull", REPO, "--out", out)
    assert ran.returncode == 1
    assert f"{path} has changed" in ran.stderr
    assert "config.json" not in ran.stderr
    assert not out.exists()
    files[path] = intact
    user.hub.forget_traffic()
    assert user.run("pull", REPO, "--out", out).returncode == 0
    assert [p for p in user.hub.served if p.endswith("safetensors")] == [path]


def test_a_dry_run_writes_what_is_then_sent_and_needs_no_network(
    user: User, artifact: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    for _ in range(2):  # the second replaces the first
        ran = user.run(
            "publish", artifact, "--repo", REPO, "--dry-run", token=None, endpoint=nowhere
        )
        assert ran.returncode == 0, ran.stderr
    assert "non-commercial use only" in ran.stderr
    out = artifact.with_name(f"{artifact.name}-published")
    verify(out)
    for path, data in contents(out).items():
        assert f"{path} " in ran.stdout
        assert f" {len(data):,} bytes" in ran.stdout
    user.publish(artifact)
    assert contents(out) == on_hub(user.hub)
    # The published folder is an artifact itself: it may be published, but not written over itself.
    ran = user.run("publish", out, "--repo", REPO, "--dry-run", "--out", out)
    assert "holds another artifact" in ran.stderr
    assert contents(out) == on_hub(user.hub)


def test_what_the_owner_put_beside_an_artifact_stays_and_does_not_spoil_it(
    user: User, artifact: Path, tmp_path: Path
) -> None:
    """A new version replaces the files of the old one, even if its weights are laid out anew."""
    user.publish(artifact)
    owner_files = {"LICENSE": b"mine", "img/curve.png": b"\x89PNG", "try it.ipynb": b"{}"}
    user.hub.repos[REPO].files.update(owner_files)
    newer = tmp_path / "newer"
    gteopt.quantize("nano", "rtn-int4", newer)
    ran = user.run("publish", newer, "--repo", REPO)
    assert ran.returncode == 0, ran.stderr
    for path in owner_files:
        assert re.search(rf"^{path} +kept, not part of the artifact *$", ran.stdout, re.MULTILINE)
    assert on_hub(user.hub) == owner_files | {
        path: data for path, data in on_hub(user.hub).items() if path in contents(newer)
    }
    assert set(on_hub(user.hub)) == {*owner_files, *contents(newer)}
    assert "weights/rest.safetensors" in contents(artifact)
    again = user.publish(newer)
    assert (again["deleted"], again["kept"]) == ([], sorted(owner_files))
    # Sentence Transformers downloads every file into the folder that gteopt opens too.
    folder = tmp_path / "all"
    for path, data in on_hub(user.hub).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    np.testing.assert_array_equal(
        gteopt.load(folder).encode(TEXTS), gteopt.load(newer).encode(TEXTS)
    )
    user.hub.repos[REPO].files["requirements.txt"] = b"x"
    ran = user.run("publish", newer, "--repo", REPO)
    assert f"gteopt.load refuses {REPO} because it holds requirements.txt" in ran.stderr
    assert user.run("pull", REPO, "--out", tmp_path / "back").returncode == 0


WRONG = TOKEN.replace("0001", "0002")


@pytest.mark.parametrize(
    ("options", "repo", "token", "message"),
    [
        ([], REPO, None, "no access token for the hub; run `hf auth login`"),
        ([], REPO, WRONG, "the hub does not accept the access token"),
        ([], "them/nano", TOKEN, "the access token may not write to them/nano"),
        (["--debug"], "them/nano", TOKEN, "the access token may not write to them/nano"),
    ],
)
def test_who_may_not_write_is_told_so_without_the_token(
    user: User, artifact: Path, options: list[str], repo: str, token: str | None, message: str
) -> None:
    user.hub.echo_token = True
    ran = user.run(*options, "publish", artifact, "--repo", repo, token=token)
    assert ran.returncode == 1
    assert message in ran.stderr
    assert "hf_secret" not in ran.stdout + ran.stderr
    assert ("Traceback" in ran.stderr) == bool(options)
    assert user.hub.repos == {}


def test_other_peoples_content_is_never_replaced(
    user: User, artifact: Path, tmp_path: Path
) -> None:
    bf16 = tmp_path / "other"
    gteopt.quantize("nano", "bf16", bf16)
    user.publish(bf16)
    before = on_hub(user.hub)
    ran = user.run("publish", artifact, "--repo", REPO)
    assert "holds another artifact, bf16 of nano; this is rtn-int4 of nano" in ran.stderr
    ran = user.run("publish", bf16, "--repo", REPO, "--private")
    assert f"{REPO} exists and is public" in ran.stderr
    assert on_hub(user.hub) == before
    del user.hub.repos[REPO].files["gteopt.json"]
    ran = user.run("publish", bf16, "--repo", REPO)
    assert f"{REPO} holds other files and no artifact (1_Pooling/config.json" in ran.stderr
    ran = user.run("pull", REPO, "--out", tmp_path / "back")
    assert f"{REPO} is not an artifact: it has no gteopt.json" in ran.stderr


def test_a_bad_name_and_a_dead_network_are_named(
    user: User, artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "back"
    ran = user.run("pull", "me/nothing", "--out", out)
    assert "there is no repository me/nothing that you may see" in ran.stderr
    ran = user.run("publish", artifact, "--repo", REPO, endpoint="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in ran.stderr
    assert "Traceback" not in ran.stderr
    user.publish(artifact)
    ran = user.run("pull", REPO, "--revision", "v2", "--out", out)
    assert f"{REPO} has no such revision" in ran.stderr
    user.hub.forget_traffic()
    out.write_text("mine")  # a file cannot become the artifact's folder
    ran = user.run("pull", REPO, "--out", out)
    assert (ran.returncode, user.hub.requests) == (1, [])
    assert f"--out {out} is a file; give a folder that does not exist yet" in ran.stderr
    for name in ("nano", "me/nano/4", "me/na no", "me/nano--4"):
        with pytest.raises(InputError, match=r"ORG/NAME|cannot be a repository's name"):
            prepare_publication(artifact, name)


# The card ---------------------------------------------------------------------------------------


def write_results(
    folder: Path,
    sha256: str,
    baseline: str = "b" * 64,
    lengths: Literal["equal", "lognormal"] = "equal",
) -> None:
    """Write records as `bench` and `evaluate` do, for an artifact and a baseline by hash."""
    shared: Any = {"task_type": "STS", "split": "test", "metric": "cosine_spearman", "n_samples": 9}
    tasks = (
        TaskScore(
            task="STSBenchmark",
            subset="default",
            score=0.6612,
            baseline_score=0.6629,
            instruction=None,
            dataset_revision="b0fddb56ed78048fa8b90373c8a3cfc37b684831",
            difference=ScoreDifference(
                value=-0.0017, low=-0.0041, high=0.0008, verdict="equivalent", p=0.2
            ),
            **shared,
        ),
        TaskScore(
            task="own",
            subset="default",
            score=0.5,
            baseline_score=0.5,
            instruction=None,
            dataset_revision="sha256:0",
            no_interval="too few",
            **shared,
        ),
    )
    report = EvalReport(
        variant="small",
        artifact_sha256=sha256,
        baseline="nano",
        baseline_sha256=baseline,
        suite="stsb",
        suite_sha256="c" * 64,
        tasks=tasks,
        failed=(FailedTask(task="Other", reason="no data"),),
        partial=True,
        score=0.5806,
        baseline_score=0.58145,
        retention=0.9985,
        retention_low=0.9951,
        retention_high=1.0012,
        dims=256,
        code="float32",
        bytes_per_vector=1024,
        fidelity=Fidelity(
            n_texts=100,
            mean_cosine=0.98991,
            p1_cosine=0.97,
            neighbour_overlap=0.82,
            spearman=0.99,
            n_queries=50,
            n_documents=50,
            n_all_documents=50,
        ),
        asked=("--suite", "stsb"),
        machine=MACHINE,
        versions={"mteb": "2.26.24"},
    )
    write_record(folder / "eval" / "small.json", report)
    speeds = {}
    for name, digest, ratio in (("nano", baseline, 1.0), ("small", sha256, 0.75)):
        speeds[name] = VariantBench(
            artifact_sha256=digest,
            weight_bytes=10_000_000,
            load_s=0.1,
            imports_process_bytes=100,
            peak_process_bytes=400_000_000,
            peak_device_bytes=None,
            latency=LatencyRecord(tokens=16, n_queries=50, p50_ms=2, p95_ms=4 / ratio, p99_ms=9),
            throughput=(
                ThroughputRecord(
                    batch_size=8,
                    tokens=64,
                    lengths=lengths,
                    texts_per_s=10,
                    tokens_per_s=8000 * ratio,
                    baseline_ratio=ratio,
                ),
            ),
            kernels={"lookup": 28},
            dims=256,
            code="float32",
            bytes_per_vector=1024,
            index_bytes_per_million=1_024_000_000,
        )
    bench = BenchReport(
        spec=BenchSpec(),
        baseline="nano",
        variants=speeds,
        device="cpu",
        n_threads=2,
        machine=MACHINE,
        versions={"torch": "2.13.0"},
    )
    write_record(folder / "bench.json", bench)


def readme(artifact: Path, **options: Any) -> str:
    source = prepare_publication(artifact, REPO, **options).files["README.md"].source
    assert isinstance(source, bytes)
    return source.decode()


def test_results_are_in_the_cards_tables_and_in_the_hubs_metadata(
    artifact: Path, tmp_path: Path
) -> None:
    write_results(tmp_path, artifact_sha256(artifact))
    text = readme(artifact, results=tmp_path, datasets={"STSBenchmark": "mteb/stsbenchmark-sts"})
    for row in (
        "| STSBenchmark | test | default | `cosine_spearman` | 66.12 | 66.29 | "
        "-0.17 (-0.41 to +0.08), equivalent |",
        "| own | test | default | `cosine_spearman` | 50.00 | 50.00 | "
        "+0.00, no interval: too few |",
        "| score kept | 99.9% (99.5% to 100.1%) |",
        "| 8x64 tokens | 6,000 tokens/s | 8,000 tokens/s | 0.75 x |",
        "| one query of 16 tokens, p95 | 5.33 ms | 4.00 ms | 0.75 x |",
        "- Other: no data",
    ):
        assert row in text
    assert "`nano` (`bbbbbbbbbbbbbbbb`), not the original itself, on a CPU, 2 threads, 8 GB" in text
    write_results(tmp_path, artifact_sha256(artifact), read_manifest(artifact).base.sha256)
    assert readme(artifact, results=tmp_path).count("the original, unquantized") == 2
    data: Any = ModelCard(text).data
    entry, base, difference = data.eval_results
    assert data.model_name == "nano-small"
    assert (entry.dataset_type, entry.dataset_name) == (
        "mteb/stsbenchmark-sts",
        "MTEB STSBenchmark",
    )
    assert (entry.metric_type, entry.metric_value) == ("cosine_spearman", 66.12)
    assert entry.dataset_revision == "b0fddb56ed78048fa8b90373c8a3cfc37b684831"
    assert data.license == "cc-by-nc-sa-4.0"
    for extra in (base, difference):
        assert extra.unique_identifier == entry.unique_identifier
    assert (base.metric_type, base.metric_value) == ("cosine_spearman_baseline", 66.29)
    assert base.metric_name == "cosine_spearman of the baseline nano"
    assert (difference.metric_type, difference.metric_value) == (
        "cosine_spearman_difference",
        -0.17,
    )
    assert difference.metric_args == {
        "confidence": 0.95,
        "low": -0.41,
        "high": 0.08,
        "margin": 100 * DEFAULT_MARGIN,
        "verdict": "equivalent",
    }


def test_the_model_index_has_the_hubs_form_and_comes_back_as_it_went(
    artifact: Path, tmp_path: Path
) -> None:
    """Its fields are those of the specification, github.com/huggingface/hub-docs modelcard.md."""
    write_results(tmp_path, artifact_sha256(artifact))
    datasets = {"STSBenchmark": "mteb/stsbenchmark-sts"}
    text = readme(artifact, results=tmp_path, datasets=datasets)
    written = yaml.safe_load(text.split("---")[1])["model-index"]
    name, results = model_index_to_eval_results(written)
    assert eval_results_to_model_index(name, results) == written
    (model,) = written
    (result,) = model["results"]
    assert (set(model), set(result)) == ({"name", "results"}, {"task", "dataset", "metrics"})
    assert set(result["dataset"]) <= {"type", "name", "config", "split", "revision", "args"}
    for metric in result["metrics"]:
        assert {"type", "value"} <= set(metric) <= {"type", "value", "name", "config", "args"}
    # Leaderboards look a score up by its type, so that type must occur once.
    types = [metric["type"] for metric in result["metrics"]]
    assert types.count("cosine_spearman") == 1
    assert len(set(types)) == len(types) == 3


def test_lengths_that_differ_are_published_as_such(artifact: Path, tmp_path: Path) -> None:
    write_results(tmp_path, artifact_sha256(artifact), lengths="lognormal")
    text = readme(artifact, results=tmp_path)
    assert "| 8x~64 tokens | 6,000 tokens/s |" in text
    assert "In TEXTSx~TOKENS, lengths are log-normal and TOKENS is their median" in text


def commands_of(card: str) -> list[list[str]]:
    """Every gteopt command line, in code blocks and in sentences."""
    blocks = re.findall(r"```sh\n(.*?)```", card, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(gteopt [^`]+)`", card)
    return [shlex.split(line) for line in lines if line.startswith("gteopt ")]


@pytest.mark.parametrize("judged_on", ["data", "suite"])
def test_every_command_of_a_published_card_runs_as_it_stands(
    user: User, artifact: Path, tmp_path: Path, judged_on: str
) -> None:
    pytest.importorskip("openvino")
    private = tmp_path / "a private folder"
    private.mkdir()
    rows = [f"A bridge of {n} arches.,{n} arches carry it.,{n % 5}" for n in range(12)]
    (private / "pairs.csv").write_text("\n".join(["sentence1,sentence2,score", *rows]))
    (private / "mine.yaml").write_text(
        "schema: gteopt.suite/1\nname: mine\ntasks:\n- task: MiniSTS\n"
    )
    wanted = {
        "data": ["--data", private / "pairs.csv", "--instruction", "Find what it's like."],
        "suite": ["--suite", private / "mine.yaml", "--baseline", "nano"],
    }[judged_on]
    results = private / "results"
    ran = user.run("evaluate", artifact, *wanted, "--device", "cpu", "--out", results)
    assert ran.returncode == 0, ran.stderr
    user.publish(artifact, "--results", results)
    card = on_hub(user.hub)["README.md"].decode()
    assert "private folder" not in card
    if judged_on == "data":
        (digest,) = {task.dataset_revision for task in read_eval(results / "eval").tasks}
        assert f"`pairs.csv` is the publisher's own data (SHA-256 `{digest[7:23]}`)" in card
    else:
        assert "`mine.yaml` is the file of the suite named above" in card
    commands = commands_of(card)
    assert [words[1] for words in commands] == ["pull", "evaluate", "quantize", "export"]
    for words in commands if judged_on == "data" else commands[:2]:
        if words[1] == "quantize":  # its --out would be the folder that was pulled
            words[-1] = "MADE"
        if words[1] == "evaluate":
            words += ["--out", "again"]
        ran = user.run(*words[1:], cwd=private)
        assert ran.returncode == 0, ran.stderr
    if judged_on == "data":
        assert (private / "NEW" / "openvino" / "openvino_model.xml").is_file()
        assert artifact_sha256(private / "MADE") == artifact_sha256(artifact)
    repeated, original = read_eval(private / "again" / "eval"), read_eval(results / "eval")
    assert (repeated.score, repeated.asked) == (original.score, original.asked)


def read_eval(folder: Path) -> EvalReport:
    (path,) = (file for file in folder.glob("*.json") if file.stem != "nano")
    return read_record(path, EvalReport)


def test_a_card_without_results_says_that_nothing_was_measured(artifact: Path) -> None:
    text = readme(artifact)
    assert "Nothing was measured" in text
    assert "model-index" not in text
    assert "## Quality" not in text


def test_closeness_on_texts_without_labels_is_on_the_card_and_called_what_it_is(
    artifact: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text(
        "\n".join(f"{text} {i}" for text in TEXTS for i in range(9))
    )
    judges = gteopt.Judges(texts=tmp_path / "texts.txt")
    report = gteopt.evaluate(artifact, judges, out=tmp_path / "results")["small"]
    text = readme(artifact, results=tmp_path / "results")
    assert f"| 10 nearest neighbours kept | {report.fidelity.neighbour_overlap:.1%} |" in text
    assert "No labels were used" in text
    assert "Quality was not measured on labels" in text
    assert "--texts texts.txt" in text
    assert "Nothing was measured" not in text
    gteopt.quantize("nano", "rtn-int8", tmp_path / "other")
    with pytest.raises(InputError, match="fidelity/ compares other artifacts"):
        prepare_publication(tmp_path / "other", REPO, results=tmp_path / "results")


@pytest.mark.parametrize("record", ["eval", "bench.json"])
def test_results_of_another_artifact_are_refused_whole_or_in_part(
    artifact: Path, tmp_path: Path, record: str
) -> None:
    write_results(tmp_path, "f" * 64)
    with pytest.raises(InputError, match=r"it holds small \(ffffffffffff\)"):
        prepare_publication(artifact, REPO, results=tmp_path)
    right = tmp_path / "own"
    write_results(right, artifact_sha256(artifact))
    (right / record).rename(tmp_path / "kept")
    (tmp_path / record).rename(right / record)
    with pytest.raises(InputError, match="other artifacts"):
        prepare_publication(artifact, REPO, results=right)


@pytest.mark.parametrize(
    ("stated", "user_license", "outcome"),
    [
        ("apache-2.0", None, None),
        ("MIT", None, None),
        ("cc-by-4.0", None, None),
        ("cc-by-nc-4.0", None, "non-commercial use only"),
        ("cc-by-nc-sa-4.0", None, "non-commercial use only; changed versions only under the same"),
        ("cc-by-sa-3.0", None, "changed versions only under the same license"),
        ("agpl-3.0", None, "with their source"),
        ("gemma", None, "must be passed on"),
        (None, "mit", None),
        ("other", "other", "read them"),
        ("cc-by-nd-4.0", None, UnsupportedError),
        ("cc-by-nc-nd-4.0", "cc-by-nc-nd-4.0", UnsupportedError),
        (None, "cc-by-nd-4.0", UnsupportedError),
        (None, None, InputError),
        ("other", None, InputError),
        ("tongyi-qianwen", None, InputError),
        ("cc-by-nc-4.0", "apache-2.0", InputError),
    ],
)
def test_a_license_is_obeyed(
    stated: str | None, user_license: str | None, outcome: str | type[GteoptError] | None
) -> None:
    if isinstance(outcome, type):
        with pytest.raises(outcome):
            read_license_terms("base", stated, user_license)
        return
    terms = read_license_terms("base", stated, user_license)
    assert terms.license == str(stated or user_license).lower()
    if outcome is None:
        assert terms.binds is None
    else:
        assert outcome in str(terms.binds)


def test_the_license_that_a_user_gives_is_on_the_card_as_the_users_word(
    artifact: Path, tmp_path: Path
) -> None:
    silent = tmp_path / "silent"
    base = tmp_path / "base"
    base.mkdir()
    source = open_checkpoint("nano").folder
    for path, content in contents(source).items():
        if path not in ("README.md", "LICENSE"):
            (base / path).parent.mkdir(exist_ok=True)
            (base / path).write_bytes(content)
    gteopt.quantize(str(base), "rtn-int4", silent)
    with pytest.raises(InputError, match="base states no license"):
        prepare_publication(silent, REPO)
    text = readme(silent, license="apache-2.0")
    data: Any = ModelCard(text).data
    assert data.license == "apache-2.0"
    assert "`apache-2.0`, stated by the publisher, not by the base" in text
    # The Hub accepts names that it knows. Other names need `other` beside them.
    data = ModelCard(readme(silent, license="Their-License 2")).data
    assert (data.license, data.license_name) == ("other", "their-license-2")


def test_a_folder_from_the_hubs_own_client_verifies_but_nothing_else_is_let_in(
    artifact: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    for path, data in contents(artifact).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    (folder / ".gitattributes").write_text("x")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "note").write_text("x")
    verify(folder)
    (folder / ".cache" / "other").write_text("x")
    with pytest.raises(GteoptError, match=r"\.cache/other is not in the manifest"):
        verify(folder)
