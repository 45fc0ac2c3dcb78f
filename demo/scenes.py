"""The acts. Each says what happens, and checks what it claims."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from demo.screen import Bar, Screen, gib
from demo.world import FILE, HOST_DISK, PROMISED, RESERVE, Host, Member
from storaged.host import superblock
from storaged.rpc.proto import storaged_host_v1_pb2, storaged_v1_pb2
from storaged.units import GIB, MIB, SECTOR, format_duration

WITHIN_S = 60.0
FILLS_S = 30.0
WANTED = 10
"""Files that guest b writes though it may not, at first."""
OTHERS, OTHERS_PACE = 800 * MIB, 150 * MIB
"""What the host itself writes, and how much of it a second."""


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
    play.host.start()
    play.check("storaged-host told both what they may write", play.host.settled(WITHIN_S))
    after = [member.daemon.available() for member in (play.a, play.b)]
    for member, old, new in zip((play.a, play.b), before, after, strict=True):
        held = member.daemon.report().balloon.size_bytes
        play.screen.say(f"guest {member.name} believed in {gib(old)}, may write {gib(new)}: balloon {gib(held)}")
    promises_hold(play)


def promises_hold(play: Play) -> None:
    """What guests may write, by the host's books and by their own word, is there."""
    promised, there = play.host.promised()
    may_write = sum(member.daemon.available() for member in (play.a, play.b))
    play.check(
        f"the host promised {gib(promised)}, guests may write {gib(may_write)}; free less reserve is {gib(there)}",
        promised <= there and may_write <= there + 64 * MIB,
    )


