"""Balance, defragment, scrub, trim, resize and freeze while reports come in."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial

import grpc

from lab.attack.oracle import (
    SHOWN,
    SLACK,
    Allocation,
    available,
    data_chunk,
    fill_really,
    image_bytes,
    judged,
    over,
    reach,
)
from lab.attack.registry import add, scenario
from lab.attack.testbed import CRITICAL, Testbed, mib, report, sync, until, why
from lab.loop import Guest, fill, run
from storaged.units import GIB, MIB

SIZE = 6 * GIB
FROZEN_WITHIN_S = 3.0
METADATA_COMFORT = 64 * MIB
"""With less in its chunks, metadata keeps room for the next one (docs/promise.md)."""
COMMANDS: dict[str, list[list[str]]] = {
    "full-balance": [["btrfs", "balance", "start", "--full-balance", "{}"]],
    "data-balance": [["btrfs", "balance", "start", "-dusage=90", "{}"]],
    "defragment": [["btrfs", "filesystem", "defragment", "-r", "-f", "{}"]],
    "scrub": [["btrfs", "scrub", "start", "-B", "{}"]],
    "trim": [["fstrim", "{}"]],
    "resize": [["btrfs", "filesystem", "resize", "-256M", "{}"], ["btrfs", "filesystem", "resize", "max", "{}"]],
}


@contextlib.contextmanager
def repeated(guest: Guest, commands: list[list[str]]) -> Iterator[list[int]]:
    """Run the commands again and again until the block ends; their exit codes."""
    done, codes = threading.Event(), list[int]()

    def loop() -> None:
        while not done.is_set():
            for command in commands:
                words = [str(guest.mountpoint) if word == "{}" else word for word in command]
                codes.append(subprocess.run(words, check=False, capture_output=True).returncode)
            done.wait(0.05)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield codes
    finally:
        done.set()
        thread.join(120)


def during(bed: Testbed, name: str) -> list[str]:
    """Reports while an administrator's command runs again and again: no false SUCCESS, then a true one."""
    guest = bed.guest(SIZE)
    for number in range(6):
        fill(guest.mountpoint / f"file{number}", 100 * MIB)
    for number in range(0, 6, 2):
        (guest.mountpoint / f"file{number}").unlink()
    sync(guest)
    daemon = bed.daemon(guest)
    chunk, faults, answers = data_chunk(guest), [], []
    image = image_bytes(guest)
    with repeated(guest, COMMANDS[name]) as codes:
        for number in range(bed.tries(4, 12)):
            limit = bed.dice.choice((0, 100 * MIB, 500 * MIB, GIB, 2 * GIB))
            begun = time.monotonic()
            success = report(daemon, limit, bed.dice.choice((1, 2, CRITICAL)))
            more = over(guest, limit, chunk + 4 * MIB) if success else 0
            answers.append(f"{'yes' if success else 'no'}:{mib(limit)}:{time.monotonic() - begun:.1f}s")
            if more:
                faults.append(
                    f"{name}, report {number}: SUCCESS for {mib(limit)} MiB, {mib(more)} MiB more can be written"
                )
            time.sleep(bed.dice.uniform(0, 0.5))
    grown = image_bytes(guest) - image
    bed.say(command=name, runs=len(codes), failed=sum(map(bool, codes)), answers=",".join(answers), grown=mib(grown))
    settled = until(lambda: report(daemon, 200 * MIB), 10, 0.5)
    headroom = Allocation(guest).metadata_headroom()
    growth = fill_really(guest)
    bed.say(command=name, settled=settled, metadata_headroom=mib(headroom), written=str(growth))
    if not settled:
        faults.append(f"{name}: still FAILED 10 s after it: {why(daemon)}")
        return faults
    # A balance of metadata may leave it a chunk of a few MiB: then room for the next one is left open to data.
    slack = chunk if headroom < METADATA_COMFORT else SLACK
    return faults + judged(growth, 200 * MIB, slack, what=f"after {name}")


