"""A controller with agents that really answer over gRPC, on a pool whose free space the test decides."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest

from lab.agent import agent, serve
from storaged.addresses import TcpAddress, UnixAddress
from storaged.errors import Kind, StoragedError
from storaged.host import encode, events, members, shares
from storaged.host.api import HostApi
from storaged.host.config import Discovery, GuestConfig, HostConfig, PoolConfig, Tls
from storaged.host.controller import Controller
from storaged.host.guests import GuestClient
from storaged.host.leases import Answer
from storaged.host.levels import Level
from storaged.host.listener import Listener, peer_name
from storaged.host.model import Presence, State, books, established
from storaged.host.remembered import Remembered
from storaged.host.service import Host
from storaged.host.settings import Resizing, Sharing
from storaged.host.watch import PoolError, Watcher
from storaged.rpc.proto import common_pb2, vm_guest_pb2, vm_host_pb2_grpc
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.units import GIB, MIB

FAST = Sharing(answer_s=0.6, retry_first_s=0.1, retry_most_s=0.2, dwell_s=0.2)


async def until(true: Callable[[], bool], why: Callable[[], object] = str, within_s: float = 8.0) -> float:
    """Wait until it is true; how long that took."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() < begun + within_s, why()
        await asyncio.sleep(0.01)
    return time.monotonic() - begun


class Source:
    """Free space as the test says; None cannot be read."""

    def __init__(self, free: int | None) -> None:
        self.value = free
        self.hangs: threading.Event | None = None

    def free(self) -> int:
        if self.hangs is not None:
            self.hangs.wait(20)
        if self.value is None:
            raise PoolError("pool: Input/output error")
        return self.value

    def total(self) -> int:
        return 400 * GIB


class Bench:
    """A controller and its guests."""

    def __init__(
        self,
        directory: Path,
        free: int | None,
        names: tuple[str, ...],
        pid_files: dict[str, Path],
        book: Path | None = None,
    ) -> None:
        self.source = Source(free)
        self.agents = {name: agent() for name in names}
        self.directory = directory
        self.broken: list[str] = []
        guests = []
        for name in names:
            image = directory / f"{name}.img"
            with image.open("wb") as file:
                file.truncate(100 * GIB)
            socket = UnixAddress(str(directory / f"{name}.sock"))
            pid_file = str(pid_files.get(name, ""))
            guests.append(GuestConfig(name, socket, str(image), "p", pid_file=pid_file))
        self.controller = Controller(
            PoolConfig("p", str(directory)), guests, FAST, Watcher(self.source),
            lambda guest: GuestClient(guest.name, guest.address, trusted=True),
            remembered=None if book is None else Remembered(str(book)),
        )  # fmt: skip
        self.controller.observe(self._watch)

    def _watch(self, state: State) -> None:
        if state.holds and not established(state) and state.pool.whole:
            self.broken.append(str(books(state)))

    async def until(self, true: Callable[[], bool]) -> float:
        """As below, with what the controller believes when it never comes true."""
        return await until(true, lambda: self.controller.state)

    def bound(self, name: str) -> bool:
        guest = self.controller.state.guests.get(name)
        return guest is not None and guest.lease.bound

    def allowed(self) -> int:
        return sum(each.allowed or 0 for each in self.agents.values())


@contextlib.asynccontextmanager
async def running(
    directory: Path,
    free: int | None,
    *names: str,
    hanging: tuple[str, ...] = (),
    pid_files: dict[str, Path] | None = None,
    book: Path | None = None,
) -> AsyncIterator[Bench]:
    bench = Bench(directory, free, names, pid_files or {}, book)
    for name in hanging:
        bench.agents[name].hangs = True
    servers = [await serve(each, directory / f"{name}.sock") for name, each in bench.agents.items()]
    task = asyncio.create_task(bench.controller.run())
    try:
        yield bench
    finally:
        for each in bench.agents.values():
            each.hangs = False
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        for server in servers:
            await server.stop(None)
    assert not bench.broken


