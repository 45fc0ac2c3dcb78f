"""Sizes and times: what people write is what is meant, what is shown can be read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import InvalidRequest
from storaged.units import (
    GIB,
    KIB,
    MAX_SIZE,
    MIB,
    SECTOR,
    TIB,
    format_duration,
    format_size,
    parse_size,
    sector_ceil,
    sector_floor,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1k", KIB),
        ("20G", 20 * GIB),
        ("20g", 20 * GIB),
        ("20GB", 20 * GIB),
        ("20 GiB", 20 * GIB),
        ("  512MiB ", 512 * MIB),
        ("1.5T", TIB + TIB // 2),
        ("0.5K", 512),
        ("1.25GiB", GIB + GIB // 4),
        ("7E", 7 << 60),
        (str(MAX_SIZE), MAX_SIZE),
    ],
)
def test_sizes_that_people_write(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "G",
        "-1",
        "+1",
        "1..5G",
        "1.G",
        "1e3",
        "0x10",
        "20 GB/s",
        "1.5",
        "1GG",
        "٣",
        "20G\0",
        "nan",
        "8E",
        "1_000",
    ],
)
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_size(text)
    assert repr(text) in caught.value.message


@given(size=st.integers(0, MAX_SIZE))
def test_bytes_are_read_back_exactly(size: int) -> None:
    assert parse_size(str(size)) == size


@given(size=st.integers(0, MAX_SIZE // 2))
def test_what_is_shown_is_near_what_is_meant(size: int) -> None:
    text = format_size(size)
    assert len(text) <= 9
    assert abs(parse_size(text) - size) <= max(size // 100, 1)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1.00 KiB"),
        (1536 * MIB, "1.50 GiB"),
        (10 * GIB, "10.0 GiB"),
        (100 * GIB, "100 GiB"),
        (1000 * GIB, "0.98 TiB"),
        (-GIB, "-1.00 GiB"),
        (MAX_SIZE, "8.00 EiB"),
        (1.5 * MIB, "1.50 MiB"),
    ],
)
def test_three_digits_and_a_prefix(size: float, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.949, "9.9 s"),
        (9.95, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (-3, "-3.0 s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(size=st.integers(0, MAX_SIZE))
def test_sectors(size: int) -> None:
    low, high = sector_floor(size), sector_ceil(size)
    assert low % SECTOR == high % SECTOR == 0
    assert low <= size <= high
    assert high - low in (0, SECTOR)