@scenario("mixed-block-groups", quick=True)
def mixed(bed: Testbed) -> list[str]:
    """Mixed block groups at limits of 0 and 200 MiB, with metadata in use."""
    faults = []
    for size in (512 * MIB,) if bed.quick else (512 * MIB, 4 * GIB):
        guest = bed.guest(size, mkfs=("--mixed",))
        folder = guest.mountpoint / "small"
        folder.mkdir()
        for number in range(3000):
            (folder / str(number)).write_bytes(bytes(1500))
        daemon = bed.daemon(guest)
        for limit in (0, 200 * MIB, 0):
            success = report(daemon, limit)
            shown = available(guest) or 0
            growth = fill_really(guest)
            bed.say(size=mib(size), limit=mib(limit), success=success, available=mib(shown), written=str(growth))
            faults += judged(growth, limit, what=f"mixed, {mib(size)} MiB") if success else [f"FAILED: {why(daemon)}"]
        daemon.kill()
        bed.close(guest)
    return faults


@scenario("cancelled-shrink")
def cancelled_shrink(bed: Testbed) -> list[str]:
    """A shrink by hand is cancelled, then nothing is allowed."""
    guest = bed.guest(SIZE)
    for number in range(12):
        fill(guest.mountpoint / f"file{number}", 150 * MIB)
    for number in range(0, 12, 2):
        (guest.mountpoint / f"file{number}").unlink()
    daemon = bed.daemon(guest)
    faults = []
    for number in range(bed.tries(2, 4)):
        report(daemon, GIB)
        shrink = subprocess.Popen(["btrfs", "filesystem", "resize", "1500M", str(guest.mountpoint)],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        time.sleep(bed.dice.uniform(0.05, 0.5))
        subprocess.run(
            ["btrfs", "filesystem", "resize", "cancel", str(guest.mountpoint)], check=False, capture_output=True
        )
        code = shrink.wait(60)
        success = report(daemon, 0, CRITICAL)
        says = why(daemon)
        if not success:
            success = until(lambda: report(daemon, 0, CRITICAL), 10, 0.5)
            if not success:
                faults.append(f"still FAILED 10 s after shrink {number}: {says}")
        shown = available(guest)
        growth = fill_really(guest)
        bed.say(shrink=code, success=success, available=mib(shown or 0), written=str(growth), says=says)
        if success:
            faults += judged(growth, 0, what=f"shrink {number}")
        run("btrfs", "filesystem", "resize", "max", guest.mountpoint)
    return faults


@scenario("frozen", quick=True)
def frozen(bed: Testbed) -> list[str]:
    """GetReport while the filesystem is frozen is answered within 3 s; a report's answer after the thaw is true."""
    guest = bed.guest(4 * GIB)
    daemon = bed.daemon(guest)
    report(daemon, GIB)
    faults, took = [], []
    result: list[bool | str] = []

    def tell() -> None:
        try:
            result.append(report(daemon, 200 * MIB))
        except grpc.RpcError as error:
            result.append(str(error.code()))

    thaw = partial(subprocess.run, ["fsfreeze", "-u", str(guest.mountpoint)], check=False, capture_output=True)
    bed.finally_do(thaw)
    run("fsfreeze", "-f", guest.mountpoint)
    try:
        thread = threading.Thread(target=tell, daemon=True)
        for number in range(3):
            begun = time.monotonic()
            try:
                daemon.report()
            except grpc.RpcError as error:
                faults.append(f"GetReport on a frozen filesystem: {error.code()}")
            took.append(round(time.monotonic() - begun, 2))
            if number == 0:
                thread.start()
                time.sleep(1)
    finally:
        thaw()
    thread.join(25)
    bed.say(get_report_s=took, report_while_frozen=result, says=why(daemon))
    if max(took) > FROZEN_WITHIN_S:
        faults.append(f"GetReport took {max(took)} s on a frozen filesystem")
    if result and result[0] is True and (found := reach(guest, 0) or 0) > 200 * MIB + SHOWN:
        faults.append(f"SUCCESS for 200 MiB, {mib(found)} MiB can be written")
    if not until(lambda: report(daemon, 100 * MIB), 5, 0.5):
        faults.append(f"FAILED after the thaw: {why(daemon)}")
    elif (found := reach(guest, 0) or 0) > 100 * MIB + SHOWN:
        faults.append(f"after the thaw: SUCCESS for 100 MiB, {mib(found)} MiB can be written")
    return faults


def _register() -> None:
    for name in COMMANDS:
        add(f"during-{name}", partial(during, name=name), quick=name == "full-balance")


_register()
