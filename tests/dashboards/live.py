"""A run that is worth watching: real daemons of guests and host, a load, and a Prometheus that records it."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from lab.controller import Controller, Entry
from lab.daemon import Daemon
from lab.loop import Guest, fill, memory, run, workspace
from lab.prometheus import Prometheus, Target
from lab.simulated import free_port
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.rpc.proto import storaged_v1_pb2
from storaged.units import GIB, MIB
from tests.conftest import why_no_btrfs
from tests.dashboards.grafana import Window

IDLE_S = 7.0
"""Nothing happens at first: a healthy system that rests shows something everywhere, too."""
RUN_S = 16.0
BURST_S = 0.08
FIRST_RATE_S = 5.0
"""The first seconds have no rate yet: nobody's dashboard begins with the first sample ever."""
FULL = "critically full"
"""Why a guest is not grown just then."""
SETTINGS = """
[storage]  # levels for a small disk: what a guest is told is its grant and 1 GiB
critical_enter = "1088MiB"
critical_leave = "1152MiB"
low_enter = "1280MiB"
low_leave = "1536MiB"
settle_s = 1
"""


@dataclass(slots=True)
class Member:
    """One guest. `disk`: its filesystem, where that is a real one."""

    name: str
    daemon: Daemon
    metrics: str
    image: Path
    disk: Guest | None = None


@dataclass(slots=True)
class Scene:
    """Guests on a pool. `swings`: bytes that the host's other writers take and free, over and over."""

    pool: Path
    members: list[Member]
    sharing: str
    swings: tuple[int, ...]
    resize: Callable[[Controller, Member, int], None]
    burst: int = 32 * MIB
    errors: list[BaseException] = field(default_factory=list)

    def other_writer(self, stop: threading.Event) -> None:
        """Take and free what others on the host do. A burst is no larger than what the reserve is for."""
        path, size = self.pool / "others", 0
        with path.open("wb") as file:
            for wanted in itertools.cycle(self.swings):
                while size < wanted and not stop.wait(BURST_S):
                    os.posix_fallocate(file.fileno(), size, self.burst)
                    size += self.burst
                size = min(size, wanted)
                file.truncate(size)
                if stop.wait(1.5):
                    break
        path.unlink()

    def applications(self, stop: threading.Event) -> None:
        """Write in every guest, and delete."""
        number = 0
        while not stop.wait(0.2):
            number += 1
            for member in self.members:
                if member.disk is not None:
                    fill(member.disk.mountpoint / f"app{number % 6}", 24 * MIB)
                    (member.disk.mountpoint / f"app{(number + 3) % 6}").unlink(missing_ok=True)

    def requests(self, host: Controller, until: float) -> None:
        """Resizes, refused ones too, and what people ask for in between."""
        first = self.members[0]
        while time.time() < until:
            asks: tuple[Callable[[], object], ...] = (
                lambda: self.resize(host, first, max(first.daemon.minimum(), 3 * GIB)),
                lambda: self.resize(host, first, 4 * GIB),
                lambda: first.daemon.resize(1),
                *(member.daemon.available for member in self.members),
                *(member.daemon.minimum for member in self.members),
            )
            for ask in asks:
                with contextlib.suppress(grpc.RpcError):  # a disk that is critically full grows nobody
                    ask()
            first.daemon.storage.Trim(storaged_v1_pb2.TrimRequest(), timeout=20)
            time.sleep(0.3)

    def play(self, host: Controller, until: float) -> None:
        """All of it until then. Raises what went wrong."""
        stop = threading.Event()

        def guarded(work: Callable[[threading.Event], None]) -> None:
            try:
                work(stop)
            except BaseException as error:  # noqa: BLE001  # told below
                self.errors.append(error)

        threads = [threading.Thread(target=guarded, args=(work,)) for work in (self.other_writer, self.applications)]
        for thread in threads:
            thread.start()
        try:
            self.requests(host, until)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        if self.errors:
            raise self.errors[0]


@dataclass(frozen=True, slots=True)
class Live:
    """What was recorded, at rest and under load; everything still runs."""

    prometheus: Prometheus
    idle: Window
    window: Window
    scene: Scene
    metrics: str


