"""Large sparse filesystems: answers come in time, and are true."""

from __future__ import annotations

import threading
import time
from functools import partial

import grpc

from lab.attack.oracle import SHOWN, available, fill_really, judged, reach
from lab.attack.registry import add, scenario
from lab.attack.testbed import Testbed, mib, report, why
from lab.daemon import Daemon
from lab.loop import Guest
from storaged.units import GIB, MIB

TIB = 1 << 40
RAISED_FOR_S = 0.5
WITHIN_S = 2.0
LARGEST_WITHIN_S = 15.0
ALLOCATES_WITHIN_S = 150.0
LATE_S = 0.1
"""What the call itself may take."""


def timed(guest: Guest, daemon: Daemon, limit: int, within_s: float, what: str) -> tuple[str, list[str]]:
    """One report: how it went, and faults when it is late, false or FAILED."""
    begun = time.monotonic()
    try:
        success = report(daemon, limit)
    except grpc.RpcError as error:
        took = time.monotonic() - begun
        return f"{took:.1f}s:error", [f"{what}: no answer after {took:.1f} s: {error.code()}"]
    took = time.monotonic() - begun
    faults = []
    found = reach(guest, 0)
    if not success:
        faults.append(f"{what}: FAILED for {mib(limit)} MiB after {took:.1f} s: {why(daemon)}")
    elif found is not None and found > limit + SHOWN:
        faults.append(f"{what}: SUCCESS for {mib(limit)} MiB, {mib(found)} MiB can be written")
    if took > within_s + LATE_S:
        faults.append(f"{what}: answered after {took:.1f} s, expected within {within_s:g} s")
    return f"{took:.2f}s:{'yes' if success else 'no'}", faults


def raise_and_drop(bed: Testbed, size: int, limits: tuple[int, ...]) -> list[str]:
    """A limit, half more, and the first again half a second later, several times."""
    guest = bed.guest(size)
    daemon = bed.daemon(guest)
    faults = []
    _, found = timed(guest, daemon, limits[0], LARGEST_WITHIN_S, "first report")
    faults += found
    for limit in limits[-2:] if bed.quick else limits:
        went = []
        for number in range(bed.tries(1, 5)):
            for step, wanted in (("hold", limit), ("raise", limit * 3 // 2), ("drop", limit)):
                text, found = timed(guest, daemon, wanted, WITHIN_S, f"{step} {number} at {mib(limit)} MiB")
                went.append(text)
                faults += found
                time.sleep(RAISED_FOR_S)
        bed.say(size_gib=size // GIB, limit=mib(limit), went=",".join(went))
    daemon.report_free(GIB + 200 * MIB)
    growth = fill_really(guest)
    bed.say(written=str(growth))
    return faults + judged(growth, 200 * MIB)


@scenario("sixteen-tib", places=("shm",))
def sixteen(bed: Testbed) -> list[str]:
    """16 TiB: answers come within 15 s and are true, also FAILED while the kernel allocates; the last ones are SUCCESS.

    The kernel takes half a minute and more to allocate 16 TiB of chunks, whoever asks for them.
    """
    guest = bed.guest(16 * TIB)
    daemon = bed.daemon(guest)
    slowest, over, went, faults = [0.0], threading.Event(), [], []

    def look() -> None:
        while not over.wait(0.2):
            begun = time.monotonic()
            try:
                daemon.available()
            except grpc.RpcError:
                return
            slowest[0] = max(slowest[0], time.monotonic() - begun)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        for limit in (100 * GIB, GIB, 0, TIB, 300 * MIB):
            begun = time.monotonic()
            while True:
                text, found = timed(guest, daemon, limit, LARGEST_WITHIN_S, f"{mib(limit)} MiB")
                went.append(text)
                if not text.endswith(":no") or time.monotonic() - begun > ALLOCATES_WITHIN_S:
                    break
            faults += found
        if not went[-1].endswith(":yes"):
            faults.append("the last report is not answered SUCCESS")
    finally:
        over.set()
        thread.join(25)
    bed.say(went=",".join(went), slowest_call_s=round(slowest[0], 2), available=mib(available(guest) or 0))
    if slowest[0] > WITHIN_S:
        faults.append(f"GetAvailableSpace took {slowest[0]:.1f} s meanwhile")
    return faults


def _register() -> None:
    for name, size in (("one-tib", TIB), ("two-tib", 2 * TIB)):
        run = partial(raise_and_drop, size=size, limits=(10 * GIB, size // 4, 500 * MIB))
        add(name, run, places=("shm",), quick=name == "one-tib")


_register()
