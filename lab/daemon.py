"""A real storaged in a process of its own, and a client for it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from storaged.rpc.proto import common_pb2, storaged_v1_pb2, storaged_v1_pb2_grpc, vm_guest_pb2, vm_guest_pb2_grpc

STARTS_WITHIN_S = 20.0


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class Daemon:
    """`storaged serve` on a unix socket in `directory`. Stopped on the way out of `with`, killed if it will not."""

    def __init__(self, directory: Path, *arguments: str, stateful: Path | None = None) -> None:
        self.socket = directory / "storaged.sock"
        self.log = directory / "storaged.log"
        where = ["--sim"] if stateful is None else ["--stateful", str(stateful)]
        self._command = [
            *(sys.executable, "-m", "storaged", "serve", "--listen", f"unix:{self.socket}"),
            *("--state-dir", str(directory / "state"), *where, *arguments),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    @property
    def address(self) -> str:
        """As `--guest` takes it."""
        return f"unix:{self.socket}"

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        assert self._process is not None
        return self._process.pid

    def launch(self) -> None:
        """Start it and wait for nothing."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def start(self, *, managed: bool = True) -> Self:
        """Start it and wait until it serves, and with `managed` manages its filesystem.

        Raises RuntimeError with its log when it does not.
        """
        self.launch()
        assert self._process is not None
        until = time.monotonic() + STARTS_WITHIN_S
        # A channel that is refused once tries again only a second later.
        while not self._listens() and self._process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        self._channel = grpc.insecure_channel(f"unix:{self.socket}")
        while True:
            try:
                probe = self.maitred.GetResizeStatus if managed else self.maitred.GetKernelVersion
                probe(common_pb2.EmptyMessage(), timeout=2)
            except grpc.RpcError:
                if self._process.poll() is not None or time.monotonic() > until:
                    self.kill()
                    raise RuntimeError(f"storaged does not serve:\n{self.log.read_text()}") from None
                time.sleep(0.05)
            else:
                return self

    def children(self, script: str = "") -> list[int]:
        """Process ids of its children; only of those that run `script`."""
        found: list[int] = []
        for path in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, path.read_text(encoding="ascii").split())
        return [pid for pid in found if script.encode() in _command_line(pid)]

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    @property
    def maitred(self) -> vm_guest_pb2_grpc.MaitredStub:
        """The contract's service."""
        assert self._channel is not None
        return vm_guest_pb2_grpc.MaitredStub(self._channel)

    @property
    def storage(self) -> storaged_v1_pb2_grpc.StorageStub:
        """The engine's own service."""
        assert self._channel is not None
        return storaged_v1_pb2_grpc.StorageStub(self._channel)

    def report_free(self, free: int, state: int = vm_guest_pb2.DISK_NORMAL) -> int:
        """UpdateStorageBalloon; its result."""
        request = vm_guest_pb2.UpdateStorageBalloonRequest(state=state, free_space_bytes=free)  # type: ignore[arg-type]
        return self.maitred.UpdateStorageBalloon(request, timeout=20).result

    def report(self) -> storaged_v1_pb2.Report:
        """GetReport."""
        return self.storage.GetReport(storaged_v1_pb2.GetReportRequest(), timeout=20)

    def metric(self, name: str) -> float:
        """One sample of its metrics, found by its port in the log: `name` with its labels. Raises KeyError."""
        lines = self.log.read_text(encoding="utf-8").splitlines()[::-1]
        line = next(line for line in lines if "metrics at http" in line)
        with urllib.request.urlopen(line.split("metrics at ")[1], timeout=10) as answer:
            text = answer.read().decode()
        for sample in text.splitlines():
            if sample.startswith(name + " "):
                return float(sample.split()[-1])
        raise KeyError(name)

    def resize(self, size: int) -> int:
        """ResizeFilesystem; its status."""
        return self.maitred.ResizeFilesystem(vm_guest_pb2.ResizeFilesystemRequest(size=size), timeout=20).status

    def status(self) -> vm_guest_pb2.GetResizeStatusResponse:
        """GetResizeStatus."""
        return self.maitred.GetResizeStatus(common_pb2.EmptyMessage(), timeout=20)

    def minimum(self) -> int:
        """GetResizeBounds."""
        return self.maitred.GetResizeBounds(common_pb2.EmptyMessage(), timeout=20).minimum_size

    def available(self) -> int:
        """GetAvailableSpace."""
        return self.maitred.GetAvailableSpace(common_pb2.EmptyMessage(), timeout=20).available_space

    def wait_resized(self, within_s: float = 60.0) -> vm_guest_pb2.GetResizeStatusResponse:
        """Poll as a host does until no resize is in progress; the last status."""
        until = time.monotonic() + within_s
        while (status := self.status()).resize_in_progress:
            if time.monotonic() > until:
                raise TimeoutError(f"still resizing after {within_s:g} s: {status}")
            time.sleep(0.02)
        return status

    def stop(self) -> int:
        """SIGTERM and wait; its exit code."""
        if self._process is None:
            return 0
        self._close_channel()
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self._process = None
        return code

    def kill(self) -> None:
        """kill -9, as a crash."""
        self._close_channel()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()
