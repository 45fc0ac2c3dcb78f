"""Preallocated extents in memory."""

from __future__ import annotations

from storaged.core.model import Unwritten


class SimPreallocated:
    """`core.ports.Preallocated` that finds what `size`, `known` and `files` say."""

    def __init__(self, size: int = 0, *, known: bool = True, files: int = 0) -> None:
        self.size = size
        self.known = known
        self.files = files
        self.started = self.closed = False
        self.looks: list[tuple[int, float]] = []

    def start(self) -> None:
        self.started = True

    def look(self, balloon_root: int, patience_s: float) -> Unwritten:
        self.looks.append((balloon_root, patience_s))
        return Unwritten(self.size, known=self.known, files=self.files)

    def close(self) -> None:
        self.closed = True
