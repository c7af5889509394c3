"""Amounts with units as users type them, and the messages for wrong amounts."""

from __future__ import annotations

import pytest

from gteopt.config.amounts import (
    parse_bytes,
    parse_count,
    parse_milliseconds,
    parse_ratio,
    parse_seconds,
    parse_share,
)
from gteopt.errors import InputError


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("40MB", 40_000_000),
        ("40 mb", 40_000_000),
        ("40MiB", 41_943_040),
        ("1.5GB", 1_500_000_000),
        ("1,5 GiB", 1_610_612_736),
        ("512B", 512),
        ("2kB", 2000),
    ],
)
def test_bytes_mean_what_their_unit_says(text: str, n_bytes: int) -> None:
    assert parse_bytes("--max-weights", text) == n_bytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("40", "--max-weights '40' has no unit: write 40MB or"),
        ("40 pb", "unknown unit 'pb'; use B, kB"),
        ("forty", "'forty' is not an amount"),
        ("0MB", "must be above 0"),
        ("-3MB", "'-3MB' is not an amount"),
        ("", "'' is not an amount"),
    ],
)
def test_a_size_without_a_meaning_is_refused_with_an_example(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_bytes("--max-weights", text)
    assert message in str(caught.value)
    assert "40MB" in str(caught.value) or "MiB" in str(caught.value)


def test_shares_ratios_counts_and_times() -> None:
    assert parse_share("--min-quality", "99%") == parse_share("--min-quality", "0.99") == 0.99
    assert parse_ratio("--min-speedup", "1.5x") == parse_ratio("--min-speedup", "1.5") == 1.5
    assert parse_count("--for", "50M") == 50_000_000
    assert parse_milliseconds("--max-query-ms", "20ms") == 20
    assert parse_milliseconds("--max-query-ms", "1.5s") == 1500


def test_a_share_above_the_whole_asks_for_the_per_cent_sign() -> None:
    with pytest.raises(InputError, match="did you mean 99%"):
        parse_share("--min-quality", "99")
    with pytest.raises(InputError, match="is above 100 %"):
        parse_share("--min-quality", "120%")


def test_a_time_needs_its_unit() -> None:
    assert parse_seconds("--budget", "30m") == 1800
    assert parse_seconds("--budget", "1.5h") == 5400
    with pytest.raises(InputError, match="--budget '30': write the unit, as in 30m, 2h or 90s"):
        parse_seconds("--budget", "30")
