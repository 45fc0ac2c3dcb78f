"""What one peer can take of the console: half-sent requests, slow readers, event streams, lines in the log."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.host.console.limits import Crowd, Limits, peer_name
from storaged.host.console.server import Console
from storaged.host.console.settings import ConsoleSettings
from tests.console.told import Served, ToldHost

HALF_HEADER = b"GET /static/app.js HTTP/1.1\r\nHost: localhost\r\n"
HALF_BODY = (
    b"POST /api/login HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
)
PROMPT_S = 1.0


@pytest.fixture(autouse=True)
def _descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def hanging(served: Served, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    """`count` connections that have sent `sent`, and say nothing more."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", served.port), 10))
            with contextlib.suppress(ConnectionError):
                one.sendall(sent)
            found.append(one)
        yield found


def prompt(served: Served) -> None:
    """A good client is answered, and soon."""
    for path in ("/", "/static/app.js", "/api/state", "/api/session"):
        begun = time.monotonic()
        assert served.ask("GET", path)[0] == 200, path
        assert time.monotonic() - begun < PROMPT_S, path


@pytest.mark.parametrize("sent", [b"", HALF_HEADER, HALF_BODY], ids=["nothing", "header", "body"])
def test_500_half_sent_requests_keep_nobody_waiting(sent: bytes) -> None:
    with Served(ToldHost()) as served, hanging(served, 500, sent):
        for _ in range(5):
            prompt(served)


async def test_half_sent_requests_on_a_unix_socket_keep_nobody_waiting(tmp_path: Path) -> None:
    path = f"{tmp_path}/console.sock"
    console = Console(ConsoleSettings(f"unix:{path}"), ToldHost())
    console.bind()
    task = asyncio.create_task(console.run())
    half = []
    for _ in range(300):
        half.append(await asyncio.open_unix_connection(path))
        half[-1][1].write(HALF_HEADER)
    for _ in range(5):
        async with asyncio.timeout(PROMPT_S):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"GET /api/state HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.close()
    async with asyncio.timeout(10):
        said = await half[0][0].read()
    assert b"others of its peer needed its place" in said, "as many as one user may have"
    for _, writer in half:
        writer.close()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_300_event_streams_leave_the_page_and_the_api(caplog: pytest.LogCaptureFixture) -> None:
    with Served(ToldHost()) as served:
        request = f"GET /api/events HTTP/1.1\r\nHost: localhost\r\nCookie: {served.cookie}\r\n\r\n".encode()
        with hanging(served, 300, request) as streams:
            prompt(served)
            status, _, said = served.ask("GET", "/api/events")
            assert status == 429
            assert "live pages" in said["error"]
            assert "127.0.0.1" in said["error"]
            answered = 0
            for one in streams:
                one.settimeout(2)
                with contextlib.suppress(ConnectionError, TimeoutError):
                    answered += one.recv(4096).startswith(b"HTTP/1.1 200")
            assert answered == 32
        until = time.monotonic() + 10
        while (full := served.ask("GET", "/api/session")[2].get("full")) and time.monotonic() < until:
            time.sleep(0.05)
        assert not full, "streams that ended make room"


@pytest.mark.parametrize(("sent", "part"), [(HALF_HEADER, "header"), (HALF_BODY, "body")])
def test_a_request_that_does_not_arrive_is_ended_however_it_trickles(sent: bytes, part: str) -> None:
    limits = Limits(header_s=0.6, body_s=0.6)
    with Served(ToldHost(), limits=limits) as served, hanging(served, 1, sent) as (one,):
        one.settimeout(0.1)
        begun, answer = time.monotonic(), b""
        while not answer and time.monotonic() < begun + 10:
            with contextlib.suppress(TimeoutError):
                answer = one.recv(4096)
            with contextlib.suppress(ConnectionError):
                one.sendall(b"x")
        assert time.monotonic() - begun < 5
        assert answer.startswith(b"HTTP/1.1 408")
        assert f"the {part} of the request did not arrive within 0.6 s".encode() in answer


