"""`storaged-host serve --sim N` in a process of its own."""

from __future__ import annotations

import socket
from pathlib import Path

from lab.host import HostProcess, console_link


def free_port() -> int:
    """A port that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class SimulatedHost(HostProcess):
    """`storaged-host serve --sim N` in a process of its own. `url`: its console; `link` signs in to it, once."""

    def __init__(self, directory: Path, count: int = 6) -> None:
        self.control = f"unix:{directory}/host.sock"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        console = f"tcp:127.0.0.1:{self.port}"
        super().__init__(directory / "host.log", "--sim", str(count), "--control", self.control, "--console", console)

    @property
    def link(self) -> str:
        """A new one."""
        return console_link(self.control)

    def _ready(self) -> bool:
        """Whether its console answers."""
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
