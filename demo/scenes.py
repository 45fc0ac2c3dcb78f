"""The acts. Each says what happens, and checks what it claims."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field

import grpc

from demo.screen import Bar, Screen, gib
from demo.world import HOST_DISK, HOST_KEEPS, PROMISED, Host, Member
from storaged.rpc.proto import storaged_v1_pb2, vm_guest_pb2
from storaged.units import GIB, MIB, SECTOR, format_duration

WITHIN_S = 60.0


@dataclass(slots=True)
class Play:
    """Everything the acts share."""

    screen: Screen
    host: Host
    a: Member
    b: Member
    failed: list[str] = field(default_factory=list)
    returned: int = 0

    def check(self, claim: str, held: bool) -> None:
        """Say whether a claim held; a broken one fails the demo."""
        self.screen.say(("✓ " if held else "✗ ") + claim, "green" if held else "bold red")
        if not held:
            self.failed.append(claim)

    def draw(self) -> None:
        """Bring the bars up to date."""
        free = self.host.free()
        costs = [member.guest.image.stat().st_blocks * 512 for member in (self.a, self.b)]
        others = max(HOST_DISK - free - sum(costs), 0)
        bars = [Bar("host", HOST_DISK, [("█", "cyan", sum(costs)), ("▒", "blue", others)], f"{gib(free)} free")]
        for member, cost in zip((self.a, self.b), costs, strict=True):
            try:
                report = member.daemon.storage.GetReport(storaged_v1_pb2.GetReportRequest(), timeout=2)
            except (grpc.RpcError, AssertionError, ValueError):
                continue
            fs = report.filesystem
            held = report.balloon.size_bytes
            used = max(fs.data_used_bytes - held, 0)
            parts = [("█", "cyan", used), ("▓", "magenta", held), ("░", "green", fs.available_bytes)]
            bars.append(Bar(f"guest {member.name}", fs.size_bytes, parts, f"costs {gib(cost)}"))
        self.screen.bars = bars

    def watch(self, stop: threading.Event) -> None:
        """Keep the bars up to date until `stop`."""
        while not stop.wait(0.25):
            self.draw()


def promises(play: Play) -> None:
    """Balloons inflate to what the host can really give."""
    play.screen.scene(f"1. Two guests were promised {gib(2 * PROMISED)} on a disk of {gib(HOST_DISK)}")
    before = [member.daemon.available() for member in (play.a, play.b)]
    play.host.share()
    play.host.start()
    after = [member.daemon.available() for member in (play.a, play.b)]
    for member, old, new in zip((play.a, play.b), before, after, strict=True):
        held = member.daemon.report().balloon.size_bytes
        play.screen.say(f"guest {member.name} believed in {gib(old)}, may write {gib(new)}: balloon {gib(held)}")
    free = play.host.free()
    play.check(
        f"together they may write {gib(sum(after))}; the host has {gib(free)} and keeps {gib(HOST_KEEPS)}",
        sum(after) <= free - HOST_KEEPS + 64 * MIB,
    )


def fills_up(play: Play) -> None:
    """The host's disk fills up while a guest writes at full speed."""
    play.screen.scene("2. The host fills up while guest a writes at full speed")
    done = threading.Event()

    def write() -> None:
        play.a.write(PROMISED, "busy", done)
        done.set()

    writer = threading.Thread(target=write)
    burst = threading.Thread(target=play.host.grow_file, args=("other-data", 1500 * MIB, 300 * MIB))
    begun = time.monotonic()
    writer.start()
    burst.start()
    burst.join()
    done.wait(WITHIN_S)
    done.set()
    writer.join()
    took = format_duration(time.monotonic() - begun)
    play.screen.say(f"{gib(len(play.a.files) * 24 * MIB)} of durable files were written in {took}")
    play.check(f"guest a met “no space left on device” {play.a.enospc} time(s)", play.a.enospc > 0)
    play.check("it met no I/O error", play.a.io_errors == 0)
    least = gib(play.host.least_free)
    play.check(
        f"the host never ran out: at its worst it had {least}", play.host.enospc == 0 and play.host.least_free > 0
    )


