"""Servers in processes of their own, and what the kernel says of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc

from benchmarks import http2
from storaged.rpc.proto import vm_guest_pb2_grpc

EMPTY_SERVER = Path(__file__).with_name("empty_server.py")
STATUS = "/vm_tools.Maitred/GetResizeStatus"
STARTS_WITHIN_S = 30.0
POLL_S = 0.0002


def daemon_command(socket: Path, state: Path, stateful: Path) -> list[str]:
    """How a daemon is started for the filesystem at `stateful`."""
    serve = ["serve", "--listen", f"unix:{socket}", "--state-dir", str(state), "--stateful", str(stateful)]
    return [sys.executable, "-m", "storaged", *serve]


def empty_command(socket: Path) -> list[str]:
    """How the peer is started: a grpc.aio server whose every method answers an empty message."""
    return [sys.executable, str(EMPTY_SERVER), f"unix:{socket}"]


class Server:
    """`command` serving on `socket`; how long it took until one could connect, and until a call was answered."""

    def __init__(self, command: list[str], socket: Path, log: Path) -> None:
        self._command = command
        self._socket = socket
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.connectable_ms = 0.0
        self.serving_ms = 0.0

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    @contextlib.contextmanager
    def stub(self) -> Iterator[vm_guest_pb2_grpc.MaitredStub]:
        """A client of it."""
        with grpc.insecure_channel(f"unix:{self._socket}") as channel:
            yield vm_guest_pb2_grpc.MaitredStub(channel)

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            began = time.perf_counter()
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self._measure(began)
        except BaseException:
            self._end(signal.SIGKILL)
            raise
        return self

    def _measure(self, began: float) -> None:
        # Bare sockets and a request made beforehand: none of this is the time of a client's library.
        assert self._process is not None
        while True:
            connection = http2.connect(self._socket)
            if connection is not None:
                with connection:
                    self.connectable_ms = self.connectable_ms or (time.perf_counter() - began) * 1e3
                    if http2.call(connection, STATUS):
                        self.serving_ms = (time.perf_counter() - began) * 1e3
                        return
            if self._process.poll() is not None or time.perf_counter() - began > STARTS_WITHIN_S:
                raise RuntimeError(f"{self._command} does not serve:\n{self._log.read_text(encoding='utf-8')}")
            time.sleep(POLL_S)

    def __exit__(self, *_: object) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True, slots=True)
class Memory:
    """MB (of 10^6 bytes): resident, and the share of it that is not shared with others."""

    resident: float
    proportional: float


def memory(pid: int) -> Memory:
    """What process `pid` has in memory now."""
    found = {"Rss": 0, "Pss": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0]) * 1024
    resident = next(
        int(line.split()[1]) * 1024
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        if line.startswith("VmRSS:")
    )
    return Memory(resident / 1e6, found["Pss"] / 1e6)


def children(pid: int) -> list[int]:
    """The processes that `pid` has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name may hold anything, so count from its closing bracket.
            if int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parts[2]))
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads there are and were, by the process' own clock (clock_getcpuclockid(3))."""
    return time.clock_gettime((~pid << 3) | 2)


def cpu_ticks(pid: int) -> float:
    """The same in seconds, as ps sees it: in steps of a clock tick."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wakeups(pid: int) -> int:
    """Voluntary context switches of all threads: how often one woke and went to sleep again."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(OSError):
            for line in status.read_text(encoding="utf-8").splitlines():
                if line.startswith("voluntary_ctxt_switches:"):
                    total += int(line.split()[1])
    return total
