"""Amounts as people type them: "40MB", "40MiB", "99%", "50M", "1.5x".

Refuses to know: what an amount limits. An option's name is only quoted in messages.
"""

from __future__ import annotations

import math
import re

from gteopt.errors import InputError

_BYTES: dict[str, int] = {
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def _split(option: str, text: str, allowed: str) -> tuple[float, str]:
    """The number of an amount and its unit in lower case."""
    match = re.fullmatch(r"\s*(\d+(?:[.,]\d+)?|\.\d+)\s*([A-Za-z%]*)\s*", text)
    if match is None:
        raise InputError(f"{option} '{text}' is not an amount; write {allowed}")
    value = float(match[1].replace(",", "."))
    if value <= 0:
        raise InputError(f"{option} '{text}': the amount must be above 0; write {allowed}")
    return value, match[2].lower()


def parse_bytes(option: str, text: str) -> int:
    """Bytes of "40MB" (1 MB = 1,000,000 bytes) or "40MiB" (1 MiB = 1,048,576 bytes).

    Args:
        option: the option that the amount was given to, for the message.
        text: the amount; case and a space before the unit do not matter.

    Raises:
        InputError: not an amount, no unit, or an unknown unit.

    Example:
        >>> parse_bytes("--max-weights", "40MiB")
        41943040
    """
    allowed = "40MB (1 MB is 1,000,000 bytes) or 40MiB (1 MiB is 1,048,576 bytes)"
    value, unit = _split(option, text, allowed)
    if not unit:
        raise InputError(f"{option} '{text}' has no unit: write {text.strip()}MB or {allowed}")
    if unit not in _BYTES:
        raise InputError(
            f"{option} '{text}': unknown unit '{unit}'; use B, kB, MB, GB, TB, KiB, MiB, GiB or TiB"
        )
    return round(value * _BYTES[unit])


def parse_share(option: str, text: str) -> float:
    """A share of "99%" or "0.99", above 0 and at most 1.

    Raises:
        InputError: not a share, or a number above 1 without a per cent sign.
    """
    allowed = "99% or 0.99"
    value, unit = _split(option, text, allowed)
    if unit not in ("", "%"):
        raise InputError(f"{option} '{text}': unknown unit '{unit}'; write {allowed}")
    share = value / 100 if unit == "%" else value
    if share > 1:
        hint = f"; did you mean {text.strip()}%?" if not unit and value <= 100 else ""
        raise InputError(f"{option} '{text}' is above 100 %; write {allowed}{hint}")
    return share


def parse_ratio(option: str, text: str) -> float:
    """The factor in "1.5" or "1.5x".

    Raises:
        InputError: not a factor.
    """
    value, unit = _split(option, text, "1.5x")
    if unit not in ("", "x"):
        raise InputError(f"{option} '{text}': unknown unit '{unit}'; write 1.5x")
    return value


def parse_count(option: str, text: str) -> int:
    """The number in "50M", "2k" or "1000000".

    Raises:
        InputError: not a number.
    """
    allowed = "50M, 200k or 1000000"
    value, unit = _split(option, text, allowed)
    if unit not in _COUNTS:
        raise InputError(f"{option} '{text}': unknown unit '{unit}'; write {allowed}")
    return math.ceil(value * _COUNTS[unit])


def parse_seconds(option: str, text: str) -> float:
    """Seconds of "30m", "2h" or "90s".

    Raises:
        InputError: not a time, or no unit.
    """
    value, unit = _split(option, text, "30m, 2h or 90s")
    factors = {"s": 1, "m": 60, "min": 60, "h": 3600}
    if unit not in factors:
        raise InputError(f"{option} '{text}': write the unit, as in 30m, 2h or 90s")
    return value * factors[unit]


def parse_milliseconds(option: str, text: str) -> float:
    """Milliseconds of "20ms", "20" or "1.5s".

    Raises:
        InputError: not a time.
    """
    value, unit = _split(option, text, "20ms or 1.5s")
    factors = {"": 1, "ms": 1, "s": 1000}
    if unit not in factors:
        raise InputError(f"{option} '{text}': unknown unit '{unit}'; write 20ms or 1.5s")
    return value * factors[unit]
