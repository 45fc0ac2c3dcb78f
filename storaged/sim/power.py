"""A power switch that only remembers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from storaged.errors import StoragedError


@dataclass(slots=True)
class SimPower:
    """Keeps what was done, in order; `fault` is raised by `check`."""

    last: ClassVar[bool] = False
    done: list[str] = field(default_factory=list)
    fault: StoragedError | None = None

    def check(self) -> None:
        if self.fault is not None:
            raise self.fault
        self.done.append("check")

    def sync(self) -> None:
        self.done.append("sync")

    def power_off(self) -> None:
        self.done.append("power off")
