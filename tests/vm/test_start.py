"""A host's start sequence, call by call as it makes them, and the end of the machine."""

from __future__ import annotations

import hashlib
import re
import struct
import tempfile
import time
from pathlib import Path

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from lab.loop import run, workspace
from lab.vm.disks import blank
from lab.vm.guests import VirtualGuest
from lab.vm.host import EMPTY
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.units import GIB, MIB
from tests.vm import ninep
from tests.vm.conftest import MakeGuest
from tests.vm.ninep import Export

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]
SHARED_PORT = 9999
SOON = 20.0


def ipv4(text: str) -> int:
    """As the contract has it: the bytes in network order, read as a number of this machine's kind."""
    return int(struct.unpack("=I", bytes(map(int, text.split("."))))[0])


async def configure(guest: VirtualGuest) -> None:
    """What a host says first."""
    maitred = guest.host.maitred
    config = vm.IPv4Config(
        address=ipv4("100.115.92.26"), netmask=ipv4("255.255.255.252"), gateway=ipv4("100.115.92.25")
    )
    await maitred.ConfigureNetwork(vm.NetworkConfigRequest(ipv4_config=config), timeout=SOON)
    names = vm.ResolvConfig(nameservers=["100.115.92.25"], search_domains=["lan"])
    await maitred.SetResolvConfig(vm.SetResolvConfigRequest(resolv_config=names), timeout=SOON)
    await maitred.SetTimezone(vm.SetTimezoneRequest(timezone_name="Europe/Berlin"), timeout=SOON)
    assert "100.115.92.26/30" in await guest.machine.run("ip -4 addr show dev eth0")
    assert "default via 100.115.92.25" in await guest.machine.run("ip route")
    assert (await guest.machine.run("cat /run/resolv.conf")).split("\n")[:2] == [
        "nameserver 100.115.92.25",
        "search lan",
    ]
    assert await guest.machine.run("date -d @1700000000 +%H:%M%z") == "23:13+0100"


@pytest.mark.skipif(bool(ninep.why_not()), reason=f"vm: {ninep.why_not()}")
async def test_the_whole_sequence_and_the_end(make_guest: MakeGuest, place: Path) -> None:
    guest = make_guest()
    disk = blank(place / "stateful", 4 * GIB)
    other = blank(place / "other", 1 * GIB)
    await guest.begin(disk)
    await guest.machine.add_disk(other)
    await guest.serve()
    await configure(guest)
    maitred = guest.host.maitred

    # A disk, formatted because it was blank.
    mount = vm.MountRequest(
        source="/dev/vdc",
        target="/mnt/other",
        fstype="btrfs",
        create_target=True,
        permissions=0o750,
        mkfs_if_needed=True,
    )
    assert (await maitred.Mount(mount, timeout=SOON)).error == 0
    assert await guest.machine.run("stat -c %a /mnt/other; stat -f -c %T /mnt/other") == "750\nbtrfs"

    # A directory of the host, read and written from both sides.
    shared = Path(tempfile.mkdtemp(prefix="storaged-vm-", dir="/dev/shm"))  # diod wants no overlay below it
    export = Export(shared, f"{guest.machine.uds}_{SHARED_PORT}")
    try:
        (shared / "from-host").write_text("hello guest\n")
        await export.start()
        await maitred.Mount9P(vm.Mount9PRequest(port=SHARED_PORT, target="/mnt/shared"), timeout=SOON)
        assert export.connections == 1
        assert await guest.machine.run("cat /mnt/shared/from-host") == "hello guest"
        written = await guest.machine.run(
            "head -c 3000000 /dev/urandom >/mnt/shared/from-guest; sha256sum </mnt/shared/from-guest"
        )
        assert written.split()[0] == hashlib.sha256((shared / "from-guest").read_bytes()).hexdigest()
        assert "nosuid,nodev" in await guest.machine.run("grep ' /mnt/shared ' /proc/mounts")

        # Until StartTermina the storage calls say what is missing; then they answer.
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await maitred.GetAvailableSpace(EMPTY, timeout=SOON)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        began = time.monotonic()
        started = await guest.start_termina()
        print(f"StartTermina on a blank disk: {time.monotonic() - began:.1f} s")
        assert started.mount_result == vm.StartTerminaResponse.SUCCESS
        assert 3 * GIB < started.free_bytes < 4 * GIB
        available = (await maitred.GetAvailableSpace(EMPTY, timeout=SOON)).available_space
        assert abs(available - started.free_bytes) < 300 * MIB
        assert (await guest.status()).current_size == 4 * GIB
        assert 256 * MIB <= (await maitred.GetResizeBounds(EMPTY, timeout=SOON)).minimum_size < 2 * GIB

        # The clock, past the end of 32 bits and a century on.
        for seconds in (2**31 + 1000, 4102444800):
            await maitred.SetTime(vm.SetTimeRequest(time=Timestamp(seconds=seconds)), timeout=SOON)
            assert 0 <= int(await guest.machine.run("date +%s")) - seconds < 30
        assert (await guest.status()).current_size == 4 * GIB

        await guest.machine.run("dd if=/dev/urandom of=/mnt/stateful/kept bs=1M count=8 2>/dev/null")
        kept = (await guest.machine.run("sha256sum </mnt/stateful/kept")).split()[0]
        await maitred.PrepareToSuspend(EMPTY, timeout=SOON)

        # The end: an answer, then no machine.
        began = time.monotonic()
        await maitred.Shutdown(EMPTY, timeout=30)
        answered = time.monotonic() - began
        assert await guest.machine.ended(within_s=30) == 0
        print(f"Shutdown: answered in {answered:.1f} s, over in {time.monotonic() - began:.1f} s")
        assert "Power down" in guest.machine.console_path.read_text(errors="replace")
    finally:
        await export.close()
        run("rm", "-rf", shared)
    run("btrfs", "check", "--readonly", disk)
    run("btrfs", "check", "--readonly", other)

    # On the used disk nothing is formatted: all is there.
    again = make_guest()
    await again.begin_serving(disk)
    started = await again.start_termina()
    assert started.mount_result == vm.StartTerminaResponse.SUCCESS
    assert (await again.machine.run("sha256sum </mnt/stateful/kept")).split()[0] == kept


