"""`storaged-host serve --sim N` in a process of its own."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

STARTS_WITHIN_S = 20.0


def free_port() -> int:
    """A port that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class SimulatedHost:
    """`storaged-host serve --sim N` in a process of its own. `url`: its console."""

    def __init__(self, directory: Path, count: int = 6) -> None:
        self._log = directory / "host.log"
        self.control = f"unix:{directory}/host.sock"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self._command = [
            *(sys.executable, "-m", "storaged.host", "serve", "--sim", str(count)),
            *("--control", self.control, "--console", f"tcp:127.0.0.1:{self.port}"),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until its console answers. Raises RuntimeError with its log when it does not."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until = time.monotonic() + STARTS_WITHIN_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise RuntimeError(f"storaged-host does not serve:\n{self._log.read_text()}")
            time.sleep(0.05)

    def stop(self) -> int:
        """SIGTERM and wait; its exit code."""
        if self._process is None:
            return 0
        process, self._process = self._process, None
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
