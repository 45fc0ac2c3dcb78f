"""What the host does to its own pool: bursts, copies, kills, resizes, a PID file that goes, an image that is moved."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from lab.adversary.figures import Figures
from lab.daemon import Daemon
from lab.host import HostDaemon
from storaged.host.watch import FilesystemSource
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.units import GIB, MIB

RESERVE = 512 * MIB
BURST = RESERVE // 4
"""A host's own writers: what a sharer can withstand at once is half the reserve (see docs/sharing.md)."""
COPY_MIB_S = 100
"""How fast the host copies: in one reaction, less than half of the reserve."""


@dataclass(frozen=True, slots=True)
class Pool:
    """The disk at `path` of `size` bytes."""

    path: Path
    size: int
    figures: Figures
    starting: threading.Lock = field(default_factory=threading.Lock)
    """Held while the controller starts, which needs every image in its place."""

    def free(self) -> int:
        """Bytes that are free."""
        return FilesystemSource(str(self.path)).free()


def burst(pool: Pool, dice: random.Random) -> None:
    """A file that comes and goes."""
    path = pool.path / "burst"
    try:
        with path.open("wb") as file:
            for _ in range(dice.randrange(BURST // 4, BURST) // MIB):
                file.write(bytes(MIB))
            file.flush()
            os.fsync(file.fileno())
        pool.figures.bursts += 1
    except OSError:
        pool.figures.host_full += 1
    time.sleep(dice.uniform(0.5, 3))
    path.unlink(missing_ok=True)
    time.sleep(dice.uniform(0.5, 3))


def copy(pool: Pool, dice: random.Random) -> None:
    """A third of the disk, where an administrator sees that it fits; it is held for a while."""
    size = pool.size // 3
    time.sleep(dice.uniform(4, 12))
    if pool.free() < size + 2 * RESERVE:
        return
    path = pool.path / "copy"
    try:
        with path.open("wb", buffering=0) as file:
            begun = time.monotonic()
            for done in range(size // MIB):
                if pool.free() < RESERVE:  # it sees what is left, as any copy of that size is watched
                    break
                file.write(bytes(MIB))
                time.sleep(max(begun + done / COPY_MIB_S - time.monotonic(), 0))
            os.fsync(file.fileno())
        pool.figures.did["copies of a third"] += 1
    except OSError:
        pool.figures.host_full += 1
    time.sleep(dice.uniform(2, 8))
    path.unlink(missing_ok=True)


def kill(host: HostDaemon, daemons: Mapping[str, Daemon], dice: random.Random, pool: Pool) -> None:
    """End the controller, or one guest's daemon, as a crash does; it comes back soon."""
    if dice.random() < 0.5:
        with pool.starting:
            host.end()
            pool.figures.kills["controller"] += 1
            time.sleep(dice.uniform(0, 1.5))
            host.start()
    else:
        daemon = daemons[dice.choice(sorted(daemons))]
        daemon.kill()
        pool.figures.kills["daemon"] += 1
        time.sleep(dice.uniform(0, 1.5))
        daemon.start()


def resize(host: HostDaemon, name: str, sizes: tuple[int, int], dice: random.Random, figures: Figures) -> None:
    """Shrink a guest, or let it grow again; what the pool cannot carry is refused."""
    time.sleep(dice.uniform(3, 8))
    with contextlib.suppress(grpc.RpcError, RuntimeError, StopIteration):  # the controller was killed, or it refuses
        now = host.guests()[name].logical_bytes
        begun = host.stub.Resize(pb.ResizeRequest(guest=name, size_bytes=sizes[now == sizes[0]]), timeout=20).resize
        for report in host.stub.Watch(pb.WatchRequest(history_once=True), timeout=90):
            found = next(each for each in report.resizes if each.id == begun.id)
            if found.HasField("ended_at"):
                done = found.state == pb.RESIZE_DONE
                figures.did[f"{'shrinks' if begun.to_bytes < now else 'growths'}{'' if done else ' refused'}"] += 1
                return


def lose_pid_file(path: Path, dice: random.Random, figures: Figures) -> None:
    """Delete the PID file of a machine that runs, and write it again later."""
    time.sleep(dice.uniform(5, 15))
    text = path.read_text(encoding="ascii")
    path.unlink()
    figures.did["PID files deleted"] += 1
    time.sleep(dice.uniform(3, 8))
    path.write_text(text, encoding="ascii")


def move_image(image: Path, dice: random.Random, pool: Pool) -> None:
    """Move the image of a guest that runs, and back."""
    time.sleep(dice.uniform(15, 30))
    away = image.with_suffix(".moved")
    with pool.starting:
        image.rename(away)
        pool.figures.did["images moved"] += 1
        try:
            time.sleep(dice.uniform(1, 4))
        finally:
            away.rename(image)


@contextlib.contextmanager
def machine(pid_file: Path) -> Iterator[None]:
    """A process that stands for a guest's machine."""
    process = subprocess.Popen(["sleep", "infinity"])
    pid_file.write_text(f"{process.pid}\n", encoding="ascii")
    try:
        yield
    finally:
        process.kill()
        process.wait()


SHRUNK, GROWN = 2 * GIB, 4 * GIB
