"""Cache the vectors of texts on disk, so that the same weights never encode a text twice.

Hides: shards, their names and checks, the rounding to 16 bits, which shards are removed when the
cache is full. Refuses to know: mteb, tasks, how vectors are shortened and coded.

    FOLDER/<weights>/<sha256 of the file>.safetensors    keys [N, 32], vectors [N, full_dims]

`<weights>` is a hash of everything that a vector depends on besides its text. This includes the
loaded files, the dtype, the kind of device, the GPU and how it rounds. It also includes the
versions of torch, transformers and gteopt's forward pass. The steps after the model are not
included: artifacts that differ only in dimensions and codes share the cache. A key is the SHA-256
of prompt and text.

A shard is written to a temporary file and renamed; its name is the hash of its content. So a killed
process leaves only complete shards, two processes never overwrite each other's shards, and every
read is checked against the name.

A vector is rounded to its stored form before it is scored, even if it was just encoded. So a cold
and a warm cache give the same bits, and baseline and variant are rounded alike. The default is
float16: for the components of unit vectors it is eight times finer than bfloat16. The rounding
changes Spearman's correlation from the fifth digit on, more where many pairs tie. float32 is for
scores that must be reproduced to the sixth digit.

A cache without write permission is read as any other. New vectors are then kept only in memory, and
a message says so once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from gteopt.corpus.shards import (
    EncodeShards,
    Floats,
    LocalEncoding,
    ShardEncodings,
    _sums_as_published,
    cut_shards,
)
from gteopt.progress import Progress, ignore_progress
from gteopt.records.files import write_atomically

if TYPE_CHECKING:
    from gteopt.encoder.description import EncoderDescription
    from gteopt.encoder.tokenization import Role

Stored = npt.NDArray[Any]
"""float16 or float32 [N, full_dims], as `CacheDtype` says."""
CacheDtype = Literal["float16", "float32"]

FORWARD_SCHEMA = "1"
"""Version of the vectors that gteopt makes from a text. Raise it with every change of the forward
pass (masks, prompts, pooling, kernels), so that cached vectors of the older pass are not used. A
test with pinned vectors fails if that is forgotten."""
DEFAULT_BYTES = 20_000_000_000

_HELD_BYTES = 1 << 30  # bytes of shards that stay in memory after they were read
_WRITES_PER_LOOK = 64  # own writes between two looks at the size of the whole cache
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
_STALE_S = 86_400  # a half-written file that is older was left by a killed process


class VectorCache:
    """Full-dimension vectors of one encoder by (prompt, text).

    Attributes:
        counts: texts asked for since the cache was opened; a text that repeats within a request
            counts once.
        keeps_lengths: store rows with their length, instead of as unit rows; set it before anything
            is read or written, and use a separate folder.
    """

    def __init__(
        self,
        encoder: EncoderDescription,
        folder: Path,
        *,
        encode: EncodeShards | None = None,
        limit_bytes: int = DEFAULT_BYTES,
        dtype: CacheDtype = "float16",
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Open the cache of `encoder` in `folder`; nothing is read yet.

        Args:
            encoder: names the weights; encodes missing texts if `encode` is None.
            folder: folder for the caches of all encoders; made when the first shard is written.
            encode: encodes missing texts; None means in this process, in batches of 32.
            limit_bytes: the most bytes of all shards in `folder`. The cache grows by at most half
                of the disk's free space. `begin_task` says which shards are removed.
            dtype: dtype of stored vectors.
            say: called with a message about each damaged shard, and if shards cannot be written.
        """
        self.encoder = encoder
        self.identity = vector_identity(encoder, dtype)
        self.folder = folder / _short_hash(self.identity)
        self.counts = ShardEncodings()
        self.keeps_lengths = False
        self._encode = encode or LocalEncoding(encoder, 32, say)
        self._limit_bytes = limit_bytes
        self._dtype = np.dtype(dtype)
        self._say = say
        self._is_cut: dict[bytes, bool] = {}
        self._seen: set[str] = set()
        self._where: dict[bytes, tuple[str, int]] = {}
        self._gone: set[str] = set()
        self._damaged: set[str] = set()  # damaged shards that could not be removed
        self._is_writable = True
        self._of_task: dict[str, None] = {}
        self._n_unseen_writes = 0  # own writes since the last look at all shards
        self._n_bytes = 0  # bytes of all shards at that look, and of own writes since then
        self._held: OrderedDict[str, Stored] = OrderedDict()

    def begin_task(self) -> None:
        """Start a new task: it owns the shards that are read or written from now on.

        A full cache first removes shards of other tasks, the least recently read first. Shards of
        the current task go last, and the most recently used of them first. For a corpus is read
        again from its beginning, so the least recently used shard would be the next one needed.
        """
        self._of_task = {}

    def n_bytes(self, n_texts: int) -> int:
        """Bytes of the vectors of `n_texts` texts."""
        return n_texts * self.encoder.full_dims * self._dtype.itemsize

    def room_bytes(self) -> int:
        """The most bytes that the shards of all encoders may take."""
        files = self._files()
        return self._room_bytes(sum(stat.st_size for path, stat in files if _is_shard(path)))

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Files of all encoders, without those that another process removes meanwhile."""
        for path in self.folder.parent.glob("*/*"):
            with suppress(FileNotFoundError):
                yield path, path.stat()

    def _room_bytes(self, n_bytes: int) -> int:
        existing = next(path for path in (self.folder, *self.folder.parents) if path.is_dir())
        return min(self._limit_bytes, n_bytes + shutil.disk_usage(existing).free // 2)

    def embed(
        self,
        texts: Sequence[str],
        role: Role,
        instruction: str | None,
        progress: Progress = ignore_progress,
    ) -> Floats:
        """Vectors [N, full_dims], unit rows rounded as stored; encodes texts that are missing.

        Every shard is on disk before the next one is encoded. Texts are sorted by length and then
        by content before they are cut into shards. So an interrupted request goes on with the same
        shards.

        Raises:
            NumericsError: the model produced NaN or infinity.
            UnsupportedError: one text alone does not fit the memory.
        """
        prompt = self.encoder.tokenization.prompt(role, instruction)
        digests = [_digest(prompt, text) for text in texts]
        wanted = dict(zip(digests, texts, strict=True))
        self._look_for_new_shards()
        rows = self._read(wanted)
        missing = [text for digest, text in wanted.items() if digest not in rows]
        self.counts += ShardEncodings(
            len(wanted), len(missing), self._n_cut(wanted, role, instruction)
        )
        n_known = len(texts) - len(missing)

        def count(stage: str, done: int, total: int) -> None:
            progress(stage, n_known + done, len(texts))

        for shard, vectors in self._encode(cut_shards(missing, role, instruction), count):
            keys = [_digest(prompt, text) for text in shard.texts]
            stored = self._rounded(vectors)
            self._write(keys, stored)
            rows.update(zip(keys, stored, strict=True))
        progress(f"encoding with {self.encoder.name}", len(texts), len(texts))
        if not texts:
            return np.empty((0, self.encoder.full_dims), np.float32)
        return np.stack([rows[digest] for digest in digests]).astype(np.float32)

    def count_cached(self, asked: ShardEncodings) -> None:
        """Count texts that were asked for, but not read because their scores are known."""
        self.counts += ShardEncodings(asked.n_asked, 0, asked.n_cut)

    def _n_cut(self, wanted: Mapping[bytes, str], role: Role, instruction: str | None) -> int:
        """How many of the texts are longer than the encoder takes, cached or not."""
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
        """Texts that `embed` would encode, by key; the hashes of shards are not checked."""
        prompt = self.encoder.tokenization.prompt(role, instruction)
        self._look_for_new_shards()
        wanted = {_digest(prompt, text): text for text in texts}
        return {key: text for key, text in wanted.items() if not self._is_there(key)}

    def _rounded(self, vectors: Floats) -> Stored:
        """Unit rows in the stored dtype; a zero row stays zero.

        Only directions are scored, and float16 is finest for the components of unit rows.
        """
        if self.keeps_lengths:
            return vectors.astype(self._dtype)
        norm = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        return (vectors / np.where(norm > 0, norm, 1.0)).astype(self._dtype)

    def _look_for_new_shards(self) -> None:
        """Index shards that this or another process has written since the last look."""
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
        """Stored rows by key, for the keys whose shard is present and undamaged."""
        by_shard: dict[str, list[tuple[bytes, int]]] = {}
        for key in wanted:
            if self._is_there(key):
                name, row = self._where[key]
                by_shard.setdefault(name, []).append((key, row))
        rows: dict[bytes, Stored] = {}
        for name, wanted_rows in by_shard.items():
            vectors = self._vectors(name)
            if vectors is None:
                # The keys stay in the index, because removing keys of many shards takes long.
                self._gone.add(name)
                if name not in self._damaged:
                    self._seen.discard(name)
                continue
            for key, row in wanted_rows:
                rows[key] = vectors[row]
        return rows

    def _keys(self, path: Path) -> list[bytes]:
        """Keys of a shard, read without its vectors; `_vectors` checks the shard's hash."""
        try:
            with safe_open(path, framework="numpy") as handle:
                return [row.tobytes() for row in handle.get_tensor("keys")]
        except FileNotFoundError:  # another process removed it to make room
            return []
        except SafetensorError:
            self._discard(path)
            return []

    def _vectors(self, name: str) -> Stored | None:
        """Vectors of a shard; None if another process removed the shard, or it is damaged."""
        self._of_task.setdefault(name)
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        path = self.folder / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        with suppress(OSError):  # needs write permission
            os.utime(path)  # mark as recently read, so that it is removed last
        if hashlib.sha256(content).hexdigest() != path.stem:
            self._discard(path)
            return None
        vectors: Stored = load(content)["vectors"]
        self._hold(name, vectors)
        return vectors

    def _discard(self, path: Path) -> None:
        if path.name in self._damaged:
            return
        if (reason := _remove(path)) is not None:
            self._damaged.add(path.name)
        result = "was removed" if reason is None else f"cannot be removed ({reason})"
        self._say(
            f"{self.encoder.name}: the cached vectors in {path} were damaged (the SHA-256 differs "
            f"from the file's name); the file {result}, and its texts are encoded again"
        )

    def _hold(self, name: str, vectors: Stored) -> None:
        self._held[name] = vectors
        while (
            sum(vectors.nbytes for vectors in self._held.values()) > _HELD_BYTES
            and len(self._held) > 1
        ):
            self._held.popitem(last=False)

    def _write(self, keys: Sequence[bytes], vectors: Stored) -> None:
        table = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
        # One entry, because safetensors writes several in random order and the hash would change.
        about = json.dumps({"schema": "gteopt.vectors/1", **self.identity}, sort_keys=True)
        content = save({"keys": table, "vectors": vectors}, {"gteopt": about})
        name = f"{hashlib.sha256(content).hexdigest()}.safetensors"
        self._store(name, content)
        self._seen.add(name)
        self._of_task.setdefault(name)
        self._hold(name, vectors)
        self._index(name, keys)
        if not self._is_writable:
            return
        self._n_bytes += len(content)
        # Not at every write, because making room looks at all shards: there may be tens of
        # thousands.
        if self._n_unseen_writes % _WRITES_PER_LOOK == 0 or self._n_bytes > self._limit_bytes:
            self._n_bytes, self._n_unseen_writes = self._make_room(name), 0
        self._n_unseen_writes += 1

    def _store(self, name: str, content: bytes) -> None:
        if not self._is_writable:
            return
        try:
            write_atomically(self.folder / name, content)
        except OSError as error:
            if error.errno not in _NO_PERMISSION:
                raise
            self._is_writable = False
            self._say(
                f"{self.encoder.name}: new vectors are not stored, because {self.folder} cannot be "
                f"written ({error.strerror}); a later run encodes these texts again"
            )

    def _make_room(self, newest: str) -> int:
        """Remove shards of all encoders until the limit is met; `begin_task` has the order.

        Returns:
            The bytes of the shards that are left.
        """
        files: list[tuple[float, int, Path]] = []
        for path, stat in self._files():
            if _is_shard(path):
                files.append((stat.st_mtime, stat.st_size, path))
            elif time.time() - stat.st_mtime > _STALE_S:
                _remove(path)
        total = sum(size for _, size, _ in files)
        limit = self._room_bytes(total)
        if total <= limit:
            return total
        order = {name: number for number, name in enumerate(self._of_task)}

        def first_to_go(file: tuple[float, int, Path]) -> tuple[bool, float]:
            mtime, _, path = file
            of_task = path.parent == self.folder and path.name in order
            return of_task, -order[path.name] if of_task else mtime

        for _, size, path in sorted(files, key=first_to_go):
            if total <= limit:
                break
            if path.name != newest and _remove(path) is None:
                total -= size
        return total


def vector_identity(encoder: EncoderDescription, dtype: CacheDtype = "float16") -> dict[str, str]:
    """Everything that full-dimension vectors depend on besides their text."""
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


def _is_shard(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _remove(path: Path) -> str | None:
    """Remove a file; returns the reason if the permission is missing."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in _NO_PERMISSION:
            raise
        return error.strerror
    return None


def _short_hash(content: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _digest(prompt: str, text: str) -> bytes:
    return hashlib.sha256(f"{prompt}\0{text}".encode()).digest()
