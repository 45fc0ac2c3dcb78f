"""The wall clock and the time zone: what can be right (pure), and two ports for what is then done."""

from __future__ import annotations

import errno
import os
import re
import time
from dataclasses import dataclass, field
from typing import Protocol

from storaged.errors import ConfigError, InvalidRequest, StoragedError
from storaged.guest.files import is_plain_path
from storaged.guest.serial import OneByOne

LAST_SECOND = 253_402_300_799
"""The end of the year 9999, and of what a Timestamp may say."""
NANOS = 1_000_000_000
LONGEST_ZONE = 128
_PART = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_+-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class ClockSettings:
    """What an administrator may set."""

    zoneinfo: str = field(default="/usr/share/zoneinfo", metadata={"help": "where the time zone database is"})
    localtime: str = field(
        default="/etc/localtime", metadata={"help": "the file that says which zone is the local one"}
    )

    def __post_init__(self) -> None:
        for name in ("zoneinfo", "localtime"):
            path = getattr(self, name)
            if not is_plain_path(path):
                raise ConfigError(f"clock.{name} = {path!r}: an absolute path without . and .. is accepted")


def check_time(seconds: int, nanos: int) -> int:
    """Nanoseconds since 1970 of a Timestamp. Raises InvalidRequest that names the field that is wrong."""
    if seconds == 0:
        raise InvalidRequest("time.seconds is not set: seconds since 1970 are accepted")
    if not 0 < seconds <= LAST_SECOND:
        raise InvalidRequest(f"time.seconds {seconds}: 1 to {LAST_SECOND} (the end of the year 9999) are accepted")
    if not 0 <= nanos < NANOS:
        raise InvalidRequest(f"time.nanos {nanos}: 0 to {NANOS - 1} are accepted")
    return seconds * NANOS + nanos


def check_zone(name: str) -> str:
    """The name of a zone, as it is; whether there is such a zone is for the port to see. Raises InvalidRequest."""
    if not name:
        raise InvalidRequest("timezone_name is empty: a name such as Europe/Berlin is accepted")
    if len(name) > LONGEST_ZONE or not all(map(_PART.fullmatch, name.split("/"))):
        raise InvalidRequest(
            f"timezone_name {name[: LONGEST_ZONE + 1]!r} is no name of a zone: names such as Europe/Berlin are accepted"
            " (letters, digits, _, + and - between slashes)"
        )
    return name


class ClockPort(Protocol):
    """The wall clock."""

    def set_wall(self, nanoseconds: int) -> None:
        """Set it to so much after 1970. Raises OSError: EINVAL when the kernel cannot hold that time, EPERM."""


class ZonePort(Protocol):
    """The local time zone."""

    def set_zone(self, name: str, *, bind: bool) -> None:
        """Make zone `name` the local one, by a link or by a bind mount.

        Blocks. Raises StoragedError. When there is no such zone, nothing was changed.
        """


class KernelClock:
    """The machine's wall clock."""

    def set_wall(self, nanoseconds: int) -> None:
        try:
            time.clock_settime_ns(time.CLOCK_REALTIME, nanoseconds)
        except OverflowError:  # more than 63 bits, which is also more than the kernel's own limit
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None


class Clock:
    """What a host may ask of the clock; its calls take effect in the order in which they came."""

    def __init__(self, clock: ClockPort, zones: ZonePort) -> None:
        self._clock = clock
        self._zones = zones
        self._calls = OneByOne("clock")

    async def set_time(self, seconds: int, nanos: int) -> None:
        """Set the wall clock. Not queued behind a change of the zone: the time is right only now."""
        nanoseconds = check_time(seconds, nanos)
        try:
            self._clock.set_wall(nanoseconds)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise InvalidRequest(
                    f"time.seconds {seconds}: the kernel holds no time before its own start nor after the year 2232"
                ) from error
            hint = " (CAP_SYS_TIME is needed)" if error.errno == errno.EPERM else ""
            raise StoragedError(f"setting the clock: {os.strerror(error.errno or 0)}{hint}") from error

    async def set_zone(self, name: str, *, bind: bool) -> None:
        """Set the local time zone. The name is checked before anything is changed."""
        await self._calls.run(self._zones.set_zone, check_zone(name), bind=bind)
