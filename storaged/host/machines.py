"""Whether a guest's machine runs: silence alone never says that it has ended."""

from __future__ import annotations

import os


class Machine:
    """A machine by its PID file (QEMU's -pidfile); without one it counts as running for ever."""

    def __init__(self, pid_file: str) -> None:
        self._pid_file = pid_file

    def runs(self) -> bool:
        """True while a process of that id lives, and when that cannot be known."""
        if not self._pid_file:
            return True
        try:
            with open(self._pid_file, "rb") as file:
                pid = int(file.read(32))
        except FileNotFoundError:
            return False
        except (OSError, ValueError):
            return True
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):
            return True
        return True