async def test_what_all_may_write_is_less_than_what_is_there(tmp_path: Path) -> None:
    async with running(tmp_path, 40 * GIB, "a", "b", "c") as bench:
        await bench.until(lambda: all(bench.bound(name) for name in "abc"))
        await bench.until(lambda: bench.allowed() >= 12 * GIB)
        assert bench.allowed() <= 39 * GIB
        assert all(state == vm_guest_pb2.DISK_NORMAL for state, _ in bench.agents["a"].told)
        bench.source.value = 3 * GIB // 2
        await bench.until(lambda: bench.allowed() <= GIB // 2)
        assert bench.agents["a"].told[-1][0] == vm_guest_pb2.DISK_LOW
        bench.source.value = 60 * GIB
        await bench.until(lambda: bench.allowed() >= 15 * GIB)


async def test_a_guest_that_hangs_holds_up_nobody(tmp_path: Path) -> None:
    async with running(tmp_path, 40 * GIB, "a", "b", "c", hanging=("b",)) as bench:
        took_s = await bench.until(lambda: bench.bound("a") and bench.bound("c"))
        assert took_s < FAST.answer_s + 1
        await bench.until(lambda: bench.controller.state.guests["b"].failures > 1)
        assert not bench.bound("b")
        assert bench.agents["b"].told == []
        assert bench.agents["b"].most_running == 1, "one call in flight"
        bench.agents["b"].hangs = False
        await bench.until(lambda: bench.bound("b"))


async def test_a_guest_that_begins_to_hang_keeps_its_grant(tmp_path: Path) -> None:
    async with running(tmp_path, 40 * GIB, "a", "b") as bench:
        await bench.until(lambda: bench.bound("a") and bench.bound("b") and bench.allowed() > 16 * GIB)
        bench.agents["b"].hangs = True
        kept = bench.agents["b"].allowed or 0
        bench.source.value = kept + 2 * GIB
        await bench.until(lambda: bench.controller.state.guests["b"].presence is Presence.HANGING)
        await bench.until(lambda: (bench.agents["a"].allowed or 0) <= GIB)
        assert bench.controller.state.guests["b"].left >= kept


async def test_a_pool_that_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, 40 * GIB, "a") as bench:
        await bench.until(lambda: bench.bound("a") and bench.allowed() > 4 * GIB)
        bench.source.value = None
        await asyncio.sleep(0.3)
        told = len(bench.agents["a"].told)
        await asyncio.sleep(1.5)
        assert len(bench.agents["a"].told) == told
        bench.source.value = 2 * GIB
        await bench.until(lambda: bench.allowed() <= GIB)


async def test_a_balloon_that_fails_is_tried_again(tmp_path: Path) -> None:
    async with running(tmp_path, 40 * GIB, "a") as bench:
        bench.agents["a"].refuses = True
        await bench.until(lambda: len(bench.agents["a"].told) >= 2)
        assert not bench.bound("a")
        bench.agents["a"].refuses = False
        await bench.until(lambda: bench.bound("a"))


@pytest.fixture
def machine() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for a guest's machine."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


async def test_an_error_that_nobody_foresaw_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    tell = GuestClient.set_available

    async def fails_twice(client: GuestClient, size: int, level: Level, within_s: float) -> tuple[Answer, str]:
        tries.append(size)
        if len(tries) < 3:
            raise ZeroDivisionError
        return await tell(client, size, level, within_s)

    monkeypatch.setattr(GuestClient, "set_available", fails_twice)
    async with running(tmp_path, 40 * GIB, "a") as bench:
        await bench.until(lambda: bench.bound("a"))


async def test_a_pool_that_hangs_stops_neither_calls_nor_the_end(tmp_path: Path) -> None:
    async with running(tmp_path, 40 * GIB, "a") as bench:
        await bench.until(lambda: bench.bound("a"))
        bench.source.hangs = threading.Event()
        try:
            await asyncio.sleep(1.2)  # the next look hangs by now
            told = len(bench.agents["a"].told)
            bench.controller.ready("a")
            await bench.until(lambda: len(bench.agents["a"].told) > told)
        finally:
            bench.source.hangs.set()


async def test_an_agent_that_says_all_the_time_that_it_starts_costs_a_line_and_a_step_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(members, "READY_S", 0.2)
    starts: list[events.GuestRestarted] = []
    step = shares.HANDLERS[events.GuestRestarted]

    def counted(state: State, event: events.GuestRestarted) -> shares.Result:
        starts.append(event)
        return step(state, event)

    monkeypatch.setitem(shares.HANDLERS, events.GuestRestarted, counted)
    async with running(tmp_path, 40 * GIB, "a") as bench:
        await bench.until(lambda: bench.bound("a"))
        with caplog.at_level("INFO", "storaged.host.members"):
            for _ in range(1000):
                bench.controller.ready("a")
                await asyncio.sleep(0.001)
            said = [record.getMessage() for record in caplog.records if "is ready" in record.getMessage()]
            assert said == ["a is ready"], "the rest is one line every ten seconds"
            assert 2 <= len(starts) <= 20
            # The last start is never one of those left out.
            told = len(bench.agents["a"].told)
            await asyncio.sleep(0.5)
            starts.clear()
            bench.controller.ready("a")
            bench.controller.ready("a")
            await bench.until(lambda: len(starts) == 2)
            await bench.until(lambda: len(bench.agents["a"].told) > told)


