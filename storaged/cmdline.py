"""What the kernel's command line says to a guest's daemon."""

from __future__ import annotations

import logging
from dataclasses import dataclass

log = logging.getLogger(__name__)
STARTUP_LISTENER_PORT = 7777


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """The options of the contract."""

    startup_processes: bool = True
    listen_port: int = STARTUP_LISTENER_PORT
    """Of the host's startup listener."""


def parse(text: str) -> KernelOptions:
    """The options in `text`, the last of each counts; one that cannot be understood is as if it were not there."""
    startup, port = True, STARTUP_LISTENER_PORT
    for word in text.split():
        if word == "--":
            break  # the rest is for init
        name, _, value = word.partition("=")
        if name == "maitred.no_startup_processes":
            startup = False
        elif name == "maitred.listen_port" and value.isascii() and value.isdigit() and 0 < int(value) < 0xFFFFFFFF:
            port = int(value)
    return KernelOptions(startup, port)


def read(path: str = "/proc/cmdline") -> KernelOptions:
    """The options of this boot."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return parse(file.read())
    except OSError as error:
        log.warning("kernel command line %s: %s", path, error.strerror)
        return KernelOptions()
