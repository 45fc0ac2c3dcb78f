"""What a service tells its manager (sd_notify(3)); nothing where there is none."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping


class Notifier:
    """Sends states to `$NOTIFY_SOCKET`."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        path = environment.get("NOTIFY_SOCKET", "")
        self._path = "\0" + path[1:] if path.startswith("@") else path
        if not self._path.startswith(("/", "\0")):
            self._path = ""
        self._status = ""
        usec, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", str(os.getpid()))
        ours = self._path and usec.isdigit() and pid == str(os.getpid())
        self.watchdog_s = int(usec) / 1e6 if ours else 0.0
        """Within this the manager wants to hear from us; 0 when it does not."""

    def _send(self, *lines: str) -> None:
        if not self._path:
            return
        # A manager that does not read must not stop us.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as s:
            s.sendto("\n".join(lines).encode(), self._path)

    def ready(self) -> None:
        """We serve, for the first time or after a reload."""
        self._send("READY=1")

    def reloading(self) -> None:
        """The settings are being read again."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """We take no new calls."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """The engine answers."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for people, when it is news."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")
