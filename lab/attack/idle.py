"""Reports to a guest whose applications do nothing: the balloon's work must not write."""

from __future__ import annotations

import time

from lab.attack.oracle import available, image_bytes
from lab.attack.registry import scenario
from lab.attack.testbed import CRITICAL, LOW, NORMAL, PLENTY, Testbed, mib, sync
from lab.daemon import Daemon
from lab.loop import Guest, fill, run
from storaged.units import GIB, MIB

SETTLES_S = 5.0
PER_REPORT = MIB
FIRST = 128 * MIB


def _grown(guest: Guest, daemon: Daemon, what: str, reports: list[tuple[int, int]]) -> tuple[int, list[str]]:
    before = image_bytes(guest)
    answers = []
    for limit, level in reports:
        answers.append(daemon.report_free(limit + GIB, level))
        time.sleep(0.5)
    time.sleep(SETTLES_S if len(reports) == 1 else 1.0)
    grown = image_bytes(guest) - before
    allowed = PER_REPORT * len(reports)
    faults = [f"{what}: idle image grew by {grown / MIB:.1f} MiB in {len(reports)} reports"] if grown > allowed else []
    faults += [f"{what}: an idle report is answered {answer}" for answer in answers if answer]
    return grown, faults


@scenario("idle-first-report", quick=True)
def first_report(bed: Testbed) -> list[str]:
    """An idle guest of 8 GiB with default settings is told LOW: its image must not grow."""
    faults = []
    for attempt in range(bed.tries(1 if bed.place == "disk" else 2, 6)):
        guest = bed.guest(8 * GIB)
        daemon = bed.daemon(guest, config=None)
        grown, found = _grown(guest, daemon, f"first report, try {attempt}", [(FIRST, LOW)])
        bed.say(attempt=attempt, grown_mib=round(grown / MIB, 2))
        faults += found
        daemon.kill()
        bed.close(guest)
    return faults


@scenario("idle-many-reports")
def many_reports(bed: Testbed) -> list[str]:
    """Reports at every level to an idle guest, empty, and with half of its data deleted."""
    faults = []
    for age in ("empty", "half deleted"):
        grew = []
        guest = bed.guest(8 * GIB)
        if age != "empty":
            for number in range(8):
                fill(guest.mountpoint / f"data{number}", 200 * MIB)
            sync(guest)
            for number in range(0, 8, 2):
                (guest.mountpoint / f"data{number}").unlink()
            sync(guest)
            run("fstrim", guest.mountpoint)  # or blocks that the host gets back would hide what is written
        daemon = bed.daemon(guest, config=None)
        steps = [
            (FIRST, LOW),
            (0, CRITICAL),
            (2 * GIB, NORMAL),
            (300 * MIB, LOW),
            (PLENTY, NORMAL),
            (0, CRITICAL),
            (GIB, NORMAL),
            (GIB, LOW),
        ]
        for _ in range(bed.tries(1, 3)):
            for step in steps:
                allowed = "plenty" if step[0] == PLENTY else f"{mib(step[0])} MiB"
                grown, found = _grown(guest, daemon, f"{age}, {allowed}", [step, step])
                grew.append(round(grown / MIB, 1))
                faults += found
        bed.say(age=age, available_mib=mib(available(guest) or 0), grown_mib_per_two_reports=grew)
        daemon.kill()
        bed.close(guest)
    return faults
