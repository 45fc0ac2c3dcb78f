"""What was certain at which point of a write log: the facts that no power cut after it may take back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lab import recovery

NEVER = 1 << 62


@dataclass(slots=True)
class Kept:
    """A file that was fsynced; `certain` is the log's length then, `gone` when somebody began to delete it."""

    digest: str
    certain: int
    gone: int = NEVER


@dataclass(slots=True)
class Asked:
    """A number the daemon was given; `begun` is the log's length before, `certain` after it was answered."""

    number: int
    begun: int
    certain: int = NEVER
    done: int = NEVER
    """For a resize: the log's length when it was told to be done."""


@dataclass(slots=True)
class Ledger:
    """Everything noted; written by several threads, read after they have ended."""

    position: Callable[[], int]
    files: dict[str, Kept] = field(default_factory=dict)
    records: list[int] = field(default_factory=list)
    """The log's length when each record of the application's own log was certain."""
    limits: list[Asked] = field(default_factory=list)
    resizes: list[Asked] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(log's length, size) for every size the daemon told."""
    phases: list[tuple[int, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def phase(self, name: str) -> None:
        """What the scenario does from now on; for the counts."""
        self.phases.append((self.position(), name))

    def write(self, root: Path, name: str, content: bytes) -> None:
        """Write a new file and fsync it."""
        digest = recovery.write_durably(root / name, content)
        with self.lock:
            self.files[name] = Kept(digest, self.position())

    def delete(self, root: Path, name: str) -> None:
        """Delete a file; from now on it may be there or not."""
        self.files[name].gone = self.position()
        (root / name).unlink()

    def phase_at(self, position: int) -> str:
        """What the scenario did at that length of the log."""
        return next((name for begun, name in reversed(self.phases) if begun <= position), "mount")

    def lost(self, root: Path, moment: int) -> list[str]:
        """Which certain files a cut at `moment`, a length of the log, has lost or damaged."""
        faults = []
        for name, kept in self.files.items():
            if kept.certain > moment or kept.gone <= moment:
                continue
            if (found := recovery.digest_of(root / name)) != kept.digest:
                faults.append(f"lost or damaged: {name}: {found}")
        certain = sum(1 for position in self.records if position <= moment)
        if certain and (fault := recovery.damaged_records(root / "records", certain)):
            faults.append(fault)
        return faults

    def possible(self, asked: list[Asked], moment: int) -> set[int] | None:
        """The numbers that may be in force after a cut: the last certain one, and every later one that had begun.

        None when there was no certain one: then it may also be that nothing was heard of any.
        """
        last = max((index for index, one in enumerate(asked) if one.certain <= moment), default=None)
        if last is None:
            return None
        return {one.number for one in asked[last:] if one.begun <= moment}
