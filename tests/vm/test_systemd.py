"""systemd is process 1, and the daemon one of its units."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from lab.loop import run
from lab.vm.disks import blank
from lab.vm.guests import SETTINGS
from lab.vm.host import EMPTY
from lab.vm.parts import ROOT
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.units import GIB
from tests.vm.conftest import MakeGuest

pytestmark = [pytest.mark.vm, pytest.mark.vm_more, pytest.mark.timeout(300)]
UNIT = "storaged-guest.service"
STATE = f"systemctl list-jobs; systemctl --failed; systemctl status {UNIT}; journalctl -b --no-pager | tail -n 60"
INSTALL = f"""
grep -q messagebus /etc/passwd || echo messagebus:x:101:101::/nonexistent:/usr/sbin/nologin >>/etc/passwd
grep -q messagebus /etc/group || echo messagebus:x:101: >>/etc/group
echo 0123456789abcdef0123456789abcdef >/etc/machine-id # else a wizard waits for somebody to answer
mkdir -p /etc/storaged /etc/systemd/system
cat >/etc/storaged/storaged.toml <<'END'
{SETTINGS.replace("[serve]", "[serve]" + chr(10) + "wait_for_stateful = true")}
END
cat >/usr/bin/storaged <<'END'
#!/bin/sh
PYTHONPATH=/opt/product:/opt/site exec /usr/bin/python3 -m storaged "$@"
END
chmod 755 /usr/bin/storaged
cat >/etc/systemd/system/t.target <<'END'
[Unit]
Requires=basic.target
Wants={UNIT} dbus.socket systemd-logind.service
After=basic.target
AllowIsolate=yes
END
cat >/etc/systemd/system/{UNIT} <<'END'
{(ROOT / "packaging/systemd" / UNIT).read_text()}
END
echo /usr/lib/systemd/systemd --unit=t.target >/run/next
"""


async def test_the_daemon_as_a_unit_and_the_end(make_guest: MakeGuest, place: Path) -> None:
    guest = make_guest()
    disk = blank(place / "stateful", 4 * GIB)
    await guest.begin(disk)
    began = time.monotonic()
    await guest.machine.run(INSTALL)
    try:
        await guest.hear()
    except TimeoutError:
        print(await guest.machine.run(STATE, check=False))
        raise
    print(f"VmReady {time.monotonic() - began:.1f} s after systemd began")
    assert await guest.machine.run("cat /proc/1/comm") == "systemd"
    assert await guest.machine.run(f"systemctl is-active {UNIT}") == "active"
    started = await guest.start_termina()
    assert started.mount_result == vm.StartTerminaResponse.SUCCESS
    # What the daemon mounts is seen by everybody: the unit has no mount namespace of its own.
    assert await guest.machine.run("stat -f -c %T /mnt/stateful") == "btrfs"

    # A daemon that is killed comes back, says so, and finds its filesystem again.
    pid = await guest.machine.run(f"systemctl show -P MainPID {UNIT}")
    await guest.machine.run(f"kill -9 {pid}")
    async with asyncio.timeout(60):
        while guest.host.startup.times < 2:
            await asyncio.sleep(0.1)
    assert await guest.machine.run(f"systemctl show -P MainPID {UNIT}") != pid
    assert (await guest.mounted()).filesystem.size_bytes == 4 * GIB

    began = time.monotonic()
    await guest.host.maitred.Shutdown(EMPTY, timeout=30)
    answered = time.monotonic() - began
    assert await guest.machine.ended(within_s=90) == 0
    print(f"Shutdown: answered in {answered:.1f} s, over in {time.monotonic() - began:.1f} s")
    assert "Power down" in guest.machine.console_path.read_text(errors="replace")
    await asyncio.to_thread(run, "btrfs", "check", "--readonly", disk)