def damage(disk: Path) -> None:
    """A btrfs whose newest tree root cannot be read, while the one before it can."""
    with workspace() as directory:
        run("mkfs.btrfs", "-q", disk)
        loop = run("losetup", "--show", "-f", "--direct-io=off", disk)
        target = directory / "mnt"
        target.mkdir()
        run("mount", "-o", "nodiscard", loop, target)
        for number in range(4):
            (target / f"file{number}").write_text(f"content {number}\n")
            run("btrfs", "filesystem", "sync", target)
        run("umount", target)
        dump = run("btrfs", "inspect-internal", "dump-super", loop)
        found = re.search(r"^root\s+(\d+)", dump, re.MULTILINE)
        assert found is not None
        mapped = run("btrfs-map-logical", "-l", found[1], "-b", "16384", loop)
        run("losetup", "-d", loop)
    places = [int(at) for at in re.findall(r"physical (\d+) device", mapped)]
    assert places
    with disk.open("r+b") as file:
        for at in places:
            file.seek(at)
            file.write(b"\xa5" * 16384)


async def test_a_damaged_disk_comes_up_from_an_older_root(make_guest: MakeGuest, place: Path) -> None:
    guest = make_guest()
    disk = blank(place / "stateful", 2 * GIB)
    damage(disk)
    await guest.begin_serving(disk)
    started = await guest.start_termina()
    assert started.mount_result == vm.StartTerminaResponse.PARTIAL_DATA_LOSS
    assert await guest.machine.run("cat /mnt/stateful/file0 /mnt/stateful/file1") == "content 0\ncontent 1"
    assert (await guest.status()).current_size == 2 * GIB
    await guest.machine.run("echo new >/mnt/stateful/new; sync")


async def test_a_disk_that_is_beyond_repair_is_left_as_it_is(make_guest: MakeGuest, place: Path) -> None:
    guest = make_guest()
    disk = blank(place / "stateful", 2 * GIB)
    with disk.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"not a filesystem")
        file.seek(70_000)
        file.write(b"\xa5" * 4096)
    await guest.begin_serving(disk)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await guest.start_termina()
    assert refused.value.code() is grpc.StatusCode.INTERNAL
    with disk.open("rb") as file:
        content = file.read(6 * MIB)
    assert content[70_000:74_096] == b"\xa5" * 4096
    assert content[5 * MIB : 5 * MIB + 16] == b"not a filesystem"
