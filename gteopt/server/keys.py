"""API keys: who may ask, how much, and with which weight.

Hides: that only SHA-256 digests are kept and that comparisons take equal time. Refuses to know:
HTTP and queues.

The file has a key a line: `[NAME] KEY [weight=2] [requests_per_minute=60]
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

from gteopt.errors import InputError, join_problems, suggest

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_OPTIONS = ("weight", "requests_per_minute", "tokens_per_minute", "admin")
_LEAST_SECRET = 16


@dataclass(frozen=True)
class Key:
    """One caller.

    Attributes:
        name: what metrics and logs call it.
        digest: SHA-256 of the secret.
        weight: its share of the device beside other keys.
        requests_per_minute: None is no limit.
        tokens_per_minute: None is no limit.
        admin: whether it may have artifacts loaded anew, if above 0.
    """

    name: str
    digest: bytes
    weight: float = 1.0
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    admin: float = 0.0


ANYBODY = Key("anybody", b"")
"""Whoever asks where no keys are needed."""


class Keys:
    """The keys of one server."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = tuple(keys)

    @property
    def weights(self) -> Mapping[str, float]:
        """Share of the device by name."""
        return {each.name: each.weight for each in self._keys}

    def find(self, secret: str) -> Key | None:
        """Whose secret it is. All digests are compared, so that time tells nothing."""
        digest = hashlib.sha256(secret.encode()).digest()
        found = None
        for each in self._keys:
            if hmac.compare_digest(each.digest, digest):
                found = each
        return found


def read_keys(path: Path) -> Keys:
    """Read a file of keys; its form is described in this module.

    Raises:
        InputError: the file cannot be read, has no key, or has wrong lines; all are listed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--api-keys {path}: cannot be read ({error})") from error
    keys: list[Key] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            keys.append(_parse(words, f"key-{number}"))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    for what in ("name", "digest"):
        values = [getattr(each, what) for each in keys]
        if len(set(values)) < len(values):
            problems.append(f"two keys have the same {'secret' if what == 'digest' else what}")
    if not keys and not problems:
        problems.append("there is no key in it")
    if problems:
        raise InputError(join_problems(f"--api-keys {path}", problems))
    return Keys(keys)


def _parse(words: list[str], default_name: str) -> Key:
    plain = [word for word in words if "=" not in word]
    if not plain or len(plain) > 2:
        raise ValueError("write [NAME] KEY [option=number ...]")
    name, secret = (default_name, plain[0]) if len(plain) == 1 else plain
    if secret.startswith("sha256:"):
        if not _DIGEST.fullmatch(secret):
            raise ValueError("sha256: is followed by 64 hexadecimal digits")
        digest = bytes.fromhex(secret.removeprefix("sha256:"))
    elif len(secret) < _LEAST_SECRET:
        raise ValueError(f"a key has at least {_LEAST_SECRET} characters")
    else:
        digest = hashlib.sha256(secret.encode()).digest()
    options: dict[str, float] = {}
    for word in (each for each in words if "=" in each):
        option, _, value = word.partition("=")
        if option not in _OPTIONS:
            raise ValueError(f"unknown option '{option}': {suggest(option, _OPTIONS)}")
        try:
            options[option] = float(value)
        except ValueError:
            raise ValueError(f"{option} is '{value}', expected a number") from None
        if not 0 < options[option] < float("inf"):
            raise ValueError(f"{option} must be above 0")
    return Key(name, digest, **options)


class Allowance:
    """A limit a minute that refills steadily (token bucket); a minute's worth may come at once."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = per_minute / 60
        self._most = self._left = per_minute
        self._clock = clock
        self._at = clock()

    def take(self, amount: float) -> float | None:
        """Use some of it; None, or how many seconds to wait for it.

        An amount above a minute's worth is let through when all of that is there.
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
    """What is left of each key's limits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._of: dict[tuple[str, str], Allowance] = {}

    def take(self, key: Key, *, requests: float = 0, tokens: float = 0) -> float | None:
        """Use some of a key's limits; None, or how many seconds to wait."""
        for kind, limit, amount in (
            ("requests", key.requests_per_minute, requests),
            ("tokens", key.tokens_per_minute, tokens),
        ):
            if limit is not None and amount:
                own = self._of.setdefault((key.name, kind), Allowance(limit, self._clock))
                if (wait := own.take(amount)) is not None:
                    return wait
        return None
