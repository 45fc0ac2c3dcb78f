"""Rounds of reports, filling and deleting, and a strict report while all of it is in flight."""

from __future__ import annotations

import os
import threading
import time
from functools import partial

from lab.attack.oracle import SLACK, Growth, allocated, available, data_chunk, fill_really, fill_up, image_bytes, judged
from lab.attack.registry import add, scenario
from lab.attack.testbed import CRITICAL, LOW, NORMAL, Testbed, mib, report, why
from lab.loop import Guest, fill
from storaged.units import GIB, MIB

SIZE = 4 * GIB
PROFILES = {
    "dup": (),
    "single": ("-m", "single"),
    "data-dup": ("-m", "dup", "-d", "dup"),
    "mixed": ("--mixed",),
    "4k": ("--nodesize", "4096"),
}


def _delete(guest: Guest, prefix: str) -> None:
    for path in guest.mountpoint.glob(f"{prefix}*"):
        path.unlink()


def _fill_delete(guest: Guest, name: str) -> None:
    fill_up(guest, name)
    _delete(guest, name)


def strict_at_last(bed: Testbed, mkfs: tuple[str, ...]) -> list[str]:
    """Report, fill, delete, LOW, fill, delete, then nothing is allowed at CRITICAL: what can be written then?"""
    faults = []
    left = []
    for number in range(bed.tries(2, 6)):
        guest = bed.guest(SIZE, mkfs=mkfs)
        daemon = bed.daemon(guest, config=None)
        report(daemon, GIB, NORMAL)
        _fill_delete(guest, "first")
        report(daemon, 400 * MIB, LOW)
        _fill_delete(guest, "second")
        success = report(daemon, 0, CRITICAL)
        shown = available(guest) or 0
        image = image_bytes(guest) if number % 2 else 0  # a commit in every second round: without it at once
        made = fill_up(guest, "strict")
        data = allocated(made)
        grown = image_bytes(guest) - image if image else 0
        left.append(f"{'yes' if success else 'no'}:{mib(shown)}/{mib(data)}/{mib(grown)}")
        if success:
            faults += judged(Growth(grown, data, 0), 0, what=f"round {number}")
        daemon.kill()
        bed.close(guest)
    bed.say(success_shown_data_image=",".join(left))
    return faults


def racing(bed: Testbed, mkfs: tuple[str, ...]) -> list[str]:
    """A writer fills and deletes without a pause while limits fall to 0: what it writes after each SUCCESS counts."""
    guest = bed.guest(SIZE, mkfs=mkfs)
    daemon = bed.daemon(guest)
    chunk, faults, answers = data_chunk(guest), [], []
    for number in range(bed.tries(3, 10)):
        report(daemon, GIB)
        over = threading.Event()
        writer = threading.Thread(target=partial(_write_and_delete, guest, over), daemon=True)
        writer.start()
        time.sleep(bed.dice.uniform(0.1, 0.8))
        limit = bed.dice.choice((0, 50 * MIB, 200 * MIB))
        success = report(daemon, limit, CRITICAL)
        over.set()
        writer.join()
        growth = fill_really(guest)
        answers.append(f"{'yes' if success else 'no'}:{mib(limit)}/{mib(growth.image)}/{mib(growth.data)}")
        if success:
            # What the writer deletes after the answer may be written again until the balloon has taken it.
            faults += judged(growth, limit, chunk + SLACK, f"race {number}")
        _delete(guest, "race")
    bed.say(success_limit_image_data=",".join(answers), says=why(daemon))
    return faults


def _write_and_delete(guest: Guest, over: threading.Event) -> None:
    number = 0
    while not over.is_set():
        _, error = fill(guest.mountpoint / f"race{number}", 32 * MIB)
        if error or number % 4 == 3:
            _delete(guest, f"race{max(number - 3, 0)}")
        number += 1


@scenario("data-dup", quick=True)
def data_dup(bed: Testbed) -> list[str]:
    """Every byte of data counts twice with `-d dup`: the image grows by the limit, not by twice the limit."""
    guest = bed.guest(8 * GIB, mkfs=("-m", "dup", "-d", "dup"))
    fill(guest.mountpoint / "first", 4 * MIB)
    daemon = bed.daemon(guest)
    faults = []
    for limit in (615 * MIB,) if bed.quick else (1229 * MIB, 300 * MIB, 0):
        success = report(daemon, limit)
        shown = available(guest) or 0
        image, begun = image_bytes(guest), time.monotonic()
        growth = fill_really(guest)
        bed.say(limit=mib(limit), success=success, available=mib(shown), image_before=mib(image), written=str(growth),
                took_s=round(time.monotonic() - begun, 1))  # fmt: skip
        if success:
            faults += judged(growth, limit)
        else:
            faults.append(f"FAILED for {mib(limit)} MiB: {why(daemon)}")
    return faults


@scenario("profiles-settled")
def profiles(bed: Testbed) -> list[str]:
    """On every profile, with small and large nodes: several limits on a guest at rest, each filled for real."""
    faults = []
    for name, mkfs in PROFILES.items():
        guest = bed.guest(SIZE, mkfs=mkfs)
        daemon = bed.daemon(guest)
        for limit in (500 * MIB, 100 * MIB, 0, 200 * MIB):
            success = report(daemon, limit)
            growth = fill_really(guest)
            bed.say(profile=name, limit=mib(limit), success=success, written=str(growth))
            found = judged(growth, limit, what=f"{name}, {mib(limit)} MiB") if success else [f"{name}: {why(daemon)}"]
            faults += found
            time.sleep(0.2)
        daemon.kill()
        bed.close(guest)
    return faults


@scenario("deleted-a-moment-ago")
def deleted(bed: Testbed) -> list[str]:
    """Large files are deleted, also while still open, right before a strict report."""
    guest = bed.guest(SIZE)
    daemon = bed.daemon(guest)
    faults = []
    for number in range(bed.tries(2, 6)):
        report(daemon, GIB)
        path = guest.mountpoint / "large"
        fill(path, 800 * MIB)
        fd = os.open(path, os.O_RDONLY)
        path.unlink()
        if number % 2:
            os.close(fd)
        success = report(daemon, 100 * MIB)
        if number % 2 == 0:
            os.close(fd)
            time.sleep(3)  # the room comes back after the answer: the balloon must follow
        growth = fill_really(guest)
        bed.say(open_at_report=number % 2 == 0, success=success, written=str(growth))
        if success:
            faults += judged(growth, 100 * MIB, what=f"round {number}")
    return faults


def _register() -> None:
    for name, mkfs in PROFILES.items():
        add(f"strict-at-last-{name}", partial(strict_at_last, mkfs=mkfs), quick=name == "dup")
        if name in ("dup", "mixed"):
            add(f"racing-{name}", partial(racing, mkfs=mkfs))


_register()
