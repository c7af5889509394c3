"""Vectors of texts on disk, so that the same weights never encode a text twice.

Hides: shards, their names and checks, the rounding to 16 bits, what makes room when the cache is
full. Refuses to know: mteb, tasks, how vectors are shortened and coded.

    FOLDER/<weights>/<sha256 of the file>.safetensors    keys [N, 32], vectors [N, full_dims]

`<weights>` stands for everything that a vector depends on besides its text. These are the files
that are loaded, the dtype, the kind of device, which GPU, and how it rounds. Versions of torch, of
transformers and of gteopt's own forward pass are among them. What an artifact does to vectors after
the model is not: artifacts that differ only in dimensions and codes share the cache. A key is the
SHA-256 of prompt and text.

A shard is written beside and renamed, and is named by its content. A killed process leaves whole
shards. Two processes never overwrite each other's, and every read is checked against the name.

What is scored has always passed through the stored form, also when it was encoded a moment ago. A
cold and a warm cache then give the same bits, and baseline and variant are rounded alike. Of the
16-bit floats, float16 has eight times finer steps where the components of unit vectors lie, and
bfloat16's range is of no use there. Measured as the change of Spearman's correlation from float32's
(all-MiniLM-L6-v2 in float32 | gte-nano in bfloat16): STSBenchmark float16 +0.000003 | +0.000003,
bfloat16 -0.000002 | +0.000006; its French translation +0.000022 | -0.000010, -0.000061 | +0.000091.
In 5000 pairs of LCQMC very many tie with all-MiniLM, to which most Chinese characters are one
unknown token. Either form decides ties anew there: +0.000221, -0.000058. float32 is for figures
that are to be reproduced to the sixth digit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from gteopt.corpus.shards import (
    EncodeShards,
    Encodings,
    Floats,
    LocalEncoding,
    _sums_as_published,
    cut,
)
from gteopt.progress import Progress, quiet
from gteopt.records.files import write_atomically

if TYPE_CHECKING:
    from gteopt.encoder.description import Description
    from gteopt.encoder.tokenization import Role

Stored = npt.NDArray[Any]
"""float16 or float32 [N, full_dims], as `CacheDtype` says."""
CacheDtype = Literal["float16", "float32"]

FORWARD_SCHEMA = "1"
"""Of the vectors that gteopt makes of a text. A change of the forward pass (masks, prompts,
pooling, kernels) raises it, so that older vectors are not scored as newer ones. A test compares
vectors with pinned ones, so that it is not forgotten."""
DEFAULT_BYTES = 20_000_000_000

_HELD_BYTES = 1 << 30  # of shards that stay in memory after they were read
_WRITES_PER_LOOK = 64  # other processes write, too: 117 MB each at 3584 dimensions
_STALE_S = 86_400  # a half-written file of this age belongs to a process that was killed


class VectorCache:
    """Full-dimension vectors by (prompt, text), of one encoder.

    Attributes:
        counts: since it was opened, each request's repetitions counted once.
        keeps_lengths: rows are stored as long as the encoder makes them, instead of as unit rows;
            set before anything is read or written, in a folder of its own.
    """

    def __init__(
        self,
        encoder: Description,
        folder: Path,
        *,
        encode: EncodeShards | None = None,
        limit_bytes: int = DEFAULT_BYTES,
        dtype: CacheDtype = "float16",
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Open the cache of `encoder` in `folder`; nothing is read yet.

        Args:
            encoder: names the weights; encodes by itself unless `encode` does.
            folder: of the caches of all encoders; made when the first shard is written.
            encode: how missing texts are encoded; None is here, in batches of 32.
            limit_bytes: of all shards in `folder`; half of the disk's free space, where that is
                less. Which shards make room: see `begin_task`.
            dtype: how vectors are stored.
            say: told of damaged shards.
        """
        self.encoder = encoder
        self.identity = vector_identity(encoder, dtype)
        self.folder = folder / _short_hash(self.identity)
        self.counts = Encodings()
        self.keeps_lengths = False
        self._encode = encode or LocalEncoding(encoder, 32, say)
        self._limit_bytes = limit_bytes
        self._dtype = np.dtype(dtype)
        self._say = say
        self._is_cut: dict[bytes, bool] = {}
        self._seen: set[str] = set()
        self._where: dict[bytes, tuple[str, int]] = {}
        self._gone: set[str] = set()
        self._of_task: dict[str, None] = {}
        self._n_unseen_writes = 0  # since all shards were looked at
        self._n_bytes = 0  # that they took then, and were written since
        self._held: OrderedDict[str, Stored] = OrderedDict()

    def begin_task(self) -> None:
        """What is asked for from now on belongs to another task.

        A task's own shards are the last to make room, and of them the latest first. A corpus that
        is read again, after a stop or for another artifact of the same weights, is read from its
        beginning. The least lately read of an overfull cache would be just what comes next. Of all
        else, the shards that were not read for longest go first.
        """
        self._of_task = {}

    def n_bytes(self, n_texts: int) -> int:
        """What the vectors of so many texts take."""
        return n_texts * self.encoder.full_dims * self._dtype.itemsize

    def room_bytes(self) -> int:
        """Most that the shards of all encoders may take."""
        held = sum(path.stat().st_size for path in self.folder.parent.glob("*/*.safetensors"))
        return self._room_bytes(held)

    def _room_bytes(self, held: int) -> int:
        there = next(each for each in (self.folder, *self.folder.parents) if each.is_dir())
        return min(self._limit_bytes, held + shutil.disk_usage(there).free // 2)

    def embed(
        self,
        texts: Sequence[str],
        role: Role,
        instruction: str | None,
        progress: Progress = quiet,
    ) -> Floats:
        """Vectors [N, full_dims], unit rows rounded as stored; encodes what is not there yet.

        Every shard is on disk before the next one is encoded. Texts are cut into shards by length
        and then by content, so that an interrupted request goes on with the very shards that it
        would have had.

        Raises:
            NumericsError: the model produced NaN or infinity.
            UnsupportedError: one text alone does not fit the memory.
        """
        prompt = self.encoder.tokenization.prompt(role, instruction)
        digests = [_digest(prompt, text) for text in texts]
        wanted = dict(zip(digests, texts, strict=True))
        self._look_for_new_shards()
        found = self._read(wanted)
        missing = [text for digest, text in wanted.items() if digest not in found]
        self.counts += Encodings(len(wanted), len(missing), self._n_cut(wanted, role, instruction))
        n_known = len(texts) - len(missing)

        def count(what: str, done: int, total: int) -> None:
            progress(what, n_known + done, len(texts))

        for shard, vectors in self._encode(cut(missing, role, instruction), count):
            keys = [_digest(prompt, text) for text in shard.texts]
            stored = self._rounded(vectors)
            self._write(keys, stored)
            found.update(zip(keys, stored, strict=True))
        progress(f"encoding with {self.encoder.name}", len(texts), len(texts))
        if not texts:
            return np.empty((0, self.encoder.full_dims), np.float32)
        return np.stack([found[digest] for digest in digests]).astype(np.float32)

    def count_cached(self, asked: Encodings) -> None:
        """Count texts that were asked for and not read again, as what they gave is known."""
        self.counts += Encodings(asked.n_asked, 0, asked.n_cut)

    def _n_cut(self, wanted: Mapping[bytes, str], role: Role, instruction: str | None) -> int:
        """How many of the texts the encoder cuts, whoever encodes them and whenever it was."""
        new = {key: text for key, text in wanted.items() if key not in self._is_cut}
        lengths = self.encoder.tokenization.lengths(
            list(new.values()), role=role, instruction=instruction
        )
        longest = self.encoder.tokenization.max_tokens
        self._is_cut |= {key: n > longest for key, n in zip(new, lengths, strict=True)}
        return sum(self._is_cut[key] for key in wanted)

    def missing(
        self, texts: Sequence[str], role: Role, instruction: str | None
    ) -> dict[bytes, str]:
        """Texts that `embed` would encode, by key; files are not checked."""
        prompt = self.encoder.tokenization.prompt(role, instruction)
        self._look_for_new_shards()
        wanted = {_digest(prompt, text): text for text in texts}
        return {key: text for key, text in wanted.items() if not self._is_there(key)}

    def _rounded(self, vectors: Floats) -> Stored:
        """Unit rows in the stored dtype. Only directions are ever scored, and unit rows are where
        float16 is finest; a zero row stays zero.
        """
        if self.keeps_lengths:
            return vectors.astype(self._dtype)
        norm = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        return (vectors / np.where(norm > 0, norm, 1.0)).astype(self._dtype)

    def _look_for_new_shards(self) -> None:
        """Index what this or another process has written since the last look."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._seen:
                self._index(path.name, self._keys(path))
            self._seen.add(path.name)

    def _index(self, name: str, keys: Iterable[bytes]) -> None:
        self._gone.discard(name)
        for row, key in enumerate(keys):
            if not self._is_there(key):
                self._where[key] = name, row

    def _is_there(self, key: bytes) -> bool:
        return key in self._where and self._where[key][0] not in self._gone

    def _read(self, wanted: Mapping[bytes, str]) -> dict[bytes, Stored]:
        """Stored rows by key, of those that are there and undamaged."""
        by_shard: dict[str, list[tuple[bytes, int]]] = {}
        for key in wanted:
            if self._is_there(key):
                name, row = self._where[key]
                by_shard.setdefault(name, []).append((key, row))
        found: dict[bytes, Stored] = {}
        for name, places in by_shard.items():
            vectors = self._vectors(name)
            if vectors is None:
                # Their keys stay: a corpus has millions, and thousands of its shards may go.
                self._gone.add(name)
                self._seen.discard(name)
                continue
            for key, row in places:
                found[key] = vectors[row]
        return found

    def _keys(self, path: Path) -> list[bytes]:
        """Keys of a shard, a small part of it; what they lead to is checked when it is read."""
        try:
            with safe_open(path, framework="numpy") as handle:
                return [row.tobytes() for row in handle.get_tensor("keys")]
        except FileNotFoundError:  # another process made room
            return []
        except SafetensorError:
            self._discard(path)
            return []

    def _vectors(self, name: str) -> Stored | None:
        """Vectors of a shard; None where another process made room, or it is damaged."""
        self._of_task.setdefault(name)
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        path = self.folder / name
        try:
            content = path.read_bytes()
            os.utime(path)  # read just now: the last to make room
        except FileNotFoundError:
            return None
        if hashlib.sha256(content).hexdigest() != path.stem:
            self._discard(path)
            return None
        vectors: Stored = load(content)["vectors"]
        self._hold(name, vectors)
        return vectors

    def _discard(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._say(
            f"{self.encoder.name}: the cached vectors in {path} were damaged (their SHA-256 "
            f"differs from the file's name); the file was removed and its texts are encoded again"
        )

    def _hold(self, name: str, vectors: Stored) -> None:
        self._held[name] = vectors
        while (
            sum(each.nbytes for each in self._held.values()) > _HELD_BYTES and len(self._held) > 1
        ):
            self._held.popitem(last=False)

    def _write(self, keys: Sequence[bytes], vectors: Stored) -> None:
        table = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
        # One entry: safetensors writes several in an order of chance, and the name would change.
        about = json.dumps({"schema": "gteopt.vectors/1", **self.identity}, sort_keys=True)
        content = save({"keys": table, "vectors": vectors}, {"gteopt": about})
        name = f"{hashlib.sha256(content).hexdigest()}.safetensors"
        write_atomically(self.folder / name, content)
        self._seen.add(name)
        self._of_task.setdefault(name)
        self._hold(name, vectors)
        self._index(name, keys)
        self._n_bytes += len(content)
        # A corpus has tens of thousands of shards, all of which are looked at to make room.
        if self._n_unseen_writes % _WRITES_PER_LOOK == 0 or self._n_bytes > self._limit_bytes:
            self._n_bytes, self._n_unseen_writes = self._make_room(name), 0
        self._n_unseen_writes += 1

    def _make_room(self, newest: str) -> int:
        """Remove shards of all encoders down to the limit: see `begin_task` for the order. Returns
        the bytes that are left.
        """
        files: list[tuple[float, int, Path]] = []
        for path in self.folder.parent.glob("*/*"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            if path.suffix == ".safetensors":
                files.append((stat.st_mtime, stat.st_size, path))
            elif time.time() - stat.st_mtime > _STALE_S:
                path.unlink(missing_ok=True)
        total = sum(size for _, size, _ in files)
        limit = self._room_bytes(total)
        if total <= limit:
            return total
        places = {name: place for place, name in enumerate(self._of_task)}

        def first_to_go(file: tuple[float, int, Path]) -> tuple[bool, float]:
            mtime, _, path = file
            of_task = path.parent == self.folder and path.name in places
            return of_task, -places[path.name] if of_task else mtime

        for _, size, path in sorted(files, key=first_to_go):
            if total <= limit:
                break
            if path.name != newest:
                path.unlink(missing_ok=True)
                total -= size
        return total


def vector_identity(encoder: Description, dtype: CacheDtype = "float16") -> dict[str, str]:
    """What full-dimension vectors depend on besides their text."""
    return {
        "weights": encoder.checkpoint.weights_sha256,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "device": encoder.device.type,
        "arithmetic": encoder.arithmetic,
        "gpu": encoder.gpu or "",
        "forward": FORWARD_SCHEMA,
        "padded": str(_sums_as_published(encoder)),
        "stored": dtype,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def _short_hash(content: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _digest(prompt: str, text: str) -> bytes:
    return hashlib.sha256(f"{prompt}\0{text}".encode()).digest()