async def test_what_an_ended_machine_had_goes_to_the_others(tmp_path: Path, machine: subprocess.Popen[bytes]) -> None:
    pid_file = tmp_path / "b.pid"
    pid_file.write_text(f"{machine.pid}\n")
    async with running(tmp_path, 20 * GIB, "a", "b", pid_files={"b": pid_file}) as bench:
        await bench.until(lambda: bench.bound("a") and bench.bound("b"))
        await bench.until(lambda: bench.allowed() > 8 * GIB)
        had = bench.agents["a"].allowed or 0
        machine.kill()
        machine.wait()
        await bench.until(lambda: bench.controller.state.guests["b"].presence is Presence.GONE)
        await bench.until(lambda: (bench.agents["a"].allowed or 0) > had)


@pytest.mark.parametrize("announced", [False, True])
async def test_a_guest_that_cannot_be_called_counts_all_the_same(
    tmp_path: Path, machine: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture, announced: bool
) -> None:
    pid_file, authority = tmp_path / "b.pid", tmp_path / "ca.pem"
    async with running(tmp_path, 40 * GIB, "a", "b", pid_files={"b": pid_file}) as bench:
        controller, connect = bench.controller, bench.controller._members._connect
        controller._members._connect = lambda guest: (
            connect(guest)
            if guest.name == "a" or authority.exists()
            else GuestClient(guest.name, TcpAddress("192.0.2.1", 8888), Tls(str(authority), "none", "none"))
        )
        await bench.until(lambda: bench.bound("a"))
        with caplog.at_level("INFO", "storaged.host.members"):
            pid_file.write_text(f"{machine.pid}\n")
            if announced:
                controller.ready("b")
            await bench.until(lambda: "b" in controller.state.guests)
            assert controller.state.guests["b"].runs
            assert not established(controller.state), "nothing bounds it"
            with (tmp_path / "b.img").open("r+b") as image:
                image.write(bytes(64 * MIB))
            await bench.until(lambda: books(controller.state).unbound > 0)  # what it is seen to write is set aside
            if announced:
                controller.ready("b")
            await asyncio.sleep(2.2)  # two more tries
            assert bench.bound("a")
            assert not bench.bound("b")
            told = encode.guest(controller.members["b"], controller, 0.0, None)
            assert not told.resizable
            assert "ca.pem: No such file" in told.not_resizable_reason
            authority.touch()
            await bench.until(lambda: bench.bound("a") and bench.bound("b"))
        said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("b can")]
        assert len(said) == 2
        assert f"b cannot be called: TLS file {authority}: No such file" in said[0]


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("ipv4:10.0.0.5:4711", "ipv4:10.0.0.5"),
        ("ipv6:%5B::1%5D:4711", "ipv6:::1"),
        ("unix:", "unix:"),
        ("vsock:7", "vsock:7"),
    ],
)
def test_a_peer_by_name(peer: str, name: str) -> None:
    assert peer_name(peer) == name


