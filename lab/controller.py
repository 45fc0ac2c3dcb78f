"""`storaged-host serve` with a configuration, in a process of its own, and a client for it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc

from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.rpc.proto import storaged_host_v1_pb2_grpc

STARTS_WITHIN_S = 20.0
OVER = frozenset({pb.RESIZE_DONE, pb.RESIZE_FAILED, pb.RESIZE_CANCELLED})


@dataclass(frozen=True, slots=True)
class Entry:
    """A guest as its host's configuration names it."""

    name: str
    address: str
    image: Path
    weight: float = 1.0


class Controller:
    """The host's daemon for `guests` on one pool, the filesystem that `pool` lies on. `sharing`: that table's lines."""

    def __init__(self, directory: Path, pool: Path, guests: list[Entry], sharing: str, metrics: str) -> None:
        self.log = directory / "host.log"
        self._socket = directory / "host.sock"
        self._config = directory / "host.toml"
        tables = [
            f'[serve]\nlisten = ["unix:{self._socket}"]\nmetrics = "{metrics}"',
            f'[resize]\nstate_dir = "{directory}/host-state"\npoll_s = 0.05',
            f"[sharing]\n{sharing.strip()}",
            f'[pool.vms]\npath = "{pool}"',
            *(
                f'[guest."{one.name}"]\naddress = "{one.address}"\nimage = "{one.image}"\nweight = {one.weight}'
                for one in guests
            ),
        ]
        self._config.write_text("\n".join(tables) + "\n", encoding="utf-8")
        self._names = {one.name for one in guests}
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    @property
    def stub(self) -> storaged_host_v1_pb2_grpc.HostStub:
        """The host's own service."""
        assert self._channel is not None
        return storaged_host_v1_pb2_grpc.HostStub(self._channel)

    def __enter__(self) -> Self:
        """Start it and wait until every guest has its grant. Raises RuntimeError with its log when that fails."""
        command = [sys.executable, "-m", "storaged.host", "serve", "--config", str(self._config)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until = time.monotonic() + STARTS_WITHIN_S
        while not self._socket.exists() and self._process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        self._channel = grpc.insecure_channel(f"unix:{self._socket}")
        while True:
            with contextlib.suppress(grpc.RpcError):
                guests = self.stub.ListGuests(pb.ListGuestsRequest(), timeout=2).guests
                # One that has reported is one whose balloon is known, too.
                if {one.name for one in guests if one.HasField("grant_bytes") and not one.stale_reason} == self._names:
                    return self
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise RuntimeError(f"storaged-host does not serve:\n{self.log.read_text()}")
            time.sleep(0.05)

    def resize(self, name: str, size: int, within_s: float = 60.0) -> pb.Resize:
        """Resize a guest, image and filesystem; how it ended."""
        begun = self.stub.Resize(pb.ResizeRequest(guest=name, size_bytes=size), timeout=20).resize
        until = time.monotonic() + within_s
        for report in self.stub.Watch(pb.WatchRequest(history_once=True), timeout=within_s):
            found = next(one for one in report.resizes if one.id == begun.id)
            if found.state in OVER:
                return found
            if time.monotonic() > until:
                break
        raise TimeoutError(f"{name} is still being resized to {size}")

    def stop(self) -> int:
        """SIGTERM and wait; its exit code."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is None:
            return 0
        process, self._process = self._process, None
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def __exit__(self, *_: object) -> None:
        self.stop()
