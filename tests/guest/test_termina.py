"""StartTermina: what may be asked for; both worlds under one contract; a btrfs that lost its newest tree root."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from lab.loop import run, workspace
from storaged.errors import ConfigError, InvalidRequest, Kind, StoragedError
from storaged.guest.mounts import Mounts
from storaged.guest.processes import Launch, Processes
from storaged.guest.termina import (
    MountResult,
    Termina,
    TerminaRequest,
    TerminaSettings,
    parse_termina,
    service_launches,
)
from storaged.sim.mounts import SimMounts
from storaged.sim.processes import SimSpawner
from tests.guest.places import REAL, Place, RealPlace, SimPlace, spoil

HOST = IPv4Address("100.115.92.1")
SUBNET = "100.115.92.192/28"
MIB = 1 << 20


@pytest.mark.parametrize(
    "subnet", ["", "1.2.3.4", "1.2.3.4/", "1.2.3.4/33", "1.2.3/8", "1.2.3.4/8 x", "::1/64", "1.2.3.4/255.0.0.0"]
)
def test_a_subnet_that_is_none(subnet: str) -> None:
    with pytest.raises(InvalidRequest, match="lxd_ipv4_subnet"):
        parse_termina(HOST, subnet, "")


@pytest.mark.parametrize("device", ["vdb", "/dev/../etc/passwd", "/dev/v\0", "-f"])
def test_a_device_that_is_none(device: str) -> None:
    with pytest.raises(InvalidRequest, match="stateful_device"):
        parse_termina(HOST, SUBNET, device)


def test_services_are_configuration() -> None:
    request = parse_termina(HOST, SUBNET, "")
    settings = TerminaSettings(services=("one -net {subnet} -host={address} 'two words'",), environment=("A=b=c",))
    (launch,) = service_launches(settings, request).values()
    assert launch.argv == (b"one", b"-net", SUBNET.encode(), b"-host=100.115.92.1", b"two words")
    assert launch.env == ((b"A", b"b=c"),)
    assert launch.respawn
    ours = service_launches(TerminaSettings(), request)
    assert [one.name for one in ours.values()] == ["lxcfs", "tremplin", "ndproxyd", "mcastd"]
    assert (b"LXD_DIR", b"/mnt/stateful/lxd") in next(iter(ours.values())).env
    for wrong in (
        TerminaSettings(services=("'",)),
        TerminaSettings(services=("",)),
        TerminaSettings(environment=("A",)),
    ):
        with pytest.raises(ConfigError, match="termina"):
            service_launches(wrong, request)


class World:
    """A place, and services in memory."""

    def __init__(self, place: Place, **settings: object) -> None:
        self.place = place
        self.spawner = SimSpawner()
        self.processes = Processes(self.spawner)
        self.mountpoint = f"{place.base}/stateful"
        self.settings = TerminaSettings(mountpoint=self.mountpoint, **settings)  # type: ignore[arg-type]
        self.termina = Termina(place.mounts, self.processes, self.settings)

    def request(self, device: str) -> TerminaRequest:
        """For this device."""
        return parse_termina(HOST, SUBNET, device)

    def services(self) -> list[str]:
        """What was started."""
        return [launch.name for launch in self.spawner.started]


@pytest.fixture(params=["sim", pytest.param("real", marks=REAL)])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """Each of both."""
    if request.param == "sim":
        yield World(SimPlace())
        return
    with workspace() as directory:
        place = RealPlace(directory)
        try:
            yield World(place)
        finally:
            await place.close()


@pytest.fixture
async def real() -> AsyncIterator[World]:
    """This kernel alone."""
    with workspace() as directory:
        place = RealPlace(directory)
        try:
            yield World(place)
        finally:
            await place.close()


ALL = ["lxcfs", "tremplin", "ndproxyd", "mcastd"]


@pytest.mark.parametrize("kind", ["", "btrfs"])
async def test_a_blank_disk_and_a_formatted_one(world: World, kind: str) -> None:
    device = world.place.device(kind)
    result = await world.termina.start(world.request(device))
    assert result.mount is MountResult.SUCCESS
    assert result.free > 50 * MIB
    assert await world.place.source(world.mountpoint) == device
    assert world.services() == ALL
    await world.processes.close()


async def test_a_second_call_changes_nothing(world: World) -> None:
    device = world.place.device("")
    first = await world.termina.start(world.request(device))
    await world.place.on(lambda: world.place.system.make_directories(f"{world.mountpoint}/kept"))
    again = await asyncio.gather(*(world.termina.start(world.request(device)) for _ in range(3)))
    assert [answer.mount for answer in again] == [first.mount] * 3
    assert world.services() == ALL, "each service is there once"
    assert await world.place.mode(f"{world.mountpoint}/kept") is not None
    await world.place.on(lambda: world.place.system.unmount(world.mountpoint))
    assert await world.place.source(world.mountpoint) == "", "it was mounted once"
    await world.processes.close()


async def test_another_disk_is_refused_while_one_is_mounted(world: World) -> None:
    await world.termina.start(world.request(world.place.device("btrfs")))
    with pytest.raises(StoragedError, match="already") as caught:
        await world.termina.start(world.request(world.place.device("btrfs")))
    assert caught.value.kind is Kind.PRECONDITION
    await world.processes.close()


@pytest.mark.parametrize("kind", ["ext4", "junk"])
async def test_a_disk_with_something_else_on_it_is_left_alone(world: World, kind: str) -> None:
    device = world.place.device(kind)
    found = await world.place.on(lambda: world.place.system.contents(device))
    with pytest.raises(StoragedError) as caught:
        await world.termina.start(world.request(device))
    assert caught.value.kind is Kind.INTERNAL
    assert await world.place.on(lambda: world.place.system.contents(device)) == found != ""
    assert await world.place.mode(world.mountpoint) is None
    assert world.services() == [], "nothing runs without the disk"


async def test_a_disk_that_is_not_there(world: World) -> None:
    with pytest.raises(StoragedError, match="No such file") as caught:
        await world.termina.start(world.request("/dev/no-such-disk"))
    assert caught.value.kind is Kind.INTERNAL


async def test_a_service_that_is_not_installed_is_named_and_the_others_run_once(world: World) -> None:
    settings = TerminaSettings(mountpoint=world.mountpoint, services=("lxcfs /x", "not-installed", "mcastd"))
    termina = Termina(world.place.mounts, world.processes, settings)
    device = world.place.device("")
    for _ in range(2):
        with pytest.raises(StoragedError, match="not-installed"):
            await termina.start(world.request(device))
    assert world.services() == ["lxcfs", "mcastd"]
    await world.processes.close()


async def test_a_caller_that_gives_up_stops_nothing_half_way(world: World) -> None:
    device = world.place.device("")
    call = asyncio.create_task(world.termina.start(world.request(device)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(20):
        while world.services() != ALL:  # noqa: ASYNC110  # nobody is told any more
            await asyncio.sleep(0.02)
    assert await world.place.source(world.mountpoint) == device
    await world.termina.start(world.request(device))
    assert world.services() == ALL
    await world.processes.close()


# --- partial loss -------------------------------------------------------------------------------------------------


async def test_a_damaged_disk_in_memory() -> None:
    place = SimPlace()
    device = place.device("damaged btrfs")
    world = World(place)
    for _ in range(2):
        result = await world.termina.start(world.request(device))
        assert result.mount is MountResult.PARTIAL_DATA_LOSS, "a second call tells the same"
    assert "rescue=usebackuproot" in place.sim.table[0][3]
    await world.processes.close()


async def test_an_old_kernel_gets_the_old_word() -> None:
    place = SimPlace()
    device = place.device("damaged btrfs")

    def old(source: str, target: str, fstype: str, flags: int, options: str) -> None:
        if "rescue=" in options:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        SimMounts.mount(place.sim, source, target, fstype, flags, options)

    place.sim.mount = old  # type: ignore[method-assign]
    world = World(place)
    assert (await world.termina.start(world.request(device))).mount is MountResult.PARTIAL_DATA_LOSS
    assert place.sim.table[0][3].endswith(",usebackuproot")
    await world.processes.close()


async def test_what_an_older_root_would_not_help_with_is_never_called_a_loss() -> None:
    place = SimPlace()
    tried = []

    def busy(source: str, target: str, fstype: str, flags: int, options: str) -> None:
        tried.append(options)
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    place.sim.mount = busy  # type: ignore[method-assign]
    world = World(place)
    with pytest.raises(StoragedError, match="busy"):
        await world.termina.start(world.request(place.device("btrfs")))
    assert len(tried) == 1


def lose_newest_root(device: str, *, all_of_them: bool = False) -> None:
    """Overwrite both copies of the tree root that the superblock names (and of every older one, if asked to)."""
    text = run("btrfs", "inspect-internal", "dump-super", "-f", device)
    newest = int(re.search(r"^root\s+(\d+)$", text, re.MULTILINE)[1])  # type: ignore[index]
    roots = {newest}
    if all_of_them:
        roots |= {int(number) for number in re.findall(r"backup_tree_root:\s+(\d+)", text)}
    mapped = run("btrfs-map-logical", "-l", str(newest), "-b", "16384", device)
    copies = [int(where) for where in re.findall(r"physical (\d+)", mapped)]
    assert len(copies) == 2
    for root in roots:  # all of them lie in one chunk; the tool does not map what is no longer in use
        for where in copies:
            spoil(device, where + root - newest, b"\xde" * 16384)


def used_btrfs(place: RealPlace) -> str:
    """A device whose btrfs has several generations of tree roots."""
    device = place.device("btrfs")
    # Without discard, which would take the older roots' blocks away at once.
    run("mount", "-o", "nodiscard", device, place.base)
    try:
        for number in range(4):
            Path(f"{place.base}/file{number}").write_bytes(b"x" * 100_000)
            run("btrfs", "filesystem", "sync", place.base)
    finally:
        run("umount", place.base)
    return device


@REAL
async def test_a_lost_newest_root_costs_the_newest_writes_alone(real: World) -> None:
    assert isinstance(real.place, RealPlace)
    place = real.place
    device = await place.on(lambda: used_btrfs(place))
    lose_newest_root(device)
    result = await real.termina.start(real.request(device))
    assert result.mount is MountResult.PARTIAL_DATA_LOSS
    assert "file0" in await place.on(lambda: os.listdir(real.mountpoint))
    assert (await real.termina.start(real.request(device))).mount is MountResult.PARTIAL_DATA_LOSS
    assert real.services() == ALL
    await real.processes.close()


@REAL
async def test_without_any_root_it_is_an_error_and_not_a_format(real: World) -> None:
    assert isinstance(real.place, RealPlace)
    place = real.place
    device = await place.on(lambda: used_btrfs(place))
    lose_newest_root(device, all_of_them=True)
    with pytest.raises(StoragedError) as caught:
        await real.termina.start(real.request(device))
    assert caught.value.kind is Kind.INTERNAL
    assert place.system.contents(device)
    assert await place.source(real.mountpoint) == ""


@REAL
async def test_the_filesystem_is_grown_to_its_device_at_the_first_call_alone(real: World) -> None:
    assert isinstance(real.place, RealPlace)
    place = real.place
    device = place.device("btrfs")
    image = run("losetup", "-n", "-O", "BACK-FILE", device)
    os.truncate(image, 512 * MIB)
    run("losetup", "-c", device)

    async def size() -> int:
        found = await place.on(lambda: os.statvfs(real.mountpoint))
        return found.f_blocks * found.f_frsize

    await real.termina.start(real.request(device))
    assert await size() == 512 * MIB
    await place.on(lambda: run("btrfs", "filesystem", "resize", "400M", real.mountpoint))
    await real.termina.start(real.request(device))
    assert await size() == 400 * MIB, "a filesystem that somebody shrank stays shrunk"
    line = await place.on(
        lambda: next(x for x in Path("/proc/thread-self/mounts").read_text().splitlines() if real.mountpoint in x)
    )
    assert "user_subvol_rm_allowed" in line
    assert "discard" in line
    await real.processes.close()


async def test_services_find_their_environment() -> None:
    world = World(SimPlace())
    await world.termina.start(world.request("/dev/vdb"))
    launches: list[Launch] = world.spawner.started
    assert all(launch.respawn and not launch.console for launch in launches)
    assert launches[1].argv == (b"tremplin", b"-lxd_subnet", SUBNET.encode())
    assert dict(launches[1].env)[b"LXD_CONF"] == b"/mnt/stateful/lxd_conf"
    await world.processes.close()


async def test_the_default_device() -> None:
    place = SimPlace()
    termina = Termina(Mounts(place.sim), Processes(SimSpawner()))
    await termina.start(parse_termina(HOST, SUBNET, ""))
    assert place.sim.mounted("/mnt/stateful") == "/dev/vdb"
    assert place.sim.grown == ["/mnt/stateful"]
    await termina._processes.close()
