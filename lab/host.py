"""A real `storaged-host serve` in a process of its own, and what it says."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import grpc

from storaged.rpc.proto import storaged_host_v1_pb2, storaged_host_v1_pb2_grpc

STARTS_WITHIN_S = 20.0
STOPS_WITHIN_S = 20.0


class HostProcess:
    """`storaged-host serve` with these arguments. Stopped on the way out of `with`, killed if it will not."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        self._command = [sys.executable, "-m", "storaged.host", "serve", *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it is ready. Raises RuntimeError with its log when that does not come."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._wait(self._ready)

    def _ready(self) -> bool:
        """Whether what `start` waits for is there."""
        return True

    def _wait(self, for_what: Callable[[], bool]) -> None:
        """Wait for it. Ends the process and raises RuntimeError with its log when it does not come."""
        assert self._process is not None
        until = time.monotonic() + STARTS_WITHIN_S
        while not for_what():
            if self._process.poll() is not None or time.monotonic() > until:
                self.end()
                raise RuntimeError(f"storaged-host does not serve:\n{self.log.read_text()}")
            time.sleep(0.02)

    def end(self, number: int = signal.SIGKILL) -> int:
        """End it, as a crash does if nothing else is said; its exit code. Raises TimeoutExpired when it had to die."""
        if self._process is None:
            return 0
        process, self._process = self._process, None
        process.send_signal(number)
        try:
            return process.wait(STOPS_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def stop(self) -> int:
        """SIGTERM and wait; its exit code."""
        return self.end(signal.SIGTERM)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def console_link(control: str) -> str:
    """A link that signs in to the console of the host at `control`, `unix:/path`; good once."""
    with grpc.insecure_channel(control) as channel:
        stub = storaged_host_v1_pb2_grpc.HostStub(channel)
        return stub.GetConsoleLink(storaged_host_v1_pb2.GetConsoleLinkRequest(), timeout=20).link


class HostDaemon(HostProcess):
    """`storaged-host serve` with the settings in `config`; `control` is its unix socket for storagectl, if any."""

    def __init__(self, config: Path, log: Path, control: Path | None = None) -> None:
        super().__init__(log, "--config", str(config))
        self._control = control
        self._channel: grpc.Channel | None = None

    @property
    def address(self) -> str:
        """As `--host` takes it."""
        return f"unix:{self._control}"

    def start(self) -> None:
        """Start it; wait until it serves where it has a socket. Raises RuntimeError with its log when it does not."""
        super().start()
        if self._control is not None:
            self._channel = grpc.insecure_channel(self.address)

    def _ready(self) -> bool:
        if self._control is None:
            return True
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self._control)) == 0

    def end(self, number: int = signal.SIGKILL) -> int:
        """End it, and the calls to it."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        return super().end(number)

    @property
    def stub(self) -> storaged_host_v1_pb2_grpc.HostStub:
        """The host's own service."""
        channel = self._channel
        if channel is None:
            raise RuntimeError("storaged-host does not run")
        return storaged_host_v1_pb2_grpc.HostStub(channel)

    def pool(self) -> storaged_host_v1_pb2.Pool:
        """GetPool of the only pool."""
        return self.stub.GetPool(storaged_host_v1_pb2.GetPoolRequest(), timeout=10)

    def guests(self) -> dict[str, storaged_host_v1_pb2.Guest]:
        """ListGuests, by name."""
        answer = self.stub.ListGuests(storaged_host_v1_pb2.ListGuestsRequest(), timeout=10)
        return {guest.name: guest for guest in answer.guests}

    def report(self) -> storaged_host_v1_pb2.Report:
        """The first report of a Watch: all that it knows."""
        watch = self.stub.Watch(storaged_host_v1_pb2.WatchRequest(), timeout=10)
        try:
            return next(iter(watch))
        finally:
            watch.cancel()
