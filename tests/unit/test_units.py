"""Durations and sizes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curling_fd.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10ms", 0.01),
        ("1.5s", 1.5),
        ("2min", 120),
        ("1 h", 3600),
        (" 250us ", 0.00025),
        ("0ms", 0),
        ("0.1s", 0.1),
    ],
)
def test_a_duration_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("100", "has no unit"),
        ("10m", "'m' is not a unit of time"),
        ("10 MS", "'MS' is not a unit of time"),
        ("-1s", "is not a duration"),
        ("", "is not a duration"),
        ("ms", "is not a duration"),
        ("1e3s", "is not a duration"),
        ("1s 2ms", "is not a duration"),
        ("\u0661s", "is not a duration"),
        ("1." + "0" * 40 + "s", "is not a duration"),
    ],
)
def test_what_is_no_duration_is_refused_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_duration(text)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("512MiB", 512 << 20),
        ("1GiB", 1 << 30),
        ("1.5 KiB", 1536),
        ("4096", 4096),
        (17, 17),
        ("2TiB", 2 << 40),
        ("8B", 8),
    ],
)
def test_a_size_is_bytes_or_a_number_with_a_binary_unit(value: str | int, size: int) -> None:
    assert parse_size(value) == size


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("1GB", "may mean GiB"),
        ("1G", "may mean GiB"),
        ("1gib", "may mean GiB"),
        ("1Mb", "may mean MiB"),
        ("5 apples", r"TiB$"),
        ("0.5B", "not a whole number of bytes"),
        ("-1", "is not a size"),
        (-1, "negative"),
        ("big", "is not a size"),
    ],
)
def test_what_is_no_size_is_refused_with_the_reason(value: str | int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_size(value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0000009, "0.9 us"),
        (0.00093, "930 us"),
        (0.00099996, "1 ms"),
        (0.0012, "1.2 ms"),
        (0.5, "500 ms"),
        (1.5, "1.5 s"),
        (90, "90 s"),
        (120, "2 min"),
        (7200, "2 h"),
        (-0.5, "-500 ms"),
    ],
)
def test_durations_are_written_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (17, "17 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (512 << 20, "512 MiB"),
     ((1 << 20) - 1, "1 MiB"), (5000 << 40, "5000 TiB"), (-1024, "-1 KiB")],
)  # fmt: skip
def test_sizes_are_written_short(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.floats(min_value=1e-5, max_value=1e6))
def test_a_written_duration_reads_back_as_nearly_the_same(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, rel=0.005)


@given(st.integers(min_value=0, max_value=1 << 50))
def test_a_written_size_reads_back_as_nearly_the_same(size: int) -> None:
    try:
        back = parse_size(format_size(size))
    except ValueError:  # "1.01 KiB" is no whole number of bytes
        return
    assert back == pytest.approx(size, rel=0.006)


@given(st.text(max_size=30))
def test_any_text_is_a_value_or_a_value_error(text: str) -> None:
    for parse in (parse_duration, parse_size):
        with contextlib.suppress(ValueError):
            assert parse(text) >= 0