def fills_up(play: Play) -> None:
    """The host's disk fills up while a guest writes at full speed."""
    play.screen.scene("2. The host fills up while guest a writes at full speed")
    done = threading.Event()

    def write() -> None:
        while not done.is_set():  # as an application that tries again a little later
            play.a.write(PROMISED, f"busy{play.a.enospc}", done)
            done.wait(0.2)

    before = play.b.daemon.available()
    writer = threading.Thread(target=write)
    burst = threading.Thread(target=play.host.grow_file, args=("other-data", OTHERS, OTHERS_PACE, done))
    begun = time.monotonic()
    writer.start()
    burst.start()
    try:
        burst.join()
        until = time.monotonic() + FILLS_S
        while not (play.a.enospc and play.host.free() < 2 * RESERVE) and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        done.set()  # also when it is interrupted: nobody can unmount under a writer
        writer.join()
        burst.join()
    took = format_duration(time.monotonic() - begun)
    play.screen.say(
        f"{gib(len(play.a.files) * FILE)} of durable files were written in {took}, {gib(OTHERS)} by the host"
    )
    play.check(f"guest a met “no space left on device” {play.a.enospc} time(s)", play.a.enospc > 0)
    play.check("it met no I/O error", play.a.io_errors == 0)
    least = gib(play.host.least_free)
    play.check(f"the host never ran out: at its worst it had {least}", play.host.full == 0 and play.host.least_free > 0)
    after = play.b.daemon.available()
    play.check(f"guest b, which did nothing, followed: from {gib(before)} to {gib(after)}", after < before)
    may_write = after + play.a.daemon.available()
    keeps = play.host.free() - may_write
    play.check(
        f"if both wrote all that they may ({gib(may_write)}), the host would keep {gib(max(keeps, 0))}",
        keeps >= RESERVE // 2,
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
    play.check("the promise holds again", play.host.settled(WITHIN_S))
    promises_hold(play)


def resizes(play: Play) -> None:
    """A guest is shrunk to its bound and grown again, in the right order with its image."""
    b = play.b
    play.screen.scene("4. Guest b is made smaller, then larger")
    least, begun = b.daemon.available(), time.monotonic()
    while len(b.files) < WANTED and time.monotonic() < begun + WITHIN_S:
        b.write((WANTED - len(b.files)) * FILE, f"first{b.enospc}")  # as an application that tries again a little later
        time.sleep(0.1)
    play.check(
        f"guest b could write {gib(least)}, and wrote {gib(len(b.files) * FILE)}: the host gave it room"
        f" in {format_duration(time.monotonic() - begun)}",
        len(b.files) == WANTED,
    )
    b.delete(0.5)
    b.write(2 * FILE, "second")
    b.delete(0.25)
    # Small, and on a whole sector: an image has whole sectors.
    target = -(-max(b.daemon.minimum(), GIB) // SECTOR) * SECTOR
    resize = _resize(play, target)
    image, device, filesystem = sizes(b)
    play.check(
        f"shrunk from {gib(PROMISED)} to {gib(target)} in {_took(resize)}: the filesystem, then device and image",
        image == device == filesystem == target == b.daemon.status().current_size,
    )
    until = time.monotonic() + WITHIN_S
    while b.daemon.report().pressure.level == storaged_v1_pb2.LEVEL_CRITICAL and time.monotonic() < until:
        time.sleep(0.2)  # at CRITICAL a guest refuses to grow
    resize = _resize(play, PROMISED)
    image, device, filesystem = sizes(b)
    play.check(
        f"grown to {gib(filesystem)} in {_took(resize)}: image and device, then the filesystem",
        image == device == filesystem == PROMISED == b.daemon.status().current_size,
    )
    play.check("the promise holds with the larger image", play.host.settled(WITHIN_S))


def sizes(member: Member) -> tuple[int, int, int]:
    """Image, device and filesystem, each looked at by itself."""
    sectors = Path(f"/sys/class/block/{Path(member.guest.device).name}/size").read_text(encoding="ascii")
    return member.guest.image.stat().st_size, int(sectors) * 512, superblock.read(str(member.guest.image)).size


def _resize(play: Play, size: int) -> storaged_host_v1_pb2.Resize:
    """`storagectl resize` of guest b, to its end; shows how it goes, and watches that image >= filesystem."""
    host = play.host.daemon
    command = [sys.executable, "-m", "storaged.ctl.main", "--host", host.address]
    command += ["resize", "--yes", "--json", play.b.name, str(size)]
    play.screen.say(f"storagectl resize {play.b.name} {gib(size).replace(' ', '')}")
    shorter = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as storagectl:
        while storagectl.poll() is None:
            time.sleep(0.1)
            image, device, filesystem = sizes(play.b)
            shorter += min(image, device) < filesystem
            running = [each for each in host.report().resizes if each.guest == play.b.name]
            if running and running[0].state == storaged_host_v1_pb2.RESIZE_RUNNING:
                play.screen.job = _progress(running[0])
        play.screen.job = ""
        said = storagectl.stdout.read() if storagectl.stdout else ""
        wrong = storagectl.stderr.read() if storagectl.stderr else ""
    last = json.loads(said.splitlines()[-1]) if said.strip() else {}
    state = str(last.get("outcome", "")) or wrong.strip()
    play.check(f"storagectl ended with {storagectl.returncode}: {state}", storagectl.returncode == 0)
    play.check("the image was never smaller than the filesystem", shorter == 0)
    return next(each for each in host.report().resizes if each.guest == play.b.name)


def _progress(resize: storaged_host_v1_pb2.Resize) -> str:
    percent = round(resize.progress * 100)
    left = f", {format_duration(resize.eta_s)} left" if resize.HasField("eta_s") else ""
    rate = f" at {gib(int(resize.rate_bytes_per_s))}/s" if resize.HasField("rate_bytes_per_s") else ""
    stage = storaged_host_v1_pb2.ResizeStage.Name(resize.stage).removeprefix("STAGE_").lower()
    return f"{'█' * (percent // 5):<20} {percent:3} %  {stage}, {gib(resize.moved_bytes)} moved{rate}{left}"


def _took(resize: storaged_host_v1_pb2.Resize) -> str:
    return format_duration((resize.ended_at.ToNanoseconds() - resize.started_at.ToNanoseconds()) / 1e9)


def survives(play: Play) -> None:
    """A daemon is killed; the protection stays."""
    play.screen.scene("5. The daemon of guest a is killed with kill -9")
    before = play.a.daemon.available()
    play.a.daemon.kill()
    answer = os.statvfs(play.a.guest.mountpoint)
    meanwhile = answer.f_bavail * answer.f_frsize
    play.check(
        f"meanwhile applications still have {gib(meanwhile)}, as before ({gib(before)})",
        abs(meanwhile - before) <= 32 * MIB,
    )
    promised, there = play.host.promised()
    play.check(
        f"the host still counts what guest a may write: {gib(promised)} promised of {gib(there)}",
        meanwhile <= promised <= there,
    )
    play.a.daemon.start()
    found = [note for note in play.a.daemon.report().notes if "found the balloon" in note]
    play.check(f"started again, it says: {found[0] if found else 'nothing'}", bool(found))


def host_dies(play: Play) -> None:
    """storaged-host is killed; nobody gets more than it had, and the next one takes over."""
    play.screen.scene("6. storaged-host is killed with kill -9")
    daemon = play.host.daemon
    before = [member.daemon.available() for member in (play.a, play.b)]
    daemon.end()
    time.sleep(1)
    after = [member.daemon.available() for member in (play.a, play.b)]
    play.check(
        f"without it guests may write {gib(sum(after))}, as before ({gib(sum(before))})",
        sum(after) <= sum(before) + 32 * MIB,
    )
    daemon.start()
    play.check("the next one has told everybody, and its promise holds", play.host.settled(WITHIN_S))
    promises_hold(play)


ACTS = (promises, fills_up, gives_back, resizes, survives, host_dies)


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
        f"host: {gib(play.host.free())} free, worst {gib(play.host.least_free)}, ran out {play.host.full} times;"
        f" {gib(play.returned)} handed back; its own writes were ahead of it for {format_duration(play.host.broken)}",
        soft_wrap=True,
    )
