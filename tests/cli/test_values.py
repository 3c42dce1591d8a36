"""Times, durations and sizes, as they are read and as they are shown."""

from __future__ import annotations

from argparse import ArgumentTypeError
from datetime import UTC, datetime, timedelta

import pytest

from silbo.cli.arguments import find_moment, parse_seconds, parse_time
from silbo.operations.formatting import format_age, format_count, format_size


@pytest.mark.parametrize(
    ("text", "length"), [("90", 90), ("90s", 90), ("15m", 900), ("1.5h", 5400), ("7d", 604800), ("0s", 0)]
)
def test_duration_is_a_number_and_a_unit(text: str, length: float) -> None:
    assert parse_seconds(text) == length


@pytest.mark.parametrize("text", ["", "s", "-1s", "1w", "1h30m", "soon", "1 h", "\u0661s"])
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="90s"):
        parse_seconds(text)


@pytest.mark.parametrize("text", ["18263d", "9" * 400])
def test_duration_is_at_most_fifty_years(text: str) -> None:
    assert parse_seconds("18262d") == 18_262 * 86_400
    with pytest.raises(ArgumentTypeError, match="fifty years"):
        parse_seconds(text)


@pytest.mark.parametrize(
    "text", ["2026-03-07T09:26Z", "2026-03-07T09:26", "2026-03-07 09:26:00", "2026-03-07T10:26+01:00", "20260307T0926Z"]
)
def test_moment_without_a_zone_is_in_utc(text: str) -> None:
    assert parse_time(text) == datetime(2026, 3, 7, 9, 26, tzinfo=UTC)


def test_moment_can_be_a_day_or_so_long_ago() -> None:
    assert parse_time("2026-03-07") == datetime(2026, 3, 7, tzinfo=UTC)
    clock = datetime(2026, 3, 7, 12, tzinfo=UTC)
    for text, hour in (("now", 12), ("2h", 10), ("2026-03-07T01:00Z", 1)):
        assert find_moment(parse_time(text), clock) == datetime(2026, 3, 7, hour, tzinfo=UTC)


@pytest.mark.parametrize("text", ["", "yesterday", "09:26", "2026-13-01", "999999999999d", "0001-01-01T00:00+23:59"])
def test_anything_else_is_no_moment(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="2026-03-07T09:26Z"):
        parse_time(text)


def test_figures_are_shown_as_people_read_them() -> None:
    assert [format_size(number) for number in (0, 1023, 1536, 5 << 20, 3 << 30, 5 << 40)] == [
        *("0 bytes", "1023 bytes", "1.5 KiB", "5.0 MiB", "3.0 GiB", "5120.0 GiB")
    ]
    assert [format_count(number, "row") for number in (0, 1, 1200)] == ["0 rows", "1 row", "1,200 rows"]
    spans = ((5, "5 s"), (119, "119 s"), (180, "3 min"), (3 * 3600, "3 h"), (3 * 86400, "3 days"))
    now = datetime.now(UTC)
    for length, text in spans:
        assert format_age(now - timedelta(seconds=length), now) == text
        assert format_age(now + timedelta(seconds=length), now) == text
