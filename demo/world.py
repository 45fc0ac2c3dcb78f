"""The stage: a host's disk with two guests' sparse images on it, a storaged in each, and a host that shares."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from lab.daemon import Daemon
from lab.loop import Guest, run
from lab.prometheus import Prometheus, Target, find
from storaged.core.model import Config
from storaged.rpc.proto import vm_guest_pb2
from storaged.units import GIB, MIB

HOST_DISK = 4 * GIB
PROMISED = 4 * GIB
HOST_KEEPS = 384 * MIB
"""Never promised to guests: what the host itself may write before the next look."""
LOOK_EVERY_S = 0.1
FILE = 24 * MIB
SETTINGS = """
[storage]  # levels for a small disk: what a guest is told is its share and 1 GiB
critical_enter = "1088MiB"
critical_leave = "1152MiB"
low_enter = "1280MiB"
low_leave = "1536MiB"
settle_s = 2
"""
UPSTREAM_RESERVE = Config().reserve
"""A guest subtracts this itself from what it is told."""


@dataclass(slots=True)
class Member:
    """One guest: its disk, its daemon, and the files an application in it wrote and made durable."""

    name: str
    guest: Guest
    daemon: Daemon
    metrics: str
    files: dict[Path, str] = field(default_factory=dict)
    grant: int = 0
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
    """Watches its disk and tells every guest its share, so that all shares together stay below what is left."""

    def __init__(self, disk: Path, members: list[Member]) -> None:
        self.disk = disk
        self.members = members
        self.least_free = self.free()
        self.enospc = 0
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._pause = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="host", daemon=True)

    def free(self) -> int:
        """Bytes left on the host's disk."""
        answer = os.statvfs(self.disk)
        return answer.f_bavail * answer.f_frsize

    def start(self) -> None:
        """Begin to share."""
        self._thread.start()

    def stop(self) -> None:
        """Share no more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Tell nobody anything meanwhile."""
        with self._pause:
            yield

    def share(self) -> None:
        """Tell every guest what it may still write. Shrinking shares go out before growing ones."""
        free = self.free()
        self.least_free = min(self.least_free, free)
        each = max(free - HOST_KEEPS, 0) // len(self.members)
        for member in sorted(self.members, key=lambda member: member.grant, reverse=True):
            if abs(each - member.grant) < 32 * MIB and each > 64 * MIB:
                continue
            try:
                result = member.daemon.report_free(each + UPSTREAM_RESERVE, _state(free))
            except grpc.RpcError as error:
                self.failures.append(f"{member.name}: {error.code().name}")
                continue
            if result == vm_guest_pb2.SUCCESS:
                member.grant = each

    def _run(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            with self._pause:
                self.share()

    def grow_file(self, name: str, size: int, pace: int) -> None:
        """The host itself writes, `pace` bytes a second."""
        block = os.urandom(8 * MIB)
        try:
            with (self.disk / name).open("wb") as file:
                for _ in range(size // len(block)):
                    begun = time.monotonic()
                    file.write(block)
                    file.flush()
                    os.fdatasync(file.fileno())
                    time.sleep(max(len(block) / pace - (time.monotonic() - begun), 0))
        except OSError:
            self.enospc += 1


def _state(free: int) -> int:
    """What the host says of its disk; the levels suit a disk of 4 GiB."""
    if free < HOST_KEEPS + 64 * MIB:
        return vm_guest_pb2.DISK_CRITICAL
    return vm_guest_pb2.DISK_LOW if free < GIB else vm_guest_pb2.DISK_NORMAL


def free_port() -> int:
    """A TCP port nobody uses just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def build_host(directory: Path) -> Path:
    """A host's disk: an ext4 filesystem of its own, so that nothing else writes to it."""
    image = directory / "host.img"
    with image.open("wb") as file:
        file.truncate(HOST_DISK)
    run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
    disk = directory / "host"
    disk.mkdir()
    run("mount", "-o", "loop", image, disk)
    return disk


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


def watched(directory: Path, guests: list[tuple[str, str]]) -> Prometheus | None:
    """A Prometheus that scrapes (name, address) of each guest; None where there is none on this machine."""
    if find("prometheus") is None:
        return None
    targets = [Target("storaged", address, "/metrics", (("host", "demo"), ("vm", name))) for name, address in guests]
    return Prometheus(directory / "prometheus", targets, free_port()).start()
