"""A peer that floods, hangs or drips costs a bounded amount, and the host is served meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from storaged.config import LimitsConfig, VsockConfig
from storaged.rpc.proto import storaged_v1_pb2, vm_guest_pb2, vm_guest_pb2_grpc
from storaged.rpc.vsock import PREFACE
from storaged.units import KIB, MIB
from tests.rpc.conftest import EMPTY

ROOT = Path(__file__).resolve().parents[2]
LIMITS, VSOCK = LimitsConfig(), VsockConfig()
MOST_GROWTH = 2 * VSOCK.connections_per_cid * LIMITS.calls_per_connection * LIMITS.message_bytes
"""Of the daemon's memory, whatever one context id does. Twice: gRPC's buffer, and the message made from it."""


class Daemon:
    """The process behind the relay."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process = subprocess.Popen([sys.executable, "-m", "tests.rpc.behind_relay", str(directory)], cwd=ROOT)
        until = time.monotonic() + 30
        while not (directory / "ready").exists():
            assert self.process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)

    def resident(self) -> int:
        with open(f"/proc/{self.process.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def target(self, peer: str) -> str:
        return f"unix:{self.directory / peer}"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    one = Daemon(tmp_path)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait(10)


class Host:
    """The host, who goes on asking; how long each answer took."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.seconds: list[float] = []
        self.most_memory = 0

    async def __aenter__(self) -> Host:  # noqa: PYI034  # said once is enough
        self._channel = grpc.aio.insecure_channel(self._daemon.target("host"))
        self._stub: vm_guest_pb2_grpc.MaitredAsyncStub = vm_guest_pb2_grpc.MaitredStub(self._channel)
        await self._stub.GetResizeStatus(EMPTY, timeout=10)
        self.before = (self._daemon.resident(), self._daemon.descriptors())
        self._task = asyncio.create_task(self._ask())
        return self

    async def _ask(self) -> None:
        while True:
            began = time.monotonic()
            await self._stub.GetResizeStatus(EMPTY, timeout=10)  # what fails here fails the test
            self.seconds.append(time.monotonic() - began)
            self.most_memory = max(self.most_memory, self._daemon.resident())
            await asyncio.sleep(0.01)

    async def __aexit__(self, *_: object) -> None:
        failed = self._task.done()
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        assert not failed
        await self._channel.close()

    def report(self, name: str) -> int:
        """Bytes the daemon grew by at worst; says so, with the host's slowest answer."""
        grown = self.most_memory - self.before[0]
        slowest = max(self.seconds)
        print(  # noqa: T201  # the figures; pytest -s shows them
            f"{name}: +{grown / MIB:.1f} MiB, {len(self.seconds)} answers to the host, slowest {slowest * 1e3:.0f} ms"
        )
        return grown


def _connect(daemon: Daemon) -> socket.socket:
    one = socket.socket(socket.AF_UNIX)
    one.connect(str(daemon.directory / "other"))
    one.settimeout(5)
    return one


async def test_silent_and_half_open_connections(daemon: Daemon) -> None:
    async with Host(daemon) as host:
        held = []
        for number in range(500):
            one = _connect(daemon)
            with contextlib.suppress(OSError):
                one.sendall(b"" if number % 2 else PREFACE)
            held.append(one)
            await asyncio.sleep(0)
        await asyncio.sleep(0.5)
        assert daemon.descriptors() - host.before[1] <= 4 * VSOCK.connections_per_cid
        assert len(host.seconds) > 10
        assert host.report("500 half-open connections") < 16 * MIB
        for one in held:
            one.close()


async def test_connections_that_come_and_go(daemon: Daemon) -> None:
    async with Host(daemon) as host:
        for number in range(5000):
            with _connect(daemon) as one, contextlib.suppress(OSError):
                one.sendall(PREFACE[: number % 30] + b"\0")
            if number % 10 == 0:
                await asyncio.sleep(0)
        await asyncio.sleep(0.3)
        assert daemon.descriptors() - host.before[1] <= 4
        assert host.report("5,000 connections that come and go") < 16 * MIB


def _channels(daemon: Daemon, count: int) -> list[grpc.aio.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    return [grpc.aio.insecure_channel(daemon.target("other"), options=options) for _ in range(count)]


async def test_calls_without_end_and_as_large_as_they_may_be(daemon: Daemon) -> None:
    most = LIMITS.message_bytes
    padding = b"\xfa\x07" + _varint(most - 100) + bytes(most - 100)  # an unknown field
    channels = _channels(daemon, 24)  # more than may come in
    ends: Counter[str] = Counter()

    async def one(call: Any) -> None:
        try:
            await call(padding, timeout=20)
        except grpc.aio.AioRpcError as error:
            ends[error.code().name] += 1
        else:
            ends["OK"] += 1

    async with Host(daemon) as host:
        for _ in range(3):
            calls: list[Any] = [channel.unary_unary("/vm_tools.Maitred/GetResizeBounds") for channel in channels]
            await asyncio.gather(*(one(call) for call in calls for _ in range(160)))
        assert sum(ends.values()) == 24 * 160 * 3
        assert set(ends) <= {"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "CANCELLED"}, ends
        assert ends["OK"]
        assert host.report(f"11,520 calls of {most // KIB} KiB") < MOST_GROWTH
    for channel in channels:
        await channel.close()


async def test_watchers_that_never_read(daemon: Daemon) -> None:
    channels = _channels(daemon, 8)
    request = storaged_v1_pb2.WatchRequest(min_interval_s=0.2).SerializeToString()
    async with Host(daemon) as host:
        calls: list[Any] = [channel.unary_stream("/storaged.v1.Storage/Watch") for channel in channels]
        watches = [call(request, timeout=20) for call in calls for _ in range(24)]
        ends: Counter[str] = Counter()

        async def first(watch: Any) -> None:
            try:
                await watch.read()
                ends["served"] += 1
            except grpc.aio.AioRpcError as error:
                ends[error.code().name] += 1

        await asyncio.gather(*(first(watch) for watch in watches))
        assert ends["served"] == LIMITS.streams
        assert ends["RESOURCE_EXHAUSTED"] == len(watches) - ends["served"]
        await asyncio.sleep(1)
        assert host.report("192 watchers that never read") < 16 * MIB
        for watch in watches:
            watch.cancel()
    for channel in channels:
        await channel.close()


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def test_the_padding_is_a_message() -> None:
    data = b"\xfa\x07" + _varint(300) + bytes(300)
    assert vm_guest_pb2.ResizeFilesystemRequest.FromString(data).SerializeToString() == data
