"""Addresses: what is accepted, and what is refused before anything listens on it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.addresses import ANY_CID, TcpAddress, UnixAddress, VsockAddress, parse_address
from storaged.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/s", UnixAddress("/run/s")),
        ("unix:/run/../s", UnixAddress("/s")),
        ("tcp:127.0.0.1:80", TcpAddress("127.0.0.1", 80)),
        ("tcp:localhost:0", TcpAddress("localhost", 0)),
        ("tcp:[::1]:8888", TcpAddress("[::1]", 8888)),
        ("vsock:3:8888", VsockAddress(3, 8888)),
        ("vsock::8888", VsockAddress(ANY_CID, 8888)),
    ],
)
def test_addresses_are_read_and_written_back(text: str, address: object) -> None:
    found = parse_address(text)
    assert found == address
    assert parse_address(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unix:",
        "/run/s",
        "tcp:",
        "tcp:host",
        "tcp::80",
        "tcp:host:",
        "tcp:host:65536",
        "tcp:host:-1",
        "tcp:host:8٣",
        "tcp:host:+80",
        "vsock:",
        "vsock:3",
        "vsock:x:1",
        "vsock:-1:1",
        "vsock:4294967296:1",
        "http://x",
        "unix:/" + "x" * 107,
        "unix:/a\0b",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        parse_address(text)


def test_the_longest_path_that_the_kernel_takes() -> None:
    assert parse_address("unix:/" + "x" * 106) == UnixAddress("/" + "x" * 106)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("[::]", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("example", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert TcpAddress(host, 1).loopback is loopback


@given(text=st.text(max_size=40) | st.text("unixtcpvsock:/.0123456789[]", max_size=30))
def test_any_text_is_an_address_or_a_refusal(text: str) -> None:
    try:
        found = parse_address(text)
    except ConfigError:
        return
    assert parse_address(str(found)) == found
