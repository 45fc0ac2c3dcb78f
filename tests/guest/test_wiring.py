"""The modules as the daemon makes them: on the machine's own places, which here are a namespace's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.app import sim_guest
from storaged.config import Settings
from tests.guest.netns import Lab

CALLS = f"""
import asyncio, os
from ipaddress import IPv4Address
from storaged.app import real_guest
from storaged.config import Settings

async def main():
    guest = real_guest(Settings())
    network, resolv, clock = guest.network, guest.resolv, guest.clock
    await network.configure(*map(IPv4Address, ("{Lab.GUEST}", "255.255.255.252", "{Lab.ROUTER}")))
    await resolv.set(["192.0.2.1"], [])
    await clock.set_zone("UTC", bind=False)
    print(open("/run/resolv.conf").readline().strip(), os.readlink("/etc/localtime"))

asyncio.run(main())
"""
# No step is taken on this machine's own /run and /etc: each waits for the one before.
ELSEWHERE = 'mount -t tmpfs none /run && mount --bind "$1" /etc && exec "$2" -c "$3"'


@pytest.fixture
def lab() -> Iterator[Lab]:
    one = Lab()
    try:
        yield one
    finally:
        one.close()


@pytest.mark.root
@pytest.mark.skipif(not Path("/usr/share/zoneinfo/UTC").exists(), reason="needs the time zone database")
def test_the_daemon_configures_the_machine_that_it_runs_on(lab: Lab, tmp_path: Path) -> None:
    try:
        said = lab.guest.run("unshare", "--mount", "sh", "-c", ELSEWHERE, "sh", str(tmp_path), sys.executable, CALLS)
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stderr)
    assert said == "nameserver 192.0.2.1 /usr/share/zoneinfo/UTC\n"
    assert lab.seen_from_far() == Lab.GUEST
    assert (tmp_path / "localtime").is_symlink()


def test_a_simulation_has_nothing_of_the_machine() -> None:
    guest = sim_guest(Settings())
    for port in (guest.network._port, guest.resolv._port, guest.clock._clock, guest.clock._zones):
        assert type(port).__module__.startswith("storaged.sim.")