def gives_back(play: Play) -> None:
    """Deleted files' blocks go back to the host."""
    play.screen.scene("3. Guest a deletes half of its files")
    os.sync()
    cost, free = play.a.guest.host_bytes(), play.host.free()
    deleted = play.a.delete(0.5)
    request = storaged_v1_pb2.TrimRequest(reclaim_empty_chunks=True)
    play.a.daemon.storage.Trim(request, timeout=WITHIN_S)
    until = time.monotonic() + WITHIN_S
    while cost - play.a.guest.host_bytes() < deleted * 9 // 10 and time.monotonic() < until:
        time.sleep(0.2)
    back = cost - play.a.guest.host_bytes()
    play.returned += back
    play.screen.say(f"its image cost {gib(cost)}, now {gib(cost - back)}")
    play.screen.say(f"the host had {gib(free)} free, now {gib(play.host.free())}")
    play.check(f"of {gib(deleted)} deleted, {gib(back)} went back to the host", back >= deleted * 9 // 10)


def resizes(play: Play) -> None:
    """A guest is shrunk to its bound and grown again, in the right order with its image."""
    b = play.b
    play.screen.scene("4. Guest b is made smaller, then larger")
    until = time.monotonic() + WITHIN_S
    while b.daemon.available() < 400 * MIB and time.monotonic() < until:
        time.sleep(0.1)  # the host shares what guest a gave back
    b.write(384 * MIB, "first")
    b.delete(0.5)
    b.write(120 * MIB, "second")
    b.delete(0.25)
    # Small, and on a whole sector: an image has whole sectors.
    target = -(-max(b.daemon.minimum(), GIB) // SECTOR) * SECTOR
    with play.host.silent():
        job = _follow(play, target)
    size = b.daemon.status().current_size
    play.check(
        f"shrunk from {gib(PROMISED)} to {gib(target)}: {gib(job.moved_bytes)} moved"
        f" in {format_duration(_seconds(job))}",
        size == target and job.state == storaged_v1_pb2.JOB_DONE,
    )
    b.guest.resize_image(target)
    play.screen.say("then its image was cut: the filesystem first, the image after it")
    b.guest.resize_image(PROMISED)
    until = time.monotonic() + WITHIN_S
    while b.daemon.report().pressure.level == storaged_v1_pb2.LEVEL_CRITICAL and time.monotonic() < until:
        time.sleep(0.2)  # at CRITICAL a guest refuses to grow
    with play.host.silent():
        job = _follow(play, PROMISED)
    size = b.daemon.status().current_size
    play.check(f"grown to {gib(size)} in {format_duration(_seconds(job))}: the image first", size == PROMISED)


def _follow(play: Play, size: int) -> storaged_v1_pb2.Job:
    """Resize guest b and show how it goes; the job as it ended."""
    daemon = play.b.daemon
    started = daemon.resize(size)
    play.check(f"the daemon took the request for {gib(size)}", started == vm_guest_pb2.ResizeFilesystemResponse.STARTED)
    shown = -1
    for report in daemon.storage.Watch(storaged_v1_pb2.WatchRequest(min_interval_s=0.2), timeout=WITHIN_S):
        job = report.job
        if job.requested_size == size and job.state >= storaged_v1_pb2.JOB_DONE:
            break
        percent = round(job.progress * 100)
        left = f", {format_duration(job.eta_s)} left" if job.HasField("eta_s") else ""
        rate = f" at {gib(int(job.rate_bytes_per_s))}/s" if job.HasField("rate_bytes_per_s") else ""
        done = f"{gib(job.moved_bytes)} of {gib(job.total_to_move_bytes)}"
        play.screen.job = f"{'█' * (percent // 5):<20} {percent:3} %  {done}{rate}{left}"
        if play.screen.live is None and job.progress and percent // 25 != shown:
            shown = percent // 25
            play.screen.say(play.screen.job)
    play.screen.job = ""
    return daemon.report().job


def _seconds(job: storaged_v1_pb2.Job) -> float:
    return job.ended_at.ToNanoseconds() / 1e9 - job.started_at.ToNanoseconds() / 1e9


def survives(play: Play) -> None:
    """A daemon is killed; the protection stays."""
    play.screen.scene("5. The daemon of guest a is killed with kill -9")
    with play.host.silent():
        before = play.a.daemon.available()
        play.a.daemon.kill()
        answer = os.statvfs(play.a.guest.mountpoint)
        meanwhile = answer.f_bavail * answer.f_frsize
        play.check(
            f"meanwhile applications still have {gib(meanwhile)}, as before ({gib(before)})",
            abs(meanwhile - before) <= 32 * MIB,
        )
        play.a.daemon.start()
        found = [note for note in play.a.daemon.report().notes if "found the balloon" in note]
        play.check(f"started again, it says: {found[0] if found else 'nothing'}", bool(found))


ACTS = (promises, fills_up, gives_back, resizes, survives)


def summary(play: Play) -> None:
    """The final table."""
    rows: list[tuple[str, ...]] = []
    for member in (play.a, play.b):
        report = member.daemon.report()
        whole = member.whole()
        if whole != len(member.files):
            play.failed.append(f"guest {member.name}: {len(member.files) - whole} files are damaged")
        rows.append(
            (
                f"guest {member.name}",
                gib(report.filesystem.size_bytes),
                gib(member.guest.host_bytes()),
                gib(report.balloon.size_bytes),
                gib(report.filesystem.available_bytes),
                f"{whole}/{len(member.files)}",
                str(member.io_errors),
            )
        )
    columns = ("", "promised", "costs", "balloon", "may write", "files ok", "I/O err")
    play.screen.table("What happened", columns, rows)
    play.screen.console.print(
        f"host: {gib(play.host.free())} free, worst {gib(play.host.least_free)}, ran out {play.host.enospc} times;"
        f" {gib(play.returned)} handed back",
        soft_wrap=True,
    )