@contextlib.contextmanager
def stage(directory: Path, scene: Scene, run_s: float = RUN_S) -> Iterator[Live]:
    """Run a host over the scene's guests, first at rest, then under load, and let Prometheus watch."""
    metrics = f"127.0.0.1:{free_port()}"
    guests = [Entry(one.name, one.daemon.address, one.image) for one in scene.members]
    targets = [
        Target("storaged", one.metrics, "/metrics", (("host", "h1"), ("vm", one.name), ("instance", one.name)))
        for one in scene.members
    ]
    targets.append(Target("storaged-host", metrics, "/metrics", (("host", "h1"),)))
    with (
        Controller(directory, scene.pool, guests, scene.sharing, metrics) as host,
        Prometheus(directory, targets, free_port()) as prometheus,
    ):
        start = time.time()
        time.sleep(FIRST_RATE_S + IDLE_S)
        loaded = time.time()
        idle = Window(start + FIRST_RATE_S, loaded)
        scene.play(host, loaded + run_s)
        assert prometheus.unhealthy() == []
        yield Live(prometheus, idle, Window(loaded + FIRST_RATE_S, time.time()), scene, metrics)


def _resize_guest(_: Controller, member: Member, size: int) -> None:
    """A simulated guest has no image that the host could cut: it is asked itself."""
    member.daemon.resize(size)
    member.daemon.wait_resized()


def _resize_all(host: Controller, member: Member, size: int) -> None:
    """Image and filesystem, through the host."""
    ended = host.resize(member.name, size)
    assert ended.state == pb.RESIZE_DONE or FULL in ended.reason, ended.reason


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """A mounted ext4 with nothing on it. Needs root."""
    with workspace(memory()) as directory:
        image = directory / "pool.img"
        with image.open("wb") as file:
            file.truncate(size)
        run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
        pool = directory / "pool"
        pool.mkdir()
        run("mount", "-o", "loop", image, pool)
        yield pool


@contextlib.contextmanager
def simulated(directory: Path) -> Iterator[Scene]:
    """Three simulated guests. The last is so small that it is always close to ENOSPC.

    Without root the pool is what the machine's own disk has beyond all but 6 GiB: others use that, too.
    """
    with contextlib.ExitStack() as cleanup:
        pool = directory if why_no_btrfs() else cleanup.enter_context(small_disk(8 * GIB))
        stats = os.statvfs(pool)
        free = stats.f_bavail * stats.f_frsize
        kept = max(free - 6 * GIB, 0)
        sharing = f"""
reserve_least = {kept}
reserve_most = {kept}
base = "256MiB"
low = {free - 4800 * MIB}
critical = "1MiB"
dwell_s = 1
"""
        members = []
        for name, size in (("a", 4 * GIB), ("b", 4 * GIB), ("c.d", 256 * MIB)):
            home = directory / name
            home.mkdir()
            image = pool / f"{name}.img"
            with image.open("wb") as file:
                file.write(bytes(MIB))
                file.truncate(size)
            metrics = f"127.0.0.1:{free_port()}"
            daemon = cleanup.enter_context(Daemon(home, "--sim-size", str(size), "--metrics", metrics))
            members.append(Member(name, daemon, metrics, image))
        yield Scene(pool, members, sharing, (512 * MIB, 256 * MIB, 5632 * MIB, 0), _resize_guest, burst=256 * MIB)


@contextlib.contextmanager
def real() -> Iterator[Scene]:
    """Two btrfs guests of 4 GiB each, whose images lie on an ext4 of 4 GiB with nothing else on it. Needs root."""
    with small_disk(4 * GIB) as pool, contextlib.ExitStack() as cleanup:
        members = []
        for name in ("a", "b"):
            guest = Guest(pool / name, 4 * GIB)
            fill(guest.mountpoint / "data", 200 * MIB)
            home = pool.parent / name
            home.mkdir()
            (home / "storaged.toml").write_text(SETTINGS, encoding="utf-8")
            metrics = f"127.0.0.1:{free_port()}"
            options = ("--config", str(home / "storaged.toml"), "--metrics", metrics)
            daemon = cleanup.enter_context(Daemon(home, *options, stateful=guest.mountpoint))
            members.append(Member(name, daemon, metrics, guest.image, guest))
        sharing = """
reserve_least = "384MiB"
reserve_most = "512MiB"
base = "256MiB"
low = "1536MiB"
critical = "1280MiB"
dwell_s = 1
"""
        yield Scene(pool, members, sharing, (0, 1792 * MIB, 0, 2304 * MIB), _resize_all)
