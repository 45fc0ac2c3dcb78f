"""Guests on vsock, and behind a machine monitor's unix socket: calls to them, and their VmReady.

AF_VSOCK has nobody to talk to here, so its connections are unix sockets with the context id told; listening is real.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from lab.agent import Agent, agent, serve
from storaged.addresses import ANY_CID, HybridAddress, VsockAddress, parse_guest_address
from storaged.errors import ConfigError, StoragedError
from storaged.host import guests
from storaged.host.config import Discovery, GuestConfig, HostConfig, PoolConfig, Tls
from storaged.host.guests import GuestClient, NotTold
from storaged.host.levels import Level
from storaged.host.listener import Listener
from storaged.host.service import Host
from storaged.host.settings import Resizing
from storaged.rpc.outward import Connect
from storaged.rpc.proto import common_pb2, vm_host_pb2_grpc
from storaged.units import GIB, MIB
from tests.host.test_controller import FAST, until
from tests.rpc.test_vsock import front, needs_vsock


class Monitor:
    """As Firecracker, cloud-hypervisor and vhost-device-vsock do: a port by name, then bytes both ways."""

    def __init__(self, path: Path, ports: dict[int, Path]) -> None:
        self.path = path
        self.ports = ports
        self.answer = b"OK 1073741824\n"
        self.asked: list[bytes] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._take, self.path)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        line = await reader.readline()
        self.asked.append(line)
        port = int(line.removeprefix(b"CONNECT "))
        if port not in self.ports:
            writer.close()
            return
        inner_reader, inner = await asyncio.open_unix_connection(self.ports[port])
        self._writers.append(inner)
        for part in (self.answer[:3], self.answer[3:]):  # as it may come
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        for one, other in ((reader, inner), (inner_reader, writer)):
            task = asyncio.create_task(self._carry(one, other))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(4096):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    async def stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def machine(directory: Path) -> AsyncIterator[tuple[Monitor, Agent]]:
    inside = agent()
    server = await serve(inside, directory / "inside.sock")
    monitor = Monitor(directory / "vm.vsock", {8888: directory / "inside.sock"})
    await monitor.start()
    try:
        yield monitor, inside
    finally:
        await monitor.stop()
        await server.stop(0)
        await asyncio.sleep(0.05)  # transports close in the loop's next rounds


async def _ready(target: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        stub: vm_host_pb2_grpc.StartupListenerAsyncStub = vm_host_pb2_grpc.StartupListenerStub(channel)
        await stub.VmReady(common_pb2.EmptyMessage(), timeout=5)


async def test_a_guest_behind_a_monitor_is_told(tmp_path: Path) -> None:
    async with machine(tmp_path) as (monitor, inside):
        client = GuestClient("g", HybridAddress(str(monitor.path), 8888))
        await client.set_available(5 * MIB, Level.LOW, 5.0)
        assert inside.allowed == 5 * MIB
        assert set(monitor.asked) == {b"CONNECT 8888\n"}
        await client.close()


@pytest.mark.parametrize(("port", "answer"), [(9999, b""), (8888, b"NO 1\n"), (8888, b"OK " + b"1" * 99 + b"\n")])
async def test_a_monitor_that_does_not_put_through_is_certain_not_to_have(
    tmp_path: Path, port: int, answer: bytes
) -> None:
    async with machine(tmp_path) as (monitor, inside):
        monitor.answer = answer
        client = GuestClient("g", HybridAddress(str(monitor.path), port))
        with pytest.raises(NotTold) as caught:
            await client.set_available(MIB, Level.LOW, 5.0)
        assert caught.value.certain
        assert inside.allowed is None
        await client.close()


async def test_a_monitor_that_hangs_delays_nobody_longer_than_the_deadline(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.bind(str(tmp_path / "vm.vsock"))
        monitor.listen()  # and never answers
        client = GuestClient("g", HybridAddress(str(tmp_path / "vm.vsock"), 8888))
        with pytest.raises(NotTold):
            await asyncio.wait_for(client.set_available(MIB, Level.LOW, 0.3), 3)
        await asyncio.wait_for(client.close(), 3)


async def test_a_guest_on_vsock_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, dialled = agent(), []

    def stand_in(address: VsockAddress) -> Connect:
        async def connect() -> socket.socket:
            dialled.append(address)
            one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            await asyncio.get_running_loop().sock_connect(one, str(tmp_path / "inside.sock"))
            return one

        return connect

    monkeypatch.setattr(guests, "to_vsock", stand_in)
    server = await serve(inside, tmp_path / "inside.sock")
    client = GuestClient("g", VsockAddress(7, 8888))
    await client.set_available(5 * MIB, Level.NORMAL, 5.0)
    assert inside.allowed == 5 * MIB
    assert set(dialled) == {VsockAddress(7, 8888)}
    await client.close()
    await server.stop(0)
    await asyncio.sleep(0.05)  # transports close in the loop's next rounds


@needs_vsock
async def test_dialling_a_guest_that_is_not_there_is_certain() -> None:
    client = GuestClient("g", VsockAddress(4711, 8888))
    with pytest.raises(NotTold) as caught:
        await client.set_available(MIB, Level.LOW, 5.0)
    assert caught.value.certain
    await client.close()


async def test_whoever_comes_over_vsock_is_known_by_its_context_id(tmp_path: Path) -> None:
    heard: list[str] = []

    def ready(peer: str) -> bool:
        heard.append(peer)
        return peer == "vsock:7"

    listener = Listener(ready, Tls())
    doors = listener._guest_doors()
    await listener.start([])
    try:
        async with front(doors.relay, tmp_path / "seven", 7) as target:
            await _ready(target)
            await _ready(target)
        assert heard == ["vsock:7", "vsock:7"]
        async with front(doors.relay, tmp_path / "eight", 8) as target:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await _ready(target)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert heard[2:] == ["vsock:8"]
        for nobody in (0, 1, 2, -1, ANY_CID):
            one, other = socket.socketpair()
            doors.relay.adopt(one, nobody)
            assert other.recv(1) == b""
            other.close()
        assert doors.relay.dropped["cid"] == 5
    finally:
        await listener.stop()
        await asyncio.sleep(0.05)


@needs_vsock
async def test_it_listens_on_vsock_for_real() -> None:
    listener = Listener(lambda _: True, Tls())
    bound = await listener.start([VsockAddress(ANY_CID, ANY_CID)])
    assert isinstance(bound[0], VsockAddress)
    again = Listener(lambda _: True, Tls())
    with pytest.raises(StoragedError, match="cannot listen on vsock"):
        await again.start(bound)
    await again.stop()
    await listener.stop()


async def test_a_host_and_its_guest_behind_a_monitor(tmp_path: Path) -> None:
    image = tmp_path / "vm.img"
    with image.open("wb") as file:
        file.truncate(GIB)
    door = tmp_path / "vm.vsock_7777"
    door_left = socket.socket(socket.AF_UNIX)
    door_left.bind(str(door))
    door_left.close()  # as a killed owner leaves it
    async with machine(tmp_path) as (monitor, inside):
        guest = GuestConfig("vm", HybridAddress(str(monitor.path), 8888), str(image), "p", peer=f"hybrid:{door}")
        host = Host(
            HostConfig(
                (PoolConfig("p", str(tmp_path)),),
                (guest,),
                sharing=FAST,
                resize=Resizing(state_dir=f"{tmp_path}/state"),
            )
        )
        task = asyncio.create_task(host.run())
        try:
            await until(lambda: bool(inside.told))
            await until(lambda: host.controllers[0].state.guests["vm"].lease.bound)
            before = len(inside.told)
            await _ready(f"unix:{door}")  # its agent has started anew: what it was told is gone
            await until(lambda: len(inside.told) > before)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    assert not door.exists()


def test_addresses_of_guests() -> None:
    assert parse_guest_address("hybrid:/run/vm.vsock:8888") == HybridAddress("/run/vm.vsock", 8888)
    assert str(HybridAddress("/run/vm:1.vsock", 8888)) == "hybrid:/run/vm:1.vsock:8888"
    assert parse_guest_address("hybrid:/run/vm:1.vsock:8888") == HybridAddress("/run/vm:1.vsock", 8888)
    assert parse_guest_address("vsock:7:8888") == VsockAddress(7, 8888)
    for wrong in ("hybrid:", "hybrid:/run/x", "hybrid:/run/x:", "hybrid::8888", "hybrid:/x:-1", "hybrid:/x:4294967295"):
        with pytest.raises(ConfigError, match=r"hybrid:/path:PORT|is not"):
            parse_guest_address(wrong)
    with pytest.raises(ConfigError, match="nor hybrid:/path:PORT"):
        parse_guest_address("ftp:1")


def test_guests_on_vsock_are_discovered_by_their_context_id() -> None:
    discovery = Discovery("vsock:{host}:8888", "/vms/{host}.img", "p")
    found = discovery.guest("vsock:7")
    assert found is not None
    assert found.address == VsockAddress(7, 8888)
    assert found.image == "/vms/7.img"
    assert discovery.guest("ipv4:10.0.0.5") is None
