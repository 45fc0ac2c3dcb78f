"""The errors that cross rooms. Each has a kind, which `rpc.status` alone turns into a gRPC code."""

from __future__ import annotations

import enum


class Kind(enum.Enum):
    """What went wrong, in the terms of whoever asked."""

    INVALID = "invalid"  # the request can never be right
    OUT_OF_RANGE = "out of range"  # well formed, but outside what is possible now
    NOT_FOUND = "not found"  # nothing of that name
    PRECONDITION = "precondition"  # not in this state
    BUSY = "busy"  # somebody else holds what is needed; try again
    UNAVAILABLE = "unavailable"  # the world does not answer
    UNSUPPORTED = "unsupported"  # never on this machine
    INTERNAL = "internal"


class StoragedError(Exception):
    """An error with a kind and a sentence for the person who asked."""

    kind = Kind.INTERNAL

    def __init__(self, message: str, kind: Kind | None = None) -> None:
        super().__init__(message)
        self.message = message
        if kind is not None:
            self.kind = kind


class InvalidRequest(StoragedError):
    """The request can never be right: names the field, the value and what would be accepted."""

    kind = Kind.INVALID


class FilesystemError(StoragedError):
    """The filesystem refused. `errno` is the kernel's, 0 when the refusal is ours."""

    def __init__(self, message: str, errno: int = 0, kind: Kind | None = None) -> None:
        super().__init__(message, kind)
        self.errno = errno


class Unsupported(StoragedError):
    """Never possible on this machine."""

    kind = Kind.UNSUPPORTED


class NotBtrfs(Unsupported):
    """No btrfs is mounted there, or none yet."""


class Unfit(StoragedError):
    """What `storaged check` calls FAILED about this machine or this mount."""

    kind = Kind.PRECONDITION


class ConfigError(StoragedError):
    """A configuration key or command-line value that is not accepted."""

    kind = Kind.INVALID
