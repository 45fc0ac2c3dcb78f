"""`storaged check`: what would work on this machine, what not, and why. Looks only; changes nothing."""

from __future__ import annotations

import enum
import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from storaged.errors import StoragedError
from storaged.units import MIB, format_size

OLDEST_KERNEL = (5, 14)
"""RESIZE knows `cancel`, and sysfs shows exclusive_operation as we read it, since this one."""
CAP_SYS_ADMIN = 21  # include/uapi/linux/capability.h


class Verdict(enum.Enum):
    """What a line says."""

    OK = "ok"
    WARNING = "warning"  # works, with less than everything
    FAILED = "failed"  # storaged cannot do its work


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was looked at."""

    topic: str
    verdict: Verdict
    reason: str


def examine(stateful: str) -> Iterator[Line]:
    """Every line, in the order in which one builds on the other."""
    yield _kernel(platform.release())
    yield _rights()
    yield from _filesystem(stateful)
    yield _sysctl()
    yield _events()


def unfit(release: str, *, read_only: bool, stateful: str) -> str:
    """Why the engine cannot do its work on Linux `release`, or on what is mounted at `stateful`; empty if it can."""
    match = re.match(r"(\d+)\.(\d+)", release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < OLDEST_KERNEL:
        return f"Linux {release} is older than 5.14: a resize could not be cancelled"
    return f"{stateful} is mounted read-only" if read_only else ""


def _kernel(release: str) -> Line:
    problem = unfit(release, read_only=False, stateful="")
    return Line("kernel", Verdict.FAILED if problem else Verdict.OK, problem or f"Linux {release}")


def _rights() -> Line:
    with open("/proc/self/status", encoding="ascii") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    if effective >> CAP_SYS_ADMIN & 1:
        return Line("rights", Verdict.OK, "CAP_SYS_ADMIN is there")
    return Line("rights", Verdict.FAILED, "CAP_SYS_ADMIN is missing: run as root (or use `serve --sim`)")


def _filesystem(stateful: str) -> Iterator[Line]:
    try:
        # Imported here: the libraries may be what is missing.
        from storaged.balloon.file import BtrfsBalloonFile
        from storaged.balloon.target import comfortable_headroom
        from storaged.btrfs.filesystem import BtrfsFilesystem
    except ImportError as error:
        yield Line("libraries", Verdict.FAILED, f"{error}; install libbtrfsutil and btrfsutil 6.10 to 6.13")
        return
    yield Line("libraries", Verdict.OK, "btrfs and btrfsutil can be loaded")
    try:
        filesystem = BtrfsFilesystem(stateful)
        space = filesystem.space()
    except StoragedError as error:
        yield Line("filesystem", Verdict.FAILED, error.message)
        return
    try:
        size = format_size(space.size)
        # The kernel has a line of its own.
        problem = unfit("{}.{}".format(*OLDEST_KERNEL), read_only=space.read_only, stateful=stateful)
        fine = f"btrfs of {size} on {filesystem.device_path}, one device"
        yield Line("filesystem", Verdict.FAILED if problem else Verdict.OK, problem or fine)
        if space.exclusive_operation == "none":
            yield Line("exclusive operation", Verdict.OK, "none is running")
        else:
            text = f"{space.exclusive_operation}: the balloon cannot grow and nothing can be resized until it ends"
            yield Line("exclusive operation", Verdict.WARNING, text)
        headroom = f"{format_size(space.metadata_headroom)} before a new chunk is needed"
        low = space.metadata_headroom < comfortable_headroom(space) and space.unallocated < space.metadata_chunk
        yield Line("metadata", Verdict.WARNING if low else Verdict.OK, headroom + (", no room for one" if low else ""))
        if filesystem.discard_supported():
            yield Line("discard", Verdict.OK, "freed blocks can go back to the host")
        else:
            text = f"{filesystem.device_path} cannot discard: freed blocks never go back to the host"
            yield Line("discard", Verdict.WARNING, text)
        try:
            balloon = BtrfsBalloonFile(filesystem.mountpoint, look_only=True)
            try:
                held, found = balloon.size(), list(balloon.found)
            finally:
                balloon.close()
            verdict = Verdict.WARNING if any(warning for _, warning in found) else Verdict.OK
            text = f"holds {format_size(held)}" if held >= MIB else "none yet"
            yield Line("balloon", verdict, "; ".join([text, *(said for said, _ in found)]))
        except StoragedError as error:
            yield Line("balloon", Verdict.WARNING, error.message)
    finally:
        filesystem.close()


def _sysctl() -> Line:
    if os.access("/proc/sys/vm/dirty_bytes", os.W_OK):
        return Line("write-back limits", Verdict.OK, "vm.dirty_* can be set")
    return Line("write-back limits", Verdict.WARNING, "vm.dirty_* cannot be set: a full host meets more dirty data")


def _events() -> Line:
    try:
        import pyudev

        pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel").start()
    except (ImportError, OSError) as error:
        return Line("capacity events", Verdict.WARNING, f"{error}; a grow polls for its device instead")
    return Line("capacity events", Verdict.OK, "the kernel tells when the disk has grown")


def main(stateful: str, *, as_json: bool = False) -> int:
    """Print every line; 1 when storaged could not do its work here, else 0."""
    lines = list(examine(stateful))
    if as_json:
        print(json.dumps([{**asdict(line), "verdict": line.verdict.value} for line in lines], indent=2))
    else:
        mark = {Verdict.OK: "ok     ", Verdict.WARNING: "warning", Verdict.FAILED: "FAILED "}
        width = max(len(line.topic) for line in lines)
        for line in lines:
            print(f"{mark[line.verdict]}  {line.topic:<{width}}  {line.reason}")
    failed = any(line.verdict is Verdict.FAILED for line in lines)
    if failed and not as_json:
        print("storaged check: something that storaged needs is missing", file=sys.stderr)
    return 1 if failed else 0
