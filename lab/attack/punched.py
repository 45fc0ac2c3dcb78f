"""Extents that stay used for the little that is left of them: deleting that frees room which the host never had."""

from __future__ import annotations

import time

from lab.attack.oracle import fill_really, judged
from lab.attack.preallocation import preallocate, punch
from lab.attack.registry import scenario
from lab.attack.testbed import Testbed, mib, report, sync, why
from storaged.units import GIB, KIB, MIB

EXTENT = 128 * MIB
EXTENTS = 12
LIMIT = 100 * MIB


@scenario("preallocated-punched-out", quick=True)
def punched_out(bed: Testbed) -> list[str]:
    """All but 4 KiB of 12 preallocated extents is punched; after a report they are deleted and their room is filled."""
    guest = bed.guest(4 * GIB)
    daemon = bed.daemon(guest)
    paths = [guest.mountpoint / f"extent{number}" for number in range(EXTENTS)]
    for path in paths:
        preallocate(path, EXTENT)
        punch(path, 4 * KIB, EXTENT - 4 * KIB)
    sync(guest)
    success = report(daemon, LIMIT)
    bed.say(limit=mib(LIMIT), success=success, says=why(daemon))
    if not success:
        return []
    for path in paths:
        path.unlink()
    growth = fill_really(guest, [preallocate(guest.mountpoint / "taken", LIMIT)])
    time.sleep(1)
    return ["SUCCESS with 1536 MiB that can be freed and written", *judged(growth, LIMIT)]
