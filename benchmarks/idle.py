"""What a daemon costs when nobody asks anything, against an idle empty grpc.aio server over the same time."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.measure import Goal, Row, say
from benchmarks.process import Server, children, cpu_seconds, cpu_ticks, daemon_command, empty_command, wakeups
from lab.loop import Guest
from storaged.core.model import Config
from storaged.rpc.proto import common_pb2, vm_guest_pb2
from storaged.units import GIB

SECTION = "idle"
PEER = "idle empty grpc.aio server"
CPU_PERCENT = 0.1
WINDOW_S = 20.0
SETTLES_S = 3.0
DISK = 16 * GIB
BALLOON = 8 * GIB


def measure(directory: Path, *, quick: bool) -> list[Row]:
    """The rows of this section; `directory` is for their disks."""
    states = ("no balloon", "balloon held")
    cpu = [Row(SECTION, f"CPU, {state}", "%", PEER, Goal(CPU_PERCENT)) for state in states]
    woken = [Row(SECTION, f"wake-ups a minute, {state}", "", PEER) for state in states]
    guests = [Guest(directory / f"guest{number}", DISK) for number in range(2)]
    daemons = [_daemon(directory / f"daemon{number}", guest) for number, guest in enumerate(guests)]
    empty = Server(empty_command(directory / "empty.sock"), directory / "empty.sock", directory / "empty.log")
    try:
        with daemons[0] as slack, daemons[1] as tight, empty:
            _hold(slack, 0)
            _hold(tight, BALLOON)
            time.sleep(SETTLES_S)
            for index in range(1 if quick else 4):
                say(f"idle for {WINDOW_S:.0f} s, run {index + 1}")
                _window((slack.pid, tight.pid), empty.pid, cpu, woken)
    finally:
        for guest in guests:
            guest.close()
    return [*cpu, *woken]


def _daemon(directory: Path, guest: Guest) -> Server:
    directory.mkdir()
    socket = directory / "storaged.sock"
    return Server(daemon_command(socket, directory / "state", guest.mountpoint), socket, directory / "log")


def _hold(server: Server, size: int) -> None:
    """Have a balloon of `size` bytes, and nobody connected afterwards."""
    with server.stub() as stub:
        available = stub.GetAvailableSpace(common_pb2.EmptyMessage(), timeout=20).available_space
        free = available - size + Config().reserve
        request = vm_guest_pb2.UpdateStorageBalloonRequest(state=vm_guest_pb2.DISK_NORMAL, free_space_bytes=free)
        if stub.UpdateStorageBalloon(request, timeout=20).result != vm_guest_pb2.SUCCESS:
            raise RuntimeError(f"the balloon could not take {size} bytes")


def _window(daemons: tuple[int, int], empty: int, cpu: list[Row], woken: list[Row]) -> None:
    groups = [[pid, *children(pid)] for pid in (*daemons, empty)]
    before = [_usage(group) for group in groups]
    began = time.perf_counter()
    time.sleep(WINDOW_S)
    took = time.perf_counter() - began
    after = [_usage(group) for group in groups]
    percent, ticks, wakes = (
        [(late[part] - early[part]) * scale / took for early, late in zip(before, after, strict=True)]
        for part, scale in ((0, 100.0), (1, 100.0), (2, 60.0))
    )
    for index in range(2):
        cpu[index].ours.append(percent[index])
        cpu[index].peer.append(percent[2])
        cpu[index].facts.setdefault("percent_by_ticks", []).append(ticks[index])
        woken[index].ours.append(wakes[index])
        woken[index].peer.append(wakes[2])


def _usage(pids: list[int]) -> tuple[float, float, int]:
    return sum(map(cpu_seconds, pids)), sum(map(cpu_ticks, pids)), sum(map(wakeups, pids))
