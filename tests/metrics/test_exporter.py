"""The endpoint itself: what is in its way, who may read it, who cannot hold it up."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from demo.world import free_port
from lab.daemon import Daemon
from storaged.errors import ConfigError, StoragedError
from storaged.metrics import exporter
from storaged.units import GIB
from tests.metrics.support import Served, get, samples
from tests.rpc.conftest import Guest


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    """A simulated guest."""
    one = Guest(tmp_path)
    await one.start()
    yield one
    await one.stop()


@pytest.mark.parametrize("address", ["9847", "vsock:2:9847", "http://127.0.0.1:9847", "unix:", "127.0.0.1:99999"])
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is not"):
        exporter.parse(address)


async def test_a_socket_that_nobody_serves_is_replaced(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with Served(guest.service, f"unix:{path}") as served:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert samples((await served.get())[1])["storaged_filesystem_size_bytes",] == 8 * GIB


async def test_what_is_in_the_way_stays(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    path.write_text("mine")
    with pytest.raises(StoragedError, match="no socket"):
        exporter.serve(guest.service, f"unix:{path}")
    assert path.read_text() == "mine"
    path.unlink()
    with Served(guest.service, f"unix:{path}") as served:
        with pytest.raises(StoragedError, match="another process"):
            exporter.serve(guest.service, f"unix:{path}")
        await served.get()


async def test_a_port_in_use_is_an_error_with_a_reason(guest: Guest) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(StoragedError, match="Address already in use"):
            exporter.serve(guest.service, f"127.0.0.1:{taken.getsockname()[1]}")


async def test_a_silent_connection_holds_nobody_up(guest: Guest) -> None:
    with Served(guest.service, "127.0.0.1:0") as served:
        host, _, port = served.address.rpartition(":")
        with socket.create_connection((host, int(port))):
            for _ in range(3):
                await served.get()


def said(address: str, request: bytes) -> bytes:
    """All that is answered to `request`."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


async def test_http_is_answered_as_far_as_scrapers_need_it(guest: Guest) -> None:
    with Served(guest.service, "127.0.0.1:0") as served:
        for request, status in (
            (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"200 OK"),
            (b"GET /metrics?name[]=storaged_build_info HTTP/1.0\r\n\r\n", b"200 OK"),
            (b"POST /metrics HTTP/1.1\r\n\r\n", b"405 Method Not Allowed"),
            (b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n", b"431 Too many headers"),
        ):
            head, _, body = (await asyncio.to_thread(said, served.address, request)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.0 " + status), (request[:40], head)
            assert (b"storaged_build_info" in body) == (status == b"200 OK")
            assert (b"storaged_filesystem_size_bytes" in body) == (status == b"200 OK" and b"name" not in request)
        for request in (b"GET /metrics HTTP/1.1 x\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET /" + b"x" * 70_000):
            assert b"storaged_build_info" not in await asyncio.to_thread(said, served.address, request)


async def test_many_silent_connections_take_no_more_threads_than_that(guest: Guest) -> None:
    before = threading.active_count()
    with Served(guest.service, "127.0.0.1:0") as served:
        host, _, port = served.address.rpartition(":")
        with contextlib.ExitStack() as held:
            for _ in range(3 * exporter.MOST_AT_ONCE):
                held.enter_context(socket.create_connection((host, int(port))))
            await asyncio.sleep(0.2)
            assert threading.active_count() - before <= exporter.MOST_AT_ONCE + 2
        for _ in range(50):
            with contextlib.suppress(OSError, http.client.HTTPException):
                await served.get()
                break
            await asyncio.sleep(0.1)
        else:
            pytest.fail("it does not answer any more")


@pytest.mark.parametrize("address", ["tcp", "unix"])
def test_a_daemon_serves_them_where_it_was_told(address: str, tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/m.sock" if address == "unix" else f"127.0.0.1:{free_port()}"
    with Daemon(tmp_path, "--sim-size", "4G", "--metrics", where) as daemon:
        daemon.report_free(2 * GIB)
        found = samples(get(where)[1])
        assert found["storaged_filesystem_size_bytes",] == 4 * GIB
        assert found["storaged_filesystem_available_bytes",] == daemon.available()
    assert not (tmp_path / "m.sock").exists()


def test_a_daemon_that_cannot_serve_them_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"nonsense.* is not "):
        Daemon(tmp_path, "--metrics", "nonsense").start()
