"""The stage: a host's disk with two guests' sparse images on it, a storaged in each, and storaged-host."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from lab.daemon import Daemon
from lab.host import HostDaemon
from lab.loop import Guest
from lab.prometheus import Prometheus, Target, find
from storaged.rpc.proto import storaged_host_v1_pb2
from storaged.units import GIB, MIB

HOST_DISK = 5 * GIB
"""1 GiB of it is set aside for the room in both guests' metadata (docs/decisions/0006-ledger.md)."""
PROMISED = 4 * GIB
RESERVE = 384 * MIB
"""Half of it is there for what the host writes before guests have heard (see docs/sharing.md)."""
FILE = 24 * MIB
SETTINGS = """
[storage]  # levels for a small disk: what a guest is told is its share and 1 GiB
critical_enter = "1088MiB"
critical_leave = "1152MiB"
low_enter = "1280MiB"
low_leave = "1536MiB"
settle_s = 2
"""
HOST_SETTINGS = """
[serve]
listen = ["unix:{control}"]
metrics = "{metrics}"

[console]
listen = "tcp:{console}"

[sharing]  # for a disk of 5 GiB
reserve_least = {reserve}
reserve_most = "512MiB"
base = "128MiB"
low = "1GiB"
critical = "512MiB"
dwell_s = 2

[resize]
state_dir = "{state}"

[pool.disk]
path = "{disk}"
"""


@dataclass(slots=True)
class Member:
    """One guest: its disk, its daemon, and the files an application in it wrote and made durable."""

    name: str
    guest: Guest
    daemon: Daemon
    metrics: str
    files: dict[Path, str] = field(default_factory=dict)
    io_errors: int = 0
    enospc: int = 0

    def write(self, most: int, tag: str, stop: threading.Event | None = None) -> int:
        """Write durable files until `most` bytes, the filesystem is full, or `stop`; bytes written."""
        written = 0
        number = 0
        while written < most and not (stop is not None and stop.is_set()):
            path = self.guest.mountpoint / f"{tag}-{number:04}"
            block = os.urandom(MIB) * (FILE // MIB)
            try:
                with path.open("wb") as file:
                    file.write(block)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    self.io_errors += 1
                else:
                    self.enospc += 1
                with contextlib.suppress(OSError):
                    path.unlink()
                return written
            self.files[path] = hashlib.sha256(block).hexdigest()
            written += FILE
            number += 1
        return written

    def delete(self, share: float) -> int:
        """Delete this share of the files, every so many-th; bytes deleted."""
        paths = sorted(self.files)
        doomed = [path for index, path in enumerate(paths) if int(index * share) != int((index + 1) * share)]
        for path in doomed:
            path.unlink()
            del self.files[path]
        os.sync()
        return len(doomed) * FILE

    def whole(self) -> int:
        """How many of its durable files are exactly what was written."""
        good = 0
        for path, digest in self.files.items():
            with path.open("rb") as file:
                good += hashlib.file_digest(file, "sha256").hexdigest() == digest
        return good


class Host:
    """storaged-host, what it says, and what the host itself does to its disk."""

    def __init__(self, disk: Path, daemon: HostDaemon, console: str, metrics: str) -> None:
        self.disk = disk
        self.daemon = daemon
        self.console = console
        self.metrics = metrics
        self.least_free = self.free()
        self.full = 0
        self.broken = 0.0
        """Seconds in which storaged-host said that its promise does not hold."""
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._look, self._listen)]

    def free(self) -> int:
        """Bytes left on the host's disk."""
        answer = os.statvfs(self.disk)
        return answer.f_bavail * answer.f_frsize

    def start(self) -> None:
        """Begin to share."""
        self.daemon.start()
        for thread in self._threads:
            thread.start()

    def stop_looking(self) -> None:
        """Look at the disk no more."""
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.01):
            free = self.free()
            self.least_free = min(self.least_free, free)
            self.full += free == 0

    def _listen(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(0.2):
            with contextlib.suppress(grpc.RpcError, RuntimeError, ValueError):  # it is being killed
                pool, now = self.daemon.pool(), time.monotonic()
                if pool.HasField("promise_holds") and not pool.promise_holds:
                    self.broken += now - last
                last = now

    def promised(self) -> tuple[int, int]:
        """What storaged-host says that guests may write, and what is free less the reserve."""
        pool = self.daemon.pool()
        return pool.promised_bytes + pool.unbound_bytes, pool.free_bytes - pool.reserve_bytes

    def settled(self, within_s: float) -> bool:
        """Wait until the promise holds for every guest, by a look at the disk that was taken after this was called.

        An older look knows nothing of what was just done: its books agree with each other, not with the guests.
        """
        begun = time.monotonic()
        while time.monotonic() < begun + within_s:
            asked = time.monotonic()
            pool = self.daemon.pool()
            up = all(guest.state == storaged_host_v1_pb2.GUEST_UP for guest in self.daemon.guests().values())
            looked = pool.HasField("age_s") and asked - pool.age_s > begun
            if looked and up and pool.promise_holds and not pool.unbound_bytes:
                return True
            time.sleep(0.1)
        return False

    def grow_file(self, name: str, size: int, pace: int, stop: threading.Event) -> None:
        """The host itself writes, `pace` bytes a second, until `size` or `stop`."""
        block = os.urandom(8 * MIB)
        try:
            with (self.disk / name).open("wb") as file:
                for _ in range(size // len(block)):
                    if stop.is_set():
                        return
                    begun = time.monotonic()
                    file.write(block)
                    file.flush()
                    os.fdatasync(file.fileno())
                    time.sleep(max(len(block) / pace - (time.monotonic() - begun), 0))
        except OSError:
            self.full += 1


def free_port() -> int:
    """A TCP port nobody uses just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def build_host(directory: Path, disk: Path, members: list[Member]) -> Host:
    """The host's daemon for these guests, with its console and its metrics; not started."""
    home = directory / "storaged-host"
    home.mkdir()
    console, metrics = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    control = home / "host.sock"
    lines = [
        HOST_SETTINGS.format(control=control, metrics=metrics, console=console, disk=disk, state=home, reserve=RESERVE)
    ]
    lines += [
        f'[guest.{member.name}]\naddress = "{member.daemon.address}"\nimage = "{member.guest.image}"\n'
        for member in members
    ]
    config = home / "host.toml"
    config.write_text("\n".join(lines), encoding="utf-8")
    daemon = HostDaemon(config, home / "host.log", control)
    return Host(disk, daemon, f"http://{console}/", metrics)


def build_member(directory: Path, disk: Path, name: str) -> Member:
    """A guest whose image lies on the host's disk, and its daemon."""
    guest = Guest(disk / name, PROMISED, name="disk")
    home = directory / name
    home.mkdir()
    settings = home / "storaged.toml"
    settings.write_text(SETTINGS, encoding="utf-8")
    metrics = f"127.0.0.1:{free_port()}"
    return Member(
        name, guest, Daemon(home, "--config", str(settings), "--metrics", metrics, stateful=guest.mountpoint), metrics
    )


def watched(directory: Path, guests: list[tuple[str, str]], host: str = "") -> Prometheus | None:
    """A Prometheus that scrapes (name, address) of each guest, and the host; None where there is none here."""
    if find("prometheus") is None:
        return None
    targets = [Target("storaged", address, "/metrics", (("host", "demo"), ("vm", name))) for name, address in guests]
    if host:
        targets.append(Target("storaged-host", host, "/metrics", (("host", "demo"),)))
    return Prometheus(directory / "prometheus", targets, free_port()).start()