def test_the_deadline_is_of_one_request_and_not_of_a_connection() -> None:
    with Served(ToldHost(), limits=Limits(header_s=0.6, body_s=0.6)) as served:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
        for _ in range(4):
            connection.request("GET", "/api/state", headers={"cookie": served.cookie})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200
            time.sleep(0.3)
        connection.request("GET", "/api/events", headers={"cookie": served.cookie})
        stream = connection.getresponse()
        until = time.monotonic() + 2
        while time.monotonic() < until:
            assert stream.readline(), "a stream goes on"
        connection.close()


@pytest.mark.parametrize(("next_sent", "answer"), [(HALF_HEADER, b"HTTP/1.1 408"), (b"\x00\r\n\r\n", b"HTTP/1.1 400")])
def test_a_second_request_is_answered_as_the_first(next_sent: bytes, answer: bytes) -> None:
    with Served(ToldHost(), limits=Limits(header_s=0.3)) as served, hanging(served, 1, b"") as (one,):
        one.settimeout(10)
        one.sendall(b"GET /api/state HTTP/1.1\r\nHost: localhost\r\n\r\n")
        first = b""
        while not first.endswith(b"}"):
            first += one.recv(4096)
        assert first.startswith(b"HTTP/1.1 401")
        one.sendall(next_sent)
        assert one.recv(4096).startswith(answer)


def test_who_does_not_read_is_put_out() -> None:
    with Served(ToldHost(), limits=Limits(send_s=0.5)) as served, socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", served.port))
        one.settimeout(10)
        request = f"GET /api/state HTTP/1.1\r\nHost: localhost\r\nCookie: {served.cookie}\r\n\r\n".encode()
        with pytest.raises(ConnectionError):
            one.sendall(request * 100_000)


def test_a_peer_at_work_with_all_it_may_have_is_told_so() -> None:
    with Served(ToldHost(), limits=Limits(connections_per_peer=3, streams_per_peer=9)) as served:
        request = f"GET /api/events HTTP/1.1\r\nHost: localhost\r\nCookie: {served.cookie}\r\n\r\n".encode()
        with contextlib.ExitStack() as stack:
            for _ in range(6):
                (one,) = stack.enter_context(hanging(served, 1, request))
                assert one.recv(4096).startswith(b"HTTP/1.1 200")
            with socket.create_connection(("127.0.0.1", served.port), 10) as another:
                assert another.recv(4096).startswith(b"HTTP/1.1 503")
        until = time.monotonic() + 10
        while served.ask("GET", "/api/session")[0] != 200:
            assert time.monotonic() < until


def test_a_crowd_makes_room_at_the_cost_of_the_largest() -> None:
    waits: set[int] = set()
    crowd: Crowd[int] = Crowd(2, 6, waits.__contains__)
    for member in (1, 2, 3, 4):
        assert crowd.room("a") == (True, None)
        crowd.add("a", member)
    assert crowd.room("a") == (False, None), "all are at work"
    waits |= {2, 3}
    assert crowd.room("a") == (True, 2), "the oldest that waits"
    for member in (5, 6):
        crowd.add("b", member)
    assert crowd.room("c") == (True, 2), "of who has most"
    assert crowd.room("b") == (False, None)
    crowd.discard("a", 2)
    crowd.discard("a", 2)
    assert crowd.room("c") == (True, None)


@pytest.mark.parametrize(
    ("host", "peer"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("::ffff:10.0.0.5", "10.0.0.5"),
        ("2001:db8::5", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_a_peer_is_a_machine(host: str, peer: str) -> None:
    assert peer_name(host) == peer


def test_a_flood_of_refusals_is_a_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Served(ToldHost()) as served:
        for _ in range(200):
            assert served.ask("GET", "/api/state", host="evil.example")[0] == 421
            with socket.create_connection(("127.0.0.1", served.port), 10) as garbage:
                garbage.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
                garbage.recv(4096)
    refused = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert 2 <= len(refused) <= 6, refused
    assert any("127.0.0.1" in line and "name" in line for line in refused)
