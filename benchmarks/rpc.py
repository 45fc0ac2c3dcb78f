"""How long calls take, idle and while the kernel moves data, against a bare grpc.aio server's empty method."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.measure import Goal, Row, in_turns, milliseconds, percentile, rows_of, say
from benchmarks.process import Server, empty_command
from benchmarks.resize import holed, lowest
from lab.daemon import Daemon
from lab.loop import Guest
from storaged.core.model import Config
from storaged.rpc.proto import common_pb2
from storaged.units import GIB

SECTION = "rpc"
DISK = 12 * GIB
PEER = "empty grpc.aio method"
P99_MS = 5.0
BLOCK = 50
ENOUGH = 10 * BLOCK
"""Calls during one shrink that a 99th percentile can be told from."""
Call = Callable[[], object]


def measure(directory: Path, *, quick: bool) -> list[Row]:
    """The rows of this section; `directory` is for their disks."""
    guest = Guest(directory / "rpc", DISK)
    server = Server(empty_command(directory / "empty.sock"), directory / "empty.sock", directory / "empty.log")
    try:
        say("rpc: writing data for later")
        holed(guest, 16)
        with Daemon(directory, stateful=guest.mountpoint) as daemon, server, server.stub() as stub:
            empty = common_pb2.EmptyMessage()

            def peer() -> object:
                return stub.GetResizeStatus(empty, timeout=20)

            return _idle(daemon, peer, quick) + _busy(daemon, peer, guest, quick)
    finally:
        guest.close()


def _rows(name: str, goal: Goal | None = None) -> tuple[Row, Row]:
    return Row(SECTION, f"{name} p50", "ms", PEER), Row(SECTION, f"{name} p99", "ms", PEER, goal)


def _add(rows: tuple[Row, Row], ours: list[float], peer: list[float]) -> None:
    for row, share in zip(rows, (0.5, 0.99), strict=True):
        row.ours.append(percentile(ours, share))
        row.peer.append(percentile(peer, share))
        row.facts["calls"] = row.facts.get("calls", 0) + len(ours)


def _idle(daemon: Daemon, peer: Call, quick: bool) -> list[Row]:
    free = daemon.report().filesystem.available_bytes + Config().reserve
    calls: dict[str, Call] = {
        "GetResizeStatus": daemon.status,
        "GetAvailableSpace": daemon.available,
        "GetKernelVersion": lambda: daemon.maitred.GetKernelVersion(common_pb2.EmptyMessage(), timeout=20),
        "GetReport": daemon.report,
        "UpdateStorageBalloon, no change": lambda: daemon.report_free(free),
    }
    found: list[Row] = []
    for name, call in calls.items():
        say(f"rpc: {name}")
        rows = _rows(name)
        _alternate(call, peer, lambda _: False, 4 * BLOCK)  # warm up
        for _ in range(2 if quick else 5):
            _add(rows, *_alternate(call, peer, lambda _: False, (4 if quick else 8) * BLOCK))
        found += rows
    return found


def _alternate(call: Call, peer: Call, over: Callable[[object], bool], most: int) -> tuple[list[float], list[float]]:
    """Blocks of `call` and `peer` in turns, until an answer of `call` is the last, or `most` calls each."""
    ours: list[float] = []
    theirs: list[float] = []
    ended = False

    def block() -> None:
        nonlocal ended
        for _ in range(BLOCK):
            began = time.perf_counter()
            answer = call()
            ours.append((time.perf_counter() - began) * 1e3)
            if over(answer):
                ended = True
                return

    def other() -> None:
        theirs.extend(milliseconds(peer) for _ in range(BLOCK))

    index = 0
    while not ended and len(ours) < most:
        in_turns(index, block, other)
        index += 1
    return ours, theirs


def _busy(daemon: Daemon, peer: Call, guest: Guest, quick: bool) -> list[Row]:
    say("rpc: GetResizeStatus while the kernel moves data")
    own = _rows("GetResizeStatus, shrinking", Goal(P99_MS))
    daemon.resize(lowest(daemon, 3 * GIB))
    ours, theirs = _alternate(daemon.status, peer, lambda answer: not answer.resize_in_progress, 100 * ENOUGH)  # type: ignore[attr-defined]
    moved = daemon.report().job.moved_bytes
    if len(ours) >= ENOUGH:
        _add(own, ours, theirs)
        own[1].facts["moved_bytes"] = moved
    balancing = _rows("GetResizeStatus, balancing", Goal(P99_MS))
    for _ in range(2 if quick else 5):
        with _balancing(guest):
            _add(balancing, *_alternate(daemon.status, peer, lambda _: False, 2 * ENOUGH))
    return rows_of([*own, *balancing])


@contextlib.contextmanager
def _balancing(guest: Guest) -> Iterator[None]:
    """The kernel moves everything there is, again and again."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            command = ["btrfs", "balance", "start", "--full-balance", str(guest.mountpoint)]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                stop.wait(0.01)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        time.sleep(0.2)
        yield
    finally:
        stop.set()
        while thread.is_alive():
            cancel = ["btrfs", "balance", "cancel", str(guest.mountpoint)]
            subprocess.run(cancel, capture_output=True, check=False)
            thread.join(0.2)
