"""A pool of the host that lies on a dm-thin pool: the machine is the host here, its kernel has device-mapper."""

from __future__ import annotations

import json

import pytest

from storaged.units import MIB
from tests.vm.conftest import MakeGuest

pytestmark = [pytest.mark.vm, pytest.mark.vm_more, pytest.mark.timeout(200)]

POOL, BLOCK = 96 * MIB, 64 * 1024
WRITTEN = 40 * MIB
SETUP = f"""
set -e
mkdir -p /tmp/thin && cd /tmp/thin
truncate -s 4M metadata && truncate -s {POOL} data
meta=$(losetup -f --show metadata) data=$(losetup -f --show data)
dmsetup create pool --table "0 {POOL // 512} thin-pool $meta $data {BLOCK // 512} 0 1 error_if_no_space"
dmsetup mknodes
dmsetup message pool 0 "create_thin 0"
dmsetup create volume --table "0 {4 * POOL // 512} thin /dev/mapper/pool 0"
dmsetup mknodes
mkfs.ext4 -q -O ^has_journal /dev/mapper/volume
mkdir -p /tmp/mounted && mount -o noinit_itable /dev/mapper/volume /tmp/mounted
"""
TOLD = f"""
import json, os, subprocess, time
from storaged.host import devicemapper
from storaged.host.watch import FilesystemSource, ThinSource

source = ThinSource(FilesystemSource("/tmp/mounted"), "pool")
for ask, words in ((devicemapper.status, ["status", "--noflush"]), (devicemapper.table, ["table"])):
    tool = subprocess.run(["dmsetup", *words, "pool"], check=True, capture_output=True, text=True)
    assert ask("pool").split() == tool.stdout.split(), (ask("pool"), tool.stdout)
began = time.monotonic()
for _ in range(200):
    source.free()
took_s = (time.monotonic() - began) / 200
try:
    devicemapper.status("none")
except devicemapper.DeviceMapperError as error:
    missing = error.message

def write(name, size):
    written = 0
    with open("/tmp/mounted/" + name, "wb", buffering=0) as file:
        try:
            while written < size:
                written += file.write(bytes(min(1 << 20, size - written)))
            os.fsync(file.fileno())
        except OSError as error:
            return error.errno
    return 0

seen = [source.free()]
assert write("a", {WRITTEN}) == 0
seen.append(source.free())
os.unlink("/tmp/mounted/a")
os.sync()
subprocess.run(["fstrim", "/tmp/mounted"], check=True)
ends = time.monotonic() + 20
while source.free() < seen[0] - {MIB} and time.monotonic() < ends:
    time.sleep(0.1)
seen.append(source.free())
seen.append(FilesystemSource("/tmp/mounted").free())
error = write("b", {2 * POOL})
ends = time.monotonic() + 20
while source.free() and time.monotonic() < ends:
    time.sleep(0.1)
print(json.dumps(dict(seen=seen, error=error, left=source.free(), took_s=took_s, missing=missing)))
"""


async def test_what_a_thin_pool_has_left_is_what_the_host_has(make_guest: MakeGuest) -> None:
    guest = make_guest()
    await guest.begin()
    await guest.machine.run(SETUP, within_s=60)
    await guest.machine.run(f"cat >/tmp/told.py <<'END'\n{TOLD}\nEND")
    said = json.loads((await guest.machine.run("python3 /tmp/told.py", within_s=100)).split("\n")[-1])
    before, written, trimmed, promised = said["seen"]
    print(
        {name: f"{size // MIB} MiB" for name, size in zip(("before", "written", "trimmed"), said["seen"], strict=False)}
    )
    print(f"{said['took_s'] * 1e6:.0f} us a look")
    assert said["took_s"] < 0.002, "no process is started"
    assert said["missing"] == "device-mapper device none: there is no such device"
    assert before < POOL < promised, "the volume promises more than there is"
    assert WRITTEN <= before - written <= WRITTEN + 4 * MIB
    assert trimmed >= before - MIB, "what is discarded comes back to the pool"
    assert said["error"], "the pool ended before the filesystem did"
    assert said["left"] == 0