async def test_a_guest_announces_itself(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(b"")
    os.truncate(image, GIB)
    member = agent()
    server = await serve(member, tmp_path / "a.sock")
    config = HostConfig(
        (PoolConfig("p", str(tmp_path)),),
        (GuestConfig("a", UnixAddress(str(tmp_path / "a.sock")), str(image), "p", peer="ipv4:127.0.0.1"),),
        (TcpAddress("127.0.0.1", 0),),
        resize=Resizing(state_dir=f"{tmp_path}/state"),
    )
    host = Host(config)
    task = asyncio.create_task(host.run())
    try:
        await until(lambda: member.allowed is not None)
        told = len(member.told)
        address = host.listening[0]
        assert isinstance(address, TcpAddress)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{address.port}") as channel:
            await vm_host_pb2_grpc.StartupListenerStub(channel).VmReady(common_pb2.EmptyMessage())
        await until(lambda: len(member.told) > told)  # a fresh agent is told at once, whatever it was told before
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await server.stop(None)


async def test_a_guest_that_nobody_configured_is_found(tmp_path: Path) -> None:
    with (tmp_path / "127.0.0.1.img").open("wb") as file:
        file.truncate(GIB)
    member = agent()
    server = await serve(member, tmp_path / "127.0.0.1.sock")
    discovery = Discovery(f"unix:{tmp_path}/{{host}}.sock", f"{tmp_path}/{{host}}.img", "p")
    resize = Resizing(state_dir=f"{tmp_path}/state")
    listen = (TcpAddress("127.0.0.1", 0),)
    host = Host(HostConfig((PoolConfig("p", str(tmp_path)),), (), listen, discovery=discovery, resize=resize))
    task = asyncio.create_task(host.run())
    try:
        await until(lambda: bool(host.listening))
        address = host.listening[0]
        assert isinstance(address, TcpAddress)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{address.port}") as channel:
            await vm_host_pb2_grpc.StartupListenerStub(channel).VmReady(common_pb2.EmptyMessage())
        await until(lambda: member.allowed is not None)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await server.stop(None)


@pytest.mark.parametrize("peer", ["unix:", "ipv4:../../etc", "vsock:1/..", "vsock:", "ipv6:"])
def test_a_caller_without_a_place_of_its_own_is_no_guest(peer: str) -> None:
    assert Discovery("tcp:{host}:8888", "/vms/{host}.img", "p").guest(peer) is None


async def test_a_stranger_is_turned_away(tmp_path: Path) -> None:
    listener = Listener(lambda _: False, Tls())
    await listener.start([UnixAddress(str(tmp_path / "l.sock"))])
    try:
        async with grpc.aio.insecure_channel(f"unix:{tmp_path / 'l.sock'}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await vm_host_pb2_grpc.StartupListenerStub(channel).VmReady(common_pb2.EmptyMessage())
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    finally:
        await listener.stop()
    assert not (tmp_path / "l.sock").exists()


async def test_an_operator_gives_a_fenced_guest_its_share_again(tmp_path: Path) -> None:
    async with running(tmp_path, 40 * GIB, "a", "b") as bench:
        await bench.until(lambda: bench.bound("a") and bench.bound("b"))
        controller, api = bench.controller, HostApi([bench.controller])
        guests = dict(controller.state.guests)
        guests["a"] = replace(guests["a"], fenced_until=time.monotonic() + 500, overruns=3)
        controller.state = replace(controller.state, guests=guests)
        await bench.until(lambda: bench.agents["a"].allowed == 0)
        told = next(guest for guest in (await api.ListGuests(pb.ListGuestsRequest(), None)).guests if guest.name == "a")
        assert 400 < told.fenced_for_s <= 500
        assert told.overruns == 3
        answer = await api.LiftFence(pb.LiftFenceRequest(guest="a"), None)
        assert not answer.guest.HasField("fenced_for_s")
        await bench.until(lambda: (bench.agents["a"].allowed or 0) > GIB)
        with pytest.raises(StoragedError, match="a is not fenced") as refused:
            await api.LiftFence(pb.LiftFenceRequest(guest="a"), None)
        assert refused.value.kind is Kind.PRECONDITION
        with pytest.raises(StoragedError, match="no guest is called 'nobody'") as unknown:
            await api.LiftFence(pb.LiftFenceRequest(guest="nobody"), None)
        assert unknown.value.kind is Kind.NOT_FOUND


async def test_an_image_that_was_made_larger_by_hand_counts_as_large_as_it_is(tmp_path: Path) -> None:
    async with running(tmp_path, 400 * GIB, "a") as bench:
        await bench.until(lambda: bench.bound("a"))
        assert bench.controller.state.guests["a"].size == 100 * GIB
        for size in (150 * GIB, 120 * GIB):
            os.truncate(tmp_path / "a.img", size)
            await bench.until(lambda size=size: bench.controller.state.guests["a"].size == size)  # type: ignore[misc]


async def test_what_was_granted_is_known_after_a_restart_though_nobody_answers(tmp_path: Path) -> None:
    async with running(tmp_path, 40 * GIB, "a", "b", book=tmp_path / "state" / "grants") as bench:
        await bench.until(lambda: bench.bound("a") and bench.bound("b") and bench.allowed() > 16 * GIB)
        await asyncio.sleep(FAST.poll_most_s)  # until what was under way has settled
        kept = bench.agents["b"].allowed or 0
        assert kept > 4 * GIB
    async with running(tmp_path, 40 * GIB, "a", "b", hanging=("b",), book=tmp_path / "state" / "grants") as bench:
        await bench.until(lambda: bench.bound("a") and bench.controller.state.guests["b"].failures > 1)
        assert books(bench.controller.state).unbound >= kept
        assert (bench.agents["a"].allowed or 0) <= 39 * GIB - kept
        await asyncio.sleep(2)
        assert (bench.agents["a"].allowed or 0) <= 39 * GIB - kept, "also later"


async def test_what_cannot_be_written_down_is_not_granted(tmp_path: Path) -> None:
    (tmp_path / "state").touch()  # no directory
    async with running(tmp_path, 40 * GIB, "a", book=tmp_path / "state" / "grants") as bench:
        await bench.until(lambda: "a" in bench.controller.state.guests)
        await asyncio.sleep(1)
        assert bench.agents["a"].told == []
        (tmp_path / "state").unlink()
        await bench.until(lambda: bench.bound("a"))
