"""A real `storaged-host serve` in a process of its own, and what it says."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc

from storaged.rpc.proto import storaged_host_v1_pb2, storaged_host_v1_pb2_grpc

STARTS_WITHIN_S = 20.0


class HostDaemon:
    """`storaged-host serve` with the settings in `config`; `control` is its unix socket for storagectl, if any."""

    def __init__(self, config: Path, log: Path, control: Path | None = None) -> None:
        self.log = log
        self._command = [sys.executable, "-m", "storaged.host", "serve", "--config", str(config)]
        self._control = control
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    @property
    def address(self) -> str:
        """As `--host` takes it."""
        return f"unix:{self._control}"

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it; wait until it serves where it has a socket. Raises RuntimeError with its log when it does not."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        if self._control is None:
            return
        until = time.monotonic() + STARTS_WITHIN_S
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > until:
                self.end()
                raise RuntimeError(f"storaged-host does not serve:\n{self.log.read_text()}")
            time.sleep(0.02)
        self._channel = grpc.insecure_channel(self.address)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self._control)) == 0

    def end(self, number: int = signal.SIGKILL) -> int:
        """End it, as a crash does if nothing else is said; its exit code."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is None:
            return 0
        self._process.send_signal(number)
        code = self._process.wait(20)
        self._process = None
        return code

    def pool(self) -> storaged_host_v1_pb2.Pool:
        """GetPool of the only pool."""
        return self._host.GetPool(storaged_host_v1_pb2.GetPoolRequest(), timeout=10)

    def guests(self) -> dict[str, storaged_host_v1_pb2.Guest]:
        """ListGuests, by name."""
        answer = self._host.ListGuests(storaged_host_v1_pb2.ListGuestsRequest(), timeout=10)
        return {guest.name: guest for guest in answer.guests}

    def report(self) -> storaged_host_v1_pb2.Report:
        """The first report of a Watch: all that it knows."""
        watch = self._host.Watch(storaged_host_v1_pb2.WatchRequest(), timeout=10)
        try:
            return next(iter(watch))
        finally:
            watch.cancel()

    @property
    def _host(self) -> storaged_host_v1_pb2_grpc.HostStub:
        channel = self._channel
        if channel is None:
            raise RuntimeError("storaged-host does not run")
        return storaged_host_v1_pb2_grpc.HostStub(channel)
