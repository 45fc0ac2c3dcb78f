"""The scenes on a real host disk with real guests."""

from __future__ import annotations

import os
import time

from demo.files import Files
from demo.host import HostFile
from demo.screen import describe
from demo.story import Story, wait_until
from demo.world import RealWorld
from lab.daemon import Daemon
from lab.loop import run
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.rpc.proto import vm_guest_pb2
from storaged.units import MIB, format_duration, format_size, sector_ceil

SCENES = 5
SLACK = 8 * MIB
"""Statvfs and the daemon's own accounting differ by less."""


def prepare(story: Story, world: RealWorld) -> None:
    """Guest B has a past: it wrote a lot and deleted the first part of it, so that the rest lies high on its disk."""
    _, b = world.guests
    wanted = world.unit * 9 // 8 // b.files.size
    for _ in range(wanted):
        b.files.write()
    deleted = b.files.delete(lambda position: position < wanted * 2 // 3)
    run("fstrim", b.disk.mountpoint)  # as a guest does at night
    story.say(f"guest B wrote {format_size(wanted * b.files.size)} and deleted {format_size(deleted)} of it")


def promises(story: Story, world: RealWorld) -> None:
    view = world.look()
    promised = sum(guest.size for guest in view.guests)
    story.scene(
        f"Two guests are promised {format_size(promised)} of a {format_size(view.host.size)} disk",
        "look at: the balloons, and what the guests have available in the end",
    )
    story.say(f"before: together they believe they can write {format_size(view.writable)}")
    for guest in world.guests:
        guest.daemon.start()
        guest.watcher.start()
        guest.lease.start()
    held = all([guest.lease.settle() for guest in world.guests])
    story.claim(held, "both balloons are where the host wants them")
    _truth(story, world, "now they can write")


def _truth(story: Story, world: RealWorld, text: str) -> None:
    view = world.look()
    story.claim(
        view.writable <= view.host.free,
        f"{text} {format_size(view.writable)}; the host has {format_size(view.host.free)}",
    )


def filling(story: Story, world: RealWorld) -> None:
    a, _ = world.guests
    most = world.unit * 5 // 4
    story.scene(
        "The host's disk fills up while guest A writes as fast as it can",
        "look at: A's available goes to nothing, the host always has something free",
    )
    host_file = HostFile(world.host / "host-data", most, rate=world.unit // 5)
    host_file.start()
    began, first = time.monotonic(), True
    try:
        while time.monotonic() - began < 40:
            if a.files.write():
                continue
            if a.files.errors:
                break
            if first:
                first = False
                story.say(
                    f'guest A meets "no space left" after {format_size(a.files.written)};'
                    f" the host has {format_size(world.host_free())}"
                )
            if host_file.done and world.sharing.share() < 2 * a.files.size:
                break
            time.sleep(0.3)
    finally:
        host_file.stop()
    rate = a.files.written / (time.monotonic() - began)
    story.say(
        f"host file {format_size(host_file.written)}, guest A {format_size(a.files.written)}, {format_size(rate)}/s"
    )
    story.claim(a.files.no_space > 0, f'guest A was told "no space left" in time, {a.files.no_space} times')
    story.claim(not a.files.errors, f"guest A met no other error{''.join(f' ({e})' for e in a.files.errors[:1])}")
    story.claim(
        host_file.written == most and not host_file.error,
        f"the host could write all of its own {format_size(most)}{host_file.error and ': ' + host_file.error}",
    )
    for guest in world.guests:
        guest.lease.settle()
    _truth(story, world, "all guests can write")
    whole = a.files.whole()
    story.claim(whole == len(a.files.hashes), f"read back from disk: {whole} of {len(a.files.hashes)} files are whole")


def deleting(story: Story, world: RealWorld) -> None:
    a, _ = world.guests
    story.scene("Guest A deletes three of four files", "look at: its image shrinks, the host's free space comes back")
    os.sync()
    cost, free = a.cost(), world.host_free()
    deleted = a.files.delete(lambda position: position % 4 != 0)
    trimmed = a.daemon.storage.Trim(pb.TrimRequest(reclaim_empty_chunks=True), timeout=60).trimmed_bytes
    enough = wait_until(lambda: cost - a.cost() >= deleted * 9 // 10, 15)
    story.returned += max(cost - a.cost(), 0)
    story.say(f"{format_size(deleted)} deleted; the kernel discarded {format_size(trimmed)} of free room")
    story.claim(enough, f"its image costs the host {format_size(a.cost())}, before it was {format_size(cost)}")
    gained = wait_until(lambda: world.host_free() - free >= deleted * 8 // 10, 5)
    story.claim(gained, f"the host has {format_size(world.host_free())} free, before it was {format_size(free)}")
    story.claim(
        all([guest.lease.settle() for guest in world.guests]), "both balloons followed: each guest has its share again"
    )
    _truth(story, world, "all guests can write")


def resizing(story: Story, world: RealWorld) -> None:
    _, b = world.guests
    story.scene(
        "Guest B is shrunk, online, then grown again",
        "look at: first the filesystem, then the image; the other way back",
    )
    bounds = b.daemon.report().bounds
    target = sector_ceil(bounds.minimum_size)
    size = b.size()
    story.say(f"from {format_size(size)} it can go to {format_size(target)}")
    story.claim(256 * MIB <= target < size, "the guest offers a size to shrink to")
    before = b.cost()
    world.sharing.held_back = len(b.files.hashes) * b.files.size  # a shrink writes what it moves
    b.lease.settle()
    job = resize(story, b.daemon, target)
    world.sharing.held_back = 0
    took = format_duration(_seconds(job))
    story.claim(
        job.state == pb.JOB_DONE and b.daemon.status().current_size == target,
        f"the filesystem has {format_size(target)} after {took}, {format_size(job.moved_bytes)} moved"
        + (f" ({job.reason})" if job.reason else ""),
    )
    b.daemon.storage.Trim(pb.TrimRequest(), timeout=60)
    b.disk.resize_image(target)
    seen = wait_until(lambda: b.daemon.report().filesystem.device_bytes == target, 5)
    story.returned += max(before - b.cost(), 0)
    story.claim(seen and b.disk.image.stat().st_size == target, "then its image was cut to exactly that")
    whole = b.files.whole()
    story.claim(whole == len(b.files.hashes), f"{whole} of {len(b.files.hashes)} files of guest B are whole")
    larger = 3 * world.unit
    b.disk.resize_image(larger)
    seen = wait_until(lambda: b.daemon.report().filesystem.device_bytes == larger, 5)
    story.claim(seen, f"the image grows to {format_size(larger)}, the guest sees it")
    job = resize(story, b.daemon, larger)
    story.claim(
        job.state == pb.JOB_DONE and b.size() == larger,
        f"the filesystem has {format_size(b.size())}" + (f" ({job.reason})" if job.reason else ""),
    )
    b.lease.settle()
    _truth(story, world, "all guests can write")


def resize(story: Story, daemon: Daemon, size: int) -> pb.Job:
    """Resize and show the progress as Watch tells it; the job as it ended."""
    status = daemon.resize(size)
    if status != vm_guest_pb2.ResizeFilesystemResponse.STARTED:
        return pb.Job(state=pb.JOB_FAILED, reason=f"not started, status {status}")
    last = pb.Job()
    shown = ""
    for report in daemon.storage.Watch(pb.WatchRequest(min_interval_s=0.2), timeout=120):
        if not report.HasField("job") or report.job.requested_size != size:
            continue
        last = report.job
        if (text := describe(last)) != shown:
            shown = text
            story.screen.job(last)
        if last.state in (pb.JOB_DONE, pb.JOB_FAILED, pb.JOB_CANCELLED):
            break
    story.screen.job(None)
    return last


def _seconds(job: pb.Job) -> float:
    return (job.ended_at.ToNanoseconds() - job.started_at.ToNanoseconds()) / 1e9


def killing(story: Story, world: RealWorld) -> None:
    a, _ = world.guests
    story.scene("Guest A's storaged is killed with kill -9", "look at: the balloon stays, and is found again")
    a.lease.settle()
    a.lease.pause()
    balloon, available = a.balloon(), a.available()
    a.daemon.kill()
    time.sleep(0.5)
    story.claim(
        a.balloon() == balloon and abs(a.available() - available) <= SLACK,
        f"nobody runs: the balloon still holds {format_size(a.balloon())}, {format_size(a.available())} are available",
    )
    more = Files(a.disk.mountpoint / "more", a.files.size, seed=1)
    while more.written <= available + a.files.size and more.write():
        pass
    a.files.no_space += more.no_space
    a.files.errors += more.errors
    story.claim(
        more.no_space == 1 and not more.errors and more.written <= available + SLACK and world.host_free() > 0,
        f'A writes until "no space left": {format_size(more.written)}; the host keeps {format_size(world.host_free())}',
    )
    whole = more.whole()
    story.claim(whole == len(more.hashes), f"{whole} of {len(more.hashes)} new files are whole; then they are deleted")
    more.delete(lambda _: True)
    began = time.monotonic()
    a.daemon.start()
    report = a.daemon.report()
    story.claim(
        abs(report.balloon.size_bytes - balloon) <= MIB,
        f"started again, after {format_duration(time.monotonic() - began)} it knows its balloon of"
        f" {format_size(report.balloon.size_bytes)}",
    )
    a.lease.resume()
    story.claim(a.lease.settle(), "and takes its host's reports again")
    _truth(story, world, "all guests can write")


def ending(story: Story, world: RealWorld, *, keep: bool) -> tuple[list[list[str]], list[str]]:
    """Look at everything once more; the rows and lines of the last table."""
    story.screen.title, story.screen.hint = "The end", "every file is read once more"
    for guest in world.guests:
        guest.lease.settle()
    view = world.look()
    rows, errors = [], 0
    for guest, seen in zip(world.guests, view.guests, strict=True):
        whole, files = guest.files.whole(), len(guest.files.hashes)
        met = len(guest.files.errors) + guest.device_errors()
        errors += met
        if whole != files or met:
            story.claim(False, f"{guest.name}: {whole} of {files} files whole, {met} I/O errors")  # noqa: FBT003
        sizes = (seen.size, seen.cost, seen.balloon, seen.available)
        rows.append([guest.name, *(format_size(size) for size in sizes), f"{whole}/{files}", str(met)])
    lowest = story.screen.lowest or 0
    story.claim(errors == 0, "no guest has met an I/O error, none is counted on its device")
    story.claim(lowest > 0, f"the host never ran out: the least it had was {format_size(lowest)}")
    if not keep:
        world.hush()
        wrong = world.check()
        story.claim(not wrong, "unmounted and examined: btrfs check finds nothing" if not wrong else "; ".join(wrong))
    no_space = sum(guest.files.no_space for guest in world.guests)
    return rows, [
        f" went back to the host      {format_size(story.returned)}",
        f' "no space left" in guests   {no_space}, in time',
        f" on the host                0, at least {format_size(lowest)} were free",
    ]


def play(story: Story, world: RealWorld) -> None:
    """All scenes, in order."""
    for scene in (promises, filling, deleting, resizing, killing):
        scene(story, world)
