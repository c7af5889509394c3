"""Read API keys from a file, and check a caller's key and its limits.

Hides: that only SHA-256 digests are kept and that comparisons take equal time. Refuses to know:
HTTP and queues.

The file has one key per line: `[NAME] KEY [weight=2] [requests_per_minute=60]
[tokens_per_minute=100000] [admin=1]`. KEY is the secret itself, or `sha256:` and its digest in
hexadecimal. `#` begins a comment.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gteopt.errors import InputError, join_problems, suggest_names

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_OPTIONS = ("weight", "requests_per_minute", "tokens_per_minute", "admin")
_LEAST_SECRET = 16


@dataclass(frozen=True)
class ApiKey:
    """An API key.

    Attributes:
        name: name of the key in logs.
        digest: SHA-256 of the secret.
        weight: share of the device, relative to other keys.
        requests_per_minute: limit; None for no limit.
        tokens_per_minute: limit; None for no limit.
        admin: above 0, the key may reload artifacts.
    """

    name: str
    digest: bytes
    weight: float = 1.0
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    admin: float = 0.0


ANYBODY = ApiKey("anybody", b"")
"""The key of every caller of a server without API keys."""


class ApiKeys:
    """The keys of one server."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._keys = tuple(keys)

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each key, by its name."""
        return {key.name: key.weight for key in self._keys}

    def find(self, secret: str) -> ApiKey | None:
        """The key with this secret, or None.

        All digests are compared, so that the time does not tell which key matched.
        """
        digest = hashlib.sha256(secret.encode()).digest()
        match = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                match = key
        return match


def read_api_keys(path: Path) -> ApiKeys:
    """Read a file of keys; this module's docstring describes its format.

    Raises:
        InputError: the file cannot be read, has no key, or has wrong lines; lists all of them.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--api-keys {path}: cannot be read ({error})") from error
    keys: list[ApiKey] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            keys.append(_parse(words, f"key-{number}"))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if len({key.name for key in keys}) < len(keys):
        problems.append("two keys have the same name")
    if len({key.digest for key in keys}) < len(keys):
        problems.append("two keys have the same secret")
    if not keys and not problems:
        problems.append("the file has no key")
    if problems:
        raise InputError(join_problems(f"--api-keys {path}", problems))
    return ApiKeys(keys)


def _parse(words: list[str], default_name: str) -> ApiKey:
    plain = [word for word in words if "=" not in word]
    if not plain or len(plain) > 2:
        raise ValueError("write [NAME] KEY [option=number ...]")
    name, secret = (default_name, plain[0]) if len(plain) == 1 else plain
    if secret.startswith("sha256:"):
        if not _DIGEST.fullmatch(secret):
            raise ValueError("sha256: must be followed by 64 hexadecimal digits")
        digest = bytes.fromhex(secret.removeprefix("sha256:"))
    elif len(secret) < _LEAST_SECRET:
        raise ValueError(f"a key has at least {_LEAST_SECRET} characters")
    else:
        digest = hashlib.sha256(secret.encode()).digest()
    options: dict[str, float] = {}
    for word in words:
        option, is_option, value = word.partition("=")
        if not is_option:
            continue
        if option not in _OPTIONS:
            raise ValueError(f"unknown option '{option}': {suggest_names(option, _OPTIONS)}")
        try:
            options[option] = float(value)
        except ValueError:
            raise ValueError(f"{option} is '{value}', expected a number") from None
        if not 0 < options[option] < float("inf"):
            raise ValueError(f"{option} is '{value}', expected a finite number above 0")
    return ApiKey(name, digest, **options)


class Allowance:
    """A limit per minute, as a token bucket that holds one minute's amount and refills steadily."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = per_minute / 60
        self._most = self._left = per_minute
        self._clock = clock
        self._at = clock()

    def take(self, amount: float) -> float | None:
        """Take an amount and return None, or return the seconds to wait for it.

        An amount above the bucket's size is allowed when the bucket is full.
        """
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        needed = min(amount, self._most)
        if self._left < needed:
            return (needed - self._left) / self._rate
        self._left -= amount
        return None


class Allowances:
    """The allowances of all keys."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._allowances: dict[tuple[str, str], Allowance] = {}

    def take(self, key: ApiKey, *, requests: float = 0, tokens: float = 0) -> float | None:
        """Take from a key's limits and return None, or return the seconds to wait."""
        for kind, limit, amount in (
            ("requests", key.requests_per_minute, requests),
            ("tokens", key.tokens_per_minute, tokens),
        ):
            if limit is not None and amount:
                allowance = self._allowances.setdefault(
                    (key.name, kind), Allowance(limit, self._clock)
                )
                if (wait := allowance.take(amount)) is not None:
                    return wait
        return None
