"""What must be true after any crash: the files, the filesystem, and a daemon that was started on what was left."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from lab.daemon import Daemon
from lab.loop import run
from storaged.rpc.proto import storaged_v1_pb2, vm_guest_pb2
from storaged.units import GIB, KIB, MIB, sector_floor

SETTLES_WITHIN_S = 20.0
SLACK = 4 * MIB
ENDED = (storaged_v1_pb2.JOB_DONE, storaged_v1_pb2.JOB_FAILED, storaged_v1_pb2.JOB_CANCELLED)
BROKEN = re.compile(r"^[A-Z]\w+ failed: |background work failed|cannot be believed|could not")
"""What the daemon notes when its own work went wrong; that a job was cut off is no such thing."""
RECORD = 16 * KIB
BITE = 8 * MIB

QUIET = """
[storage]
# No pressure level is ever entered for its number: the machine's write-back limits stay as they are.
critical_enter = 0
critical_leave = 0
low_enter = 0
low_leave = 0
# Where a test reports 0 it is entered all the same; then these leave the machine fast.
low_dirty = "1GiB"
critical_dirty = "1GiB"
retry_most_s = 2
"""


def available(mountpoint: Path) -> int:
    """What statvfs shows an application."""
    answer = os.statvfs(mountpoint)
    return answer.f_bavail * answer.f_frsize


def size_of(mountpoint: Path) -> int:
    """Bytes the filesystem has."""
    answer = os.statvfs(mountpoint)
    return answer.f_blocks * answer.f_frsize


def digest_of(path: Path) -> str:
    """SHA-256 of a file; what stands in the way where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return str(error)


def write_durably(path: Path, content: bytes) -> str:
    """A new file that survives whatever comes; its SHA-256."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def record_at(number: int) -> bytes:
    """The `number`th record of a log that some application appends to."""
    return hashlib.shake_128(b"%d" % number).digest(RECORD)


def damaged_records(path: Path, certain: int) -> str:
    """What is wrong with the first `certain` records of such a log; empty when nothing is."""
    number = 0
    try:
        with path.open("rb") as file:
            for number in range(certain):
                if file.read(RECORD) != record_at(number):
                    return f"record {number} of {certain} in {path.name} is damaged"
    except OSError as error:
        return f"record {number} of {certain}: {error}"
    return ""


def spread(mountpoint: Path, size: int, pieces: int, write: Callable[[int], None]) -> None:
    """Call `write(number)` `pieces` times while `size` bytes fill up altogether: what it writes lies ever higher.

    The rest of the room is given back at the end.
    """
    filler = mountpoint / "filler"
    try:
        with filler.open("wb") as file:
            for number in range(pieces):
                # In small bites, or the kernel leaves room in each chunk, and everything written goes to the first.
                for at in range(size * number // pieces, size * (number + 1) // pieces, BITE):
                    os.posix_fallocate(file.fileno(), at, BITE)
                write(number)
    finally:
        filler.unlink(missing_ok=True)
        run("btrfs", "filesystem", "sync", mountpoint)


class Recovery:
    """Looks at a daemon that was started after a crash. Every method returns what is wrong, a sentence each."""

    def __init__(self, daemon: Daemon, mountpoint: Path) -> None:
        self._daemon = daemon
        self._mountpoint = mountpoint

    def all(self, allow: int) -> list[str]:
        """Everything; `allow` is what the next report leaves to applications."""
        try:
            return [*self.truthful(), *self.protected(), *self.reported(allow), *self.writable()]
        except grpc.RpcError as error:
            return [f"a call failed: {error}"]

    def truthful(self) -> list[str]:
        """No job goes on for ever, and what is said of size and job is what the filesystem has."""
        status, report = self._daemon.status(), self._daemon.report()
        faults = []
        if status.resize_in_progress:
            try:
                status = self._daemon.wait_resized(SETTLES_WITHIN_S)
            except TimeoutError as error:
                return [f"a job goes on for ever: {error}"]
            faults.append("a job is in progress right after the start")
        size = size_of(self._mountpoint)
        if sector_floor(status.current_size) != size:
            faults.append(f"GetResizeStatus says {status.current_size}, the filesystem has {size}")
        if report.HasField("job"):
            job = report.job
            state = storaged_v1_pb2.JobState.Name(job.state)
            if job.state not in ENDED:
                faults.append(f"the job is {state}")
            elif job.state == storaged_v1_pb2.JOB_DONE:
                if job.current_size != job.requested_size and not job.best_effort:
                    faults.append(f"a job that is done asked for {job.requested_size}, reached {job.current_size}")
            elif not job.reason:
                faults.append(f"the job is {state} without a reason")
        faults += [f"it notes: {note}" for note in report.notes if BROKEN.search(note)]
        if "cannot be believed" in self._daemon.log.read_text(encoding="utf-8"):
            faults.append("the journal was damaged")
        if report.filesystem.read_only:
            faults.append("the filesystem is read-only")
        return faults

    def protected(self) -> list[str]:
        """The limit that was in force is kept again, before the host says anything."""
        report = self._daemon.report()
        if not report.balloon.HasField("limit_bytes"):
            return []
        most = report.balloon.limit_bytes + report.filesystem.data_chunk_bytes + SLACK
        until = time.monotonic() + SETTLES_WITHIN_S
        while (shown := available(self._mountpoint)) > most:
            if time.monotonic() > until:
                return [f"applications can write {shown}, {report.balloon.limit_bytes} are allowed"]
            time.sleep(0.05)
        return []

    def reported(self, allow: int) -> list[str]:
        """A report is answered by a balloon that is right; one of plenty gives everything back."""
        faults = []
        if (result := self._daemon.report_free(GIB + allow)) != vm_guest_pb2.SUCCESS:
            faults.append(f"a report is answered {result}: {self._daemon.report().balloon.failure_reason}")
        space = self._daemon.report().filesystem
        if max(shown := available(self._mountpoint), space.available_bytes) > allow + space.data_chunk_bytes + SLACK:
            faults.append(f"after a report of {allow} applications can write {shown} or {space.available_bytes}")
        result, held = self._daemon.report_free(1 << 50), self._daemon.report().balloon.size_bytes
        if result != vm_guest_pb2.SUCCESS or held:
            faults.append(f"after a report of plenty, answered {result}, the balloon holds {held}")
        return faults

    def writable(self) -> list[str]:
        """An application can write where statvfs shows room."""
        if available(self._mountpoint) < 16 * MIB:
            return []
        path = self._mountpoint / "afterwards"
        path.unlink(missing_ok=True)
        try:
            write_durably(path, os.urandom(MIB))
        except OSError as error:
            return [f"a write is refused: {error}"]
        path.unlink()
        return []
