"""Logs: what the journal is sent, what people read, and that neither can break a call."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged import logs
from storaged.logs import MOST_FIELD, REQUEST_ID, RPC_METHOD, JournalHandler, encode, request_id, stderr_is_journal


def record(message: str, *arguments: object, level: int = logging.INFO, error: bool = False) -> logging.LogRecord:
    info = sys.exc_info() if error else None
    return logging.LogRecord("storaged.x", level, __file__, 7, message, arguments, info, "here")


def decode(entry: bytes) -> dict[str, str]:
    """As journald reads its native protocol."""
    found = {}
    while entry:
        line, _, rest = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack("<Q", rest[:8])
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        found[name.decode()] = value.decode("utf-8", "replace")
        entry = rest
    return found


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=300), method=st.text(max_size=20))
def test_any_message_arrives_whole(text: str, method: str) -> None:
    token = RPC_METHOD.set(method)
    try:
        found = decode(encode(record("%s", text)))
    finally:
        RPC_METHOD.reset(token)
    assert found.get("MESSAGE", "") == text
    assert found["LOGGER"] == "storaged.x"
    assert (found["CODE_LINE"], found["CODE_FUNC"], found["SYSLOG_IDENTIFIER"]) == ("7", "here", "storaged")


@pytest.mark.parametrize(
    ("level", "priority"), [(10, "7"), (20, "6"), (25, "6"), (30, "4"), (40, "3"), (50, "3"), (1, "7")]
)
def test_levels_are_the_journal_s(level: int, priority: str) -> None:
    assert decode(encode(record("x", level=level)))["PRIORITY"] == priority


def test_the_request_is_a_field_of_its_own() -> None:
    assert "REQUEST_ID" not in decode(encode(record("x")))
    tokens = REQUEST_ID.set("abc"), RPC_METHOD.set("/a/B")
    try:
        found = decode(encode(record("x")))
    finally:
        REQUEST_ID.reset(tokens[0])
        RPC_METHOD.reset(tokens[1])
    assert (found["REQUEST_ID"], found["RPC_METHOD"]) == ("abc", "/a/B")


def test_a_traceback_is_part_of_the_message() -> None:
    try:
        raise ValueError("inside")
    except ValueError:
        message = decode(encode(record("broken", error=True)))["MESSAGE"]
    assert message.startswith("broken\nTraceback")
    assert message.endswith("ValueError: inside")


def test_an_entry_always_fits_into_a_datagram() -> None:
    assert len(encode(record("x" * 10_000_000))) < 2 * MOST_FIELD


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind(str(tmp_path / "journal"))
        one.settimeout(5)
        yield one


def test_the_journal_gets_entries_and_its_absence_costs_no_line(
    journal: socket.socket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = JournalHandler(str(tmp_path / "journal"))
    handler.handle(record("hello %d", 3))
    assert decode(journal.recv(1 << 16))["MESSAGE"] == "hello 3"
    os.unlink(tmp_path / "journal")
    handler.handle(record("still here"))
    assert "INFO storaged.x: still here" in capsys.readouterr().err
    handler.close()


def test_a_full_journal_does_not_stop_the_daemon(journal: socket.socket, tmp_path: Path) -> None:
    handler = JournalHandler(str(tmp_path / "journal"))
    for number in range(2000):  # nobody reads them: the socket's queue is full long before
        handler.handle(record("line %d", number))
    journal.setblocking(False)
    kept = []
    with contextlib.suppress(BlockingIOError):
        while True:
            kept.append(decode(journal.recv(1 << 16))["MESSAGE"])
    assert kept == [f"line {number}" for number in range(len(kept))]
    handler.handle(record("after"))
    assert [decode(journal.recv(1 << 16))["MESSAGE"] for _ in range(2)] == [
        f"{2000 - len(kept)} lines are lost: the journal did not take them",
        "after",
    ]
    handler.close()


def test_it_is_known_whether_stderr_goes_to_the_journal(tmp_path: Path) -> None:
    with (tmp_path / "f").open("w") as file:
        found = os.fstat(file.fileno())
        assert stderr_is_journal({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}, file.fileno())
        for other in ("", "1", f"{found.st_dev}:{found.st_ino + 1}", "a:b", ":"):
            assert not stderr_is_journal({"JOURNAL_STREAM": other}, file.fileno())
        assert not stderr_is_journal({}, file.fileno())


@given(offered=st.text(max_size=80) | st.binary() | st.none())
def test_an_identity_is_always_fit_for_a_log(offered: object) -> None:
    found = request_id(offered)
    assert 1 <= len(found) <= 64
    assert found.isascii()
    assert found.isprintable()
    assert " " not in found


def test_people_see_the_request_in_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        logs.setup("warning")
        token = REQUEST_ID.set("r-1")
        logging.getLogger("storaged.y").warning("said")
        REQUEST_ID.reset(token)
        logging.getLogger("storaged.y").warning("alone")
        logging.getLogger("storaged.y").info("unsaid")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "WARNING storaged.y: [r-1] said",
        "WARNING storaged.y: alone",
    ]
