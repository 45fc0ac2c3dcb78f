"""The same scenes on two `storaged serve --sim`: what a machine without root or btrfs can show."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc

from demo.host import Lease, Sharing, Watcher
from demo.scenes import resize
from demo.story import Story, wait_until
from demo.view import LEVELS, GuestView, HostView, View
from demo.world import free_port, levels
from lab.daemon import Daemon
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.units import format_duration, format_size, sector_ceil


@dataclass(slots=True)
class SimGuest:
    """A storaged with a filesystem in its own memory."""

    name: str
    daemon: Daemon
    lease: Lease
    watcher: Watcher
    metrics: str

    def look(self) -> GuestView:
        """As its daemon reported last."""
        report = self.watcher.latest
        if report is None:
            return GuestView(self.name, 0, 0, 0, 0, "", serving=False)
        return GuestView(
            name=self.name,
            size=report.filesystem.size_bytes,
            balloon=report.balloon.size_bytes,
            available=report.filesystem.available_bytes,
            cost=report.filesystem.data_used_bytes - min(report.balloon.size_bytes, report.filesystem.data_used_bytes),
            level=LEVELS.get(report.pressure.level, ""),
            serving=True,
        )


class SimWorld:
    """Two simulated guests on a host's disk that is no more than a number. Use it in `with`."""

    simulated = True

    def __init__(self, base: Path, unit: int) -> None:
        self.unit = unit
        self.size = 4 * unit
        self.own = 0
        """Bytes of the host's own data, as this demo makes them up."""
        self.path = Path(tempfile.mkdtemp(prefix="storaged-simdemo-", dir=base))
        self.sharing = Sharing(self.host_free, 2, reserve=unit * 7 // 16)
        self.guests = [self._guest(name) for name in ("a", "b")]

    def _guest(self, name: str) -> SimGuest:
        directory = self.path / name
        directory.mkdir()
        config = directory / "storaged.toml"
        config.write_text(levels(self.unit), encoding="ascii")
        metrics = f"127.0.0.1:{free_port()}"
        daemon = Daemon(
            *(directory, "--config", str(config), "--metrics", metrics),
            *("--sim-size", str(4 * self.unit), "--sim-speed", str(self.unit // 2)),
        )
        title = f"guest {name.upper()}"
        lease = Lease(title, daemon.socket, self.sharing, self.unit)
        return SimGuest(title, daemon, lease, Watcher(title, daemon.socket), metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for guest in self.guests:
            guest.lease.stop()
            guest.watcher.stop()
            guest.daemon.kill()
        shutil.rmtree(self.path, ignore_errors=True)

    def host_free(self) -> int:
        """What the made-up disk has left."""
        return self.size - self.own

    def look(self) -> View:
        guests = tuple(guest.look() for guest in self.guests)
        return View(HostView(self.size, self.host_free(), 0), guests)

    def available(self) -> list[int]:
        """What applications may write, as each guest answers now."""
        return [guest.daemon.available() for guest in self.guests]


def _settled(story: Story, world: SimWorld) -> None:
    story.claim(all([guest.lease.settle() for guest in world.guests]), "both balloons are where the host wants them")
    total = sum(world.available())
    story.claim(
        total <= world.host_free(),
        f"the guests can write {format_size(total)}; the host has {format_size(world.host_free())}",
    )


def promises(story: Story, world: SimWorld) -> None:
    story.scene(
        f"Two guests are promised {format_size(8 * world.unit)} of a {format_size(world.size)} disk",
        "look at: the balloons, and what the guests have available in the end",
    )
    for guest in world.guests:
        guest.daemon.start()
        guest.watcher.start()
    story.say(f"before: together they believe they can write {format_size(sum(world.available()))}")
    for guest in world.guests:
        guest.lease.start()
    _settled(story, world)


def filling(story: Story, world: SimWorld) -> None:
    story.scene("The host's disk fills up", "look at: the balloons take what the host loses")
    for _ in range(16):
        world.own += world.unit // 4 - world.unit // 32
        time.sleep(0.15)
    _settled(story, world)
    story.claim(min(world.available()) < world.unit // 4, "there is next to nothing left, and the guests know it")


def deleting(story: Story, world: SimWorld) -> None:
    story.scene("The host's own files are deleted", "look at: the balloons give back what is free again")
    before = sum(world.available())
    world.own = world.unit
    _settled(story, world)
    after = sum(world.available())
    story.claim(after > before, f"the guests can write {format_size(after - before)} more than before")
    trimmed = [guest.daemon.storage.Trim(pb.TrimRequest(), timeout=60).trimmed_bytes for guest in world.guests]
    story.say(f"a trim is answered with {format_size(sum(trimmed))} of free room")


def resizing(story: Story, world: SimWorld) -> None:
    _, b = world.guests
    story.scene("Guest B is shrunk, then grown again", "look at: its size")
    size = b.daemon.status().current_size
    minimum = b.daemon.minimum()
    target = sector_ceil(max(minimum, 2 * world.unit))
    story.say(f"from {format_size(size)} it can go to {format_size(minimum)}; it goes to {format_size(target)}")
    for wanted in (target, 3 * world.unit):
        job = resize(story, b.daemon, wanted)
        story.claim(
            job.state == pb.JOB_DONE and b.daemon.status().current_size == wanted,
            f"the filesystem has {format_size(wanted)}" + (f" ({job.reason})" if job.reason else ""),
        )
    _settled(story, world)


def killing(story: Story, world: SimWorld) -> None:
    a, _ = world.guests
    story.scene("Guest A's storaged is killed with kill -9", "look at: the first report makes it right again")
    story.say("a simulated filesystem dies with its daemon; a real one keeps its balloon")
    a.daemon.kill()
    gone = wait_until(lambda: a.watcher.latest is None, 5)
    story.claim(gone, "nobody answers")
    began = time.monotonic()
    a.daemon.start()
    story.claim(True, f"started again, it serves after {format_duration(time.monotonic() - began)}")  # noqa: FBT003
    a.lease.told = None
    _settled(story, world)


def play(story: Story, world: SimWorld) -> None:
    """All scenes, in order."""
    for scene in (promises, filling, deleting, resizing, killing):
        scene(story, world)
        time.sleep(0.3)


def ending(story: Story, world: SimWorld) -> tuple[list[list[str]], list[str]]:
    """The rows and lines of the last table."""
    rows = []
    for guest in world.guests:
        with contextlib.suppress(grpc.RpcError):
            report = guest.daemon.report()
            sizes = (report.filesystem.size_bytes, report.balloon.size_bytes, report.filesystem.available_bytes)
            size, balloon, available = map(format_size, sizes)
            rows.append([guest.name, size, "-", balloon, available, "-", "-"])
    story.claim(len(rows) == len(world.guests), "both guests serve at the end")
    lowest = story.screen.lowest or 0
    story.claim(lowest > 0, f"the host never ran out: the least it had was {format_size(lowest)}")
    return rows, [" simulated: no file was written, no disk was touched"]
