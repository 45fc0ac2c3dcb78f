"""Sockets in the filesystem: what a killed owner left makes room, what somebody lives in does not."""

from __future__ import annotations

import os
import socket
import stat

from storaged.errors import ConfigError, Kind, StoragedError


def clear(path: str) -> None:
    """Make room for our socket; raises StoragedError when somebody lives there."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(f"unix:{path}: there is already something that is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return
    raise StoragedError(f"unix:{path} is served by another process", Kind.BUSY)
