"""How soon it serves and how much memory it takes, against a bare grpc.aio server in Python."""

from __future__ import annotations

import compileall
import time
from pathlib import Path

import lab
import storaged
from benchmarks.measure import Goal, Row, in_turns, say
from benchmarks.process import Memory, Server, children, daemon_command, empty_command, memory
from benchmarks.scrape import scrape
from lab.loop import Guest
from lab.simulated import free_port
from storaged.core.model import Config
from storaged.rpc.proto import common_pb2, vm_guest_pb2, vm_guest_pb2_grpc
from storaged.units import GIB

SECTION = "footprint"
PEER = "empty grpc.aio server"
DISK = 8 * GIB
CALLS = 1000
SCRAPES = 500
SERVING_MS, RESIDENT_MB = 300.0, 45.0
SETTLES_S = 1.0
"""After this the resize child is there too."""


def measure(directory: Path, *, quick: bool) -> list[Row]:
    """The rows of this section; `directory` is for their disks."""
    compiled()
    connectable = Row(SECTION, "exec to connectable", "ms", PEER)
    serving = Row(SECTION, "exec to first answer", "ms", PEER, Goal(SERVING_MS))
    states = ("started", f"after {CALLS} calls")
    resident = [Row(SECTION, f"daemon resident, {state}", "MB", PEER, Goal(RESIDENT_MB)) for state in states]
    share = [Row(SECTION, f"daemon PSS, {state}", "MB", PEER) for state in states]
    scraped = Row(SECTION, f"daemon resident, {SCRAPES} scrapes of its metrics", "MB", goal=Goal(RESIDENT_MB))
    child = [Row(SECTION, f"resize child {what}", "MB") for what in ("resident", "PSS")]
    guest = Guest(directory / "footprint", DISK)

    def ours(keep: bool) -> None:
        socket = directory / "ours.sock"
        command = daemon_command(socket, directory / "state", guest.mountpoint)
        with Server(command, socket, directory / "ours.log") as server:
            if not keep:
                return
            connectable.ours.append(server.connectable_ms)
            serving.ours.append(server.serving_ms)
            for row, seen in zip((*resident, *share), _memories(server), strict=True):
                row.ours.append(seen)
            for pid in children(server.pid):
                found = memory(pid)
                child[0].ours.append(found.resident)
                child[1].ours.append(found.proportional)

    def theirs(keep: bool) -> None:
        socket = directory / "theirs.sock"
        with Server(empty_command(socket), socket, directory / "theirs.log") as server:
            if not keep:
                return
            connectable.peer.append(server.connectable_ms)
            serving.peer.append(server.serving_ms)
            for row, seen in zip((*resident, *share), _memories(server), strict=True):
                row.peer.append(seen)

    try:
        ours(False)  # noqa: FBT003  # the first start finds nothing in the page cache
        theirs(False)  # noqa: FBT003
        for index in range(3 if quick else 10):
            say(f"start and memory, run {index + 1}")
            in_turns(index, lambda: ours(True), lambda: theirs(True))  # noqa: FBT003
            scraped.ours.append(_with_metrics(directory, guest))
    finally:
        guest.close()
    return [connectable, serving, *resident, scraped, *share, *child]


def _with_metrics(directory: Path, guest: Guest) -> float:
    """Resident after all the calls, with metrics that were scraped many times."""
    port = free_port()
    socket = directory / "ours.sock"
    command = [
        *daemon_command(socket, directory / "state", guest.mountpoint),
        *("--metrics", f"127.0.0.1:{port}"),
    ]
    with Server(command, socket, directory / "ours.log") as server:
        time.sleep(SETTLES_S)
        with server.stub() as stub:
            _calls(stub)
        for _ in range(SCRAPES):
            scrape(port)
        return memory(server.pid).resident


def compiled() -> None:
    """Have the bytecode there, as an installed package has."""
    for package in (storaged, lab):
        compileall.compile_dir(package.__path__[0], quiet=1)


def _memories(server: Server) -> tuple[float, float, float, float]:
    """Resident before and after the calls, then the proportional share before and after."""
    time.sleep(SETTLES_S)
    before = memory(server.pid)
    with server.stub() as stub:
        _calls(stub)
    after: Memory = memory(server.pid)
    return before.resident, after.resident, before.proportional, after.proportional


def _calls(stub: vm_guest_pb2_grpc.MaitredStub) -> None:
    """A mix of everything a host asks."""
    empty = common_pb2.EmptyMessage()
    free = stub.GetAvailableSpace(empty, timeout=20).available_space + Config().reserve
    # The free space goes up and down, so that the balloon moves; never so low that the machine's limits change.
    reports = [
        vm_guest_pb2.UpdateStorageBalloonRequest(state=vm_guest_pb2.DISK_NORMAL, free_space_bytes=max(free - less, 0))
        for less in (0, GIB)
    ]
    for number in range(CALLS // 5):
        stub.GetResizeStatus(empty, timeout=20)
        stub.GetAvailableSpace(empty, timeout=20)
        stub.GetKernelVersion(empty, timeout=20)
        stub.GetResizeBounds(empty, timeout=20)
        stub.UpdateStorageBalloon(reports[number % 2], timeout=20)
