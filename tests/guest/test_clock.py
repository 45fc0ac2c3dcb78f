"""The wall clock: which times are right, and what the kernel is told. This machine's clock is never set."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import ConfigError, InvalidRequest, Kind, StoragedError
from storaged.guest.clock import LAST_SECOND, NANOS, Clock, ClockPort, ClockSettings, check_time, check_zone
from storaged.sim.clock import SETTABLE_S, SimWallClock, SimZones

INT64, INT32 = 1 << 63, 1 << 31


@given(
    st.one_of(st.integers(-INT64, INT64 - 1), st.integers(-2, 2), st.integers(LAST_SECOND - 2, LAST_SECOND + 2)),
    st.one_of(st.integers(-INT32, INT32 - 1), st.integers(-2, 2), st.integers(NANOS - 2, NANOS + 2)),
)
def test_every_timestamp_is_a_time_or_names_the_field(seconds: int, nanos: int) -> None:
    if 1 <= seconds < 253402300800 and 0 <= nanos < 1_000_000_000:
        assert divmod(check_time(seconds, nanos), 1_000_000_000) == (seconds, nanos)
        return
    field = "nanos" if 1 <= seconds < 253402300800 else "seconds"
    with pytest.raises(InvalidRequest, match=rf"^time\.{field} "):
        check_time(seconds, nanos)


def test_the_last_second_is_that_of_the_year_9999() -> None:
    assert time.gmtime(LAST_SECOND)[:6] == (9999, 12, 31, 23, 59, 59)


@given(st.text(max_size=20))
def test_a_zone_name_leads_nowhere_else(name: str) -> None:
    try:
        found = check_zone(name)
    except InvalidRequest:
        return
    assert found == name
    assert os.path.normpath(f"/base/{name}") == f"/base/{name}"
    assert name.isascii()
    assert name.isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "/",
        "..",
        ".",
        "../../../etc/shadow",
        "Europe/../../shadow",
        "Europe/./Berlin",
        "Europe//Berlin",
        "Europe/",
        "Europe/Berlin\n",
        "Europe/Berlin\0",
        "Europe/Ber lin",
        "-Berlin",
        "Zürich",
        "zone.tab",
        "a" * 129,
        "a/" * 10_000,
    ],
)
def test_what_is_no_zone_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^timezone_name ") as caught:
        check_zone(name)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    "name", ["UTC", "Etc/GMT+12", "Etc/GMT-14", "America/Port-au-Prince", "America/Argentina/Ushuaia"]
)
def test_names_of_the_database_are_taken(name: str) -> None:
    assert check_zone(name) == name


@pytest.mark.parametrize("path", ["", "etc/localtime", "/etc/../etc/localtime", "/etc/", "/etc/a\0"])
@pytest.mark.parametrize("key", ["zoneinfo", "localtime"])
def test_settings_that_make_no_sense_are_refused(key: str, path: str) -> None:
    with pytest.raises(ConfigError, match=rf"^clock\.{key} = "):
        ClockSettings(**{key: path})


# --- SetTime --------------------------------------------------------------------------------------------------


class Refusing(ClockPort):
    """A clock that cannot be set."""

    def __init__(self, number: int) -> None:
        self._number = number

    def set_wall(self, nanoseconds: int) -> None:
        raise OSError(self._number, os.strerror(self._number))


async def test_the_clock_is_set_to_the_nanosecond() -> None:
    wall = SimWallClock()
    clock = Clock(wall, SimZones())
    await clock.set_time(1_900_000_000, 123_456_789)
    assert wall.nanoseconds == 1_900_000_000_123_456_789
    for seconds, nanos in ((0, 1), (-1, 0), (1_900_000_001, NANOS), (1_900_000_001, -1), (LAST_SECOND + 1, 0)):
        with pytest.raises(InvalidRequest):
            await clock.set_time(seconds, nanos)
    assert wall.nanoseconds == 1_900_000_000_123_456_789


async def test_a_time_that_the_kernel_cannot_hold_is_the_callers_mistake() -> None:
    for seconds in (LAST_SECOND, SETTABLE_S, 1):
        with pytest.raises(InvalidRequest, match=rf"time\.seconds {seconds}: "):
            await Clock(SimWallClock(), SimZones()).set_time(seconds, 0)


async def test_a_missing_right_is_ours() -> None:
    with pytest.raises(StoragedError, match=r"not permitted \(CAP_SYS_TIME is needed\)") as caught:
        await Clock(Refusing(errno.EPERM), SimZones()).set_time(1_900_000_000, 0)
    assert caught.value.kind is Kind.INTERNAL


async def test_the_clock_does_not_wait_for_a_slow_zone() -> None:
    zones, wall = SimZones(), SimWallClock()
    zones.faults.hang("set_zone")
    clock = Clock(wall, zones)
    slow = asyncio.ensure_future(clock.set_zone("UTC", bind=False))
    await asyncio.sleep(0.02)
    await asyncio.wait_for(clock.set_time(1_900_000_000, 0), 1)
    assert not slow.done()
    zones.faults.clear()
    await slow
    assert zones.local == "UTC"


WITHOUT_THE_RIGHT = """
import sys
from storaged.guest.clock import KernelClock
rights = next(int(line.split()[1], 16) for line in open("/proc/self/status") if line.startswith("CapEff:"))
assert not rights >> 25 & 1, "CAP_SYS_TIME is still there"
for text in sys.argv[1:]:
    try:
        KernelClock().set_wall(int(text))
    except OSError as error:
        print(error.errno)
"""


@pytest.mark.root
def test_the_kernel_itself_is_asked() -> None:
    """It looks at the value before it looks at the right, so that a process without the right sees what it was told."""
    values = [
        1_900_000_000 * NANOS,
        SETTABLE_S * NANOS - 1,
        SETTABLE_S * NANOS,
        ((1 << 63) - 1),
        1 << 63,
        LAST_SECOND * NANOS,
    ]
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_time", sys.executable, "-c", WITHOUT_THE_RIGHT, *map(str, values)],
        check=True,
        capture_output=True,
        text=True,
        cwd=os.getcwd(),
    )
    refused, allowed = errno.EINVAL, errno.EPERM
    assert [int(line) for line in done.stdout.split()] == [allowed, allowed, refused, refused, refused, refused]
    for value in values:  # the simulation draws the line in the same place
        if value < SETTABLE_S * NANOS:
            SimWallClock().set_wall(value)
            continue
        with pytest.raises(OSError, match="Invalid argument"):
            SimWallClock().set_wall(value)
