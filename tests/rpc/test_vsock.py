"""The relay: who comes in, what they may cost, and that it carries bytes and no opinions.

AF_VSOCK does not loop back here, so peers are socket pairs with the context id told; listening is for real.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Self

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.addresses import ANY_CID, VsockAddress
from storaged.config import LimitsConfig, VsockConfig
from storaged.errors import StoragedError
from storaged.rpc.outward import Outward
from storaged.rpc.proto import vm_guest_pb2_grpc
from storaged.rpc.server import Server
from storaged.rpc.vsock import BUFFER, PREFACE, Relay
from tests.rpc.conftest import EMPTY, Guest

HOST, OTHER = 2, 7
ANY_PORT = ANY_CID
QUICK = VsockConfig(connections=8, connections_per_cid=6, preface_s=0.3, idle_s=0.6)


class Backend:
    """A server that keeps what it hears, and answers what it is told to."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.echo = True
        self.count = 0
        self._server: asyncio.Server

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for _reader, writer in self.streams:
            writer.transport.abort()
        await asyncio.sleep(0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.count += 1
        if not self.echo:
            self.streams.append((reader, writer))
            return
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(BUFFER):
                writer.write(data)
                await writer.drain()
        writer.close()


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[Backend]:
    async with Backend(tmp_path / "b") as one:
        yield one


@pytest.fixture
async def relay(backend: Backend) -> AsyncIterator[Relay]:
    one = Relay(backend.path, QUICK)
    try:
        yield one
    finally:
        await one.close()
        assert one.open == 0


async def enter(relay: Relay, cid: int = HOST) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A peer that has just connected."""
    ours, theirs = socket.socketpair()
    relay.adopt(theirs, cid)
    reader, writer = await asyncio.open_connection(sock=ours)
    _WRITERS.add(writer)
    return reader, writer


_WRITERS: weakref.WeakSet[asyncio.StreamWriter] = weakref.WeakSet()


@pytest.fixture(autouse=True)
async def _no_peer_is_left() -> AsyncIterator[None]:
    yield
    for writer in _WRITERS:
        writer.transport.abort()
    await asyncio.sleep(0.01)


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  # there is nothing to wait for but time
            await asyncio.sleep(0.005)


async def test_bytes_go_through_in_both_directions_and_the_end_too(relay: Relay, backend: Backend) -> None:
    reader, writer = await enter(relay)
    blob = os.urandom(3 << 20)
    sending = asyncio.create_task(_send(writer, PREFACE + blob))
    assert await reader.readexactly(len(PREFACE) + len(blob)) == PREFACE + blob
    await sending
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()
    await until(lambda: relay.open == 0)
    assert relay.accepted == 1
    assert not any(relay.dropped.values())


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


@given(cuts=st.lists(st.integers(1, len(PREFACE) + 9), max_size=6))
def test_a_preface_in_pieces_is_a_preface(cuts: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    async def run() -> None:
        async with Backend(tmp_path_factory.mktemp("p") / "b") as backend:
            relay = Relay(backend.path, QUICK)
            reader, writer = await enter(relay)
            data = PREFACE + b"and more."
            for begin, end in zip([0, *sorted(set(cuts))], [*sorted(set(cuts)), len(data)], strict=True):
                writer.write(data[begin:end])
                await asyncio.sleep(0)
            assert await reader.readexactly(len(data)) == data
            writer.close()
            await relay.close()

    asyncio.run(run())


async def test_only_those_who_are_allowed_come_in(relay: Relay, backend: Backend) -> None:
    reader, writer = await enter(relay, OTHER)
    assert await reader.read() == b""
    assert (relay.dropped["cid"], relay.accepted, relay.open) == (1, 0, 0)
    assert not backend.count
    writer.close()
    relay.config = VsockConfig(cids=(HOST, OTHER))
    reader, writer = await enter(relay, OTHER)
    await _send(writer, PREFACE)
    assert await reader.readexactly(len(PREFACE)) == PREFACE
    writer.close()


async def test_who_speaks_something_else_reaches_nobody(relay: Relay, backend: Backend) -> None:
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"\0", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r!", os.urandom(1 << 16)):
        reader, writer = await enter(relay)
        with contextlib.suppress(ConnectionError):
            await _send(writer, words)
            assert await reader.read() == b""
        writer.close()
    await until(lambda: relay.open == 0)
    assert relay.dropped["preface"] == 4
    assert not backend.count


async def test_a_silent_or_dripping_peer_is_dropped_in_time(relay: Relay, backend: Backend) -> None:
    silent, silent_writer = await enter(relay)
    dripping, dripping_writer = await enter(relay)

    async def drip() -> None:
        with contextlib.suppress(ConnectionError):
            for byte in PREFACE[:-1]:
                await _send(dripping_writer, bytes([byte]))
                await asyncio.sleep(0.05)

    drops = asyncio.create_task(drip())
    async with asyncio.timeout(2):
        with contextlib.suppress(ConnectionError):
            assert await silent.read() == b""
        with contextlib.suppress(ConnectionError):
            assert await dripping.read() == b""
    drops.cancel()
    assert relay.dropped["preface"] == 2
    assert not backend.count
    for writer in (silent_writer, dripping_writer):
        writer.close()


async def test_a_peer_that_falls_silent_later_is_dropped_and_one_that_speaks_is_not(relay: Relay) -> None:
    reader, writer = await enter(relay)
    other_reader, other_writer = await enter(relay)
    for one in (writer, other_writer):
        await _send(one, PREFACE)
    began = asyncio.get_running_loop().time()
    while relay.open == 2:
        await _send(other_writer, b".")
        await asyncio.sleep(0.05)
        assert asyncio.get_running_loop().time() - began < 5
    assert relay.dropped["idle"] == 1
    with contextlib.suppress(ConnectionError):
        await reader.read()
    await _send(other_writer, b"!")
    await other_reader.readuntil(b"!")
    for one in (writer, other_writer):
        one.close()


async def test_a_flood_of_connections_leaves_room_for_others(relay: Relay) -> None:
    relay.config = VsockConfig(cids=(HOST, OTHER), connections=8, connections_per_cid=6, preface_s=2.0)
    flood = [await enter(relay, OTHER) for _ in range(200)]
    assert relay.open == 6
    reader, writer = await enter(relay, HOST)
    await _send(writer, PREFACE)
    assert await reader.readexactly(len(PREFACE)) == PREFACE
    silent, last = await enter(relay, HOST), await enter(relay, HOST)
    assert relay.dropped["full_cid"] == 194
    assert relay.dropped["full"] == 1
    for _, one in [*flood, (reader, writer), last]:
        one.close()
    await until(lambda: relay.open == 1)  # the one that never spoke and never left
    await until(lambda: relay.open == 0)  # and its time is over too
    silent[1].close()


async def test_a_slow_reader_costs_two_buffers_and_holds_nobody_up(relay: Relay, backend: Backend) -> None:
    backend.echo = False
    _, writer = await enter(relay)
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport of a stream is one that reads
    await _send(writer, PREFACE)
    await until(lambda: len(backend.streams) == 1)
    _, inside = backend.streams[0]
    sent = 0

    async def pour() -> None:
        nonlocal sent
        while True:
            inside.write(bytes(BUFFER))
            await inside.drain()
            sent += BUFFER

    pouring = asyncio.create_task(pour())
    await asyncio.sleep(0.2)
    before = sent
    await asyncio.sleep(0.1)
    assert sent == before, "the backend was not held back"
    pair = next(iter(relay._pairs))
    assert 0 < pair.waiting <= BUFFER + (256 << 10), "one read more than the buffer at most"
    # Kernel buffers of two sockets, ours, and what the backend's own stream keeps.
    assert sent < 4 << 20
    backend.echo = True
    reader, other = await enter(relay)
    await _send(other, PREFACE)
    assert await reader.readexactly(len(PREFACE)) == PREFACE
    pouring.cancel()
    writer.transport.abort()
    other.close()


async def test_a_backend_that_is_gone_costs_the_peer_its_connection_alone(tmp_path: Path) -> None:
    relay = Relay(str(tmp_path / "nobody"), QUICK)
    reader, writer = await enter(relay)
    await _send(writer, PREFACE)
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    await until(lambda: relay.open == 0)
    assert relay.dropped["backend"] == 1
    writer.close()
    await relay.close()


async def test_a_peer_that_breaks_off_takes_its_backend_with_it(relay: Relay, backend: Backend) -> None:
    backend.echo = False
    _, writer = await enter(relay)
    await _send(writer, PREFACE)
    await until(lambda: len(backend.streams) == 1)
    writer.transport.abort()
    await until(lambda: relay.open == 0)
    inside, _ = backend.streams[0]
    with contextlib.suppress(ConnectionError):
        await inside.read()


async def test_nothing_is_left_of_thousands_of_connections(relay: Relay) -> None:
    async def once(word: bytes) -> None:
        reader, writer = await enter(relay)
        with contextlib.suppress(ConnectionError):
            await _send(writer, word)
            await reader.read(1)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    await once(PREFACE)
    descriptors, memory = len(os.listdir("/proc/self/fd")), _resident()
    for _ in range(500):
        await asyncio.gather(once(b"x"), once(b"PRI"[:2] + b"!"), once(PREFACE), once(PREFACE + b"y"))
    await until(lambda: relay.open == 0)
    await asyncio.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
    assert _resident() - memory < 8 << 20
    assert relay.accepted == 2_001


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _vsock() -> str:
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as one:
            one.bind((ANY_CID, ANY_PORT))
    except OSError as error:
        return f"vsock: {error.strerror}"
    return ""


needs_vsock = pytest.mark.skipif(bool(_vsock()), reason=_vsock() or "there")


@needs_vsock
async def test_it_listens_for_real(relay: Relay) -> None:
    address = relay.listen(VsockAddress(ANY_CID, ANY_PORT))
    assert address.port not in (0, ANY_PORT)
    with pytest.raises(StoragedError, match="Address already in use"):
        relay.listen(address)
    relay.stop_listening()
    relay.listen(address)


@needs_vsock
async def test_a_daemon_on_vsock_alone_has_a_socket_that_nobody_else_enters(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    server = Server(guest.service)
    await server.start([VsockAddress(ANY_CID, ANY_PORT)])
    try:
        relay = server.relay
        assert relay is not None
        directory = Path(relay.backend).parent
        assert directory.parent == tmp_path
        assert os.stat(directory).st_mode & 0o777 == 0o700
        assert os.stat(relay.backend).st_mode & 0o777 == 0o600
    finally:
        await server.stop(0.1)
    assert os.listdir(tmp_path) == [os.path.basename(guest.path)]


@contextlib.asynccontextmanager
async def front(relay: Relay, path: Path, cid: int) -> AsyncIterator[str]:
    """A unix socket whose every connection reaches the relay as one of `cid`: for a gRPC client."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        listener.setblocking(False)
        loop = asyncio.get_running_loop()

        async def take() -> None:
            while True:
                peer, _ = await loop.sock_accept(listener)
                relay.adopt(peer, cid)

        taking = asyncio.create_task(take())
        try:
            yield f"unix:{path}"
        finally:
            taking.cancel()


async def test_grpc_through_the_relay_while_others_misbehave(guest: Guest, tmp_path: Path) -> None:
    relay = Relay(guest.path, VsockConfig(cids=(HOST, OTHER), connections=40, connections_per_cid=32, preface_s=1))
    slow = [await enter(relay, OTHER) for _ in range(100)]
    for _, writer in slow[:16]:
        await _send(writer, PREFACE)  # and nothing more: half open for gRPC
    for _, writer in slow[16:32]:
        await _send(writer, PREFACE + os.urandom(4096))  # no HTTP/2 at all
    async with front(relay, tmp_path / "f", HOST) as target, grpc.aio.insecure_channel(target) as channel:
        stub: vm_guest_pb2_grpc.MaitredAsyncStub = vm_guest_pb2_grpc.MaitredStub(channel)
        for _ in range(100):
            assert (await stub.GetResizeStatus(EMPTY, timeout=2)).current_size
    for _, writer in slow:
        writer.close()
    await relay.close()


async def test_grpc_from_a_context_id_that_is_not_allowed_gets_no_answer(guest: Guest, tmp_path: Path) -> None:
    relay = Relay(guest.path)
    async with front(relay, tmp_path / "f", OTHER) as target, grpc.aio.insecure_channel(target) as channel:
        stub: vm_guest_pb2_grpc.MaitredAsyncStub = vm_guest_pb2_grpc.MaitredStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetResizeStatus(EMPTY, timeout=2)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert relay.dropped["cid"] >= 1
    assert relay.accepted == 0


async def test_a_connection_that_never_begins_http2_is_ended_by_the_server_too(tmp_path: Path) -> None:
    guest = Guest(tmp_path)
    guest.limits = LimitsConfig(handshake_s=0.3)
    await guest.start()
    try:
        reader, writer = await asyncio.open_unix_connection(guest.path)
        await _send(writer, PREFACE)
        async with asyncio.timeout(5):
            while await reader.read(4096):
                pass
        writer.close()
    finally:
        await guest.stop()


async def test_outward_a_client_finds_the_far_side(guest: Guest, tmp_path: Path) -> None:
    async def connect() -> socket.socket:
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        await asyncio.get_running_loop().sock_connect(one, guest.path)
        return one

    way = Outward(connect)
    way.open(str(tmp_path / "out"))
    async with grpc.aio.insecure_channel(f"unix:{tmp_path / 'out'}") as channel:
        stub: vm_guest_pb2_grpc.MaitredAsyncStub = vm_guest_pb2_grpc.MaitredStub(channel)
        assert (await stub.GetResizeStatus(EMPTY, timeout=5)).current_size
    await way.close()
    assert not way._carrying


@pytest.mark.parametrize("rounds", range(10))
async def test_outward_closed_at_any_moment_of_a_connection_keeps_none(tmp_path: Path, rounds: int) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)

    async def connect() -> socket.socket:
        await asyncio.sleep(0)
        return ours

    before = set(os.listdir("/proc/self/fd"))
    way = Outward(connect)
    way.open(str(tmp_path / "out"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, theirs:
        client.connect(str(tmp_path / "out"))
        for _ in range(rounds):
            await asyncio.sleep(0)
        kept = str(client.fileno())
        await way.close()
        assert not way._carrying
        with ours:
            assert set(os.listdir("/proc/self/fd")) - before == {kept}
        client.settimeout(1)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
