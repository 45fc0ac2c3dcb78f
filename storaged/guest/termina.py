"""The container guest: its stateful disk is formatted when blank, mounted and grown, then its services run."""

from __future__ import annotations

import asyncio
import enum
import errno
import ipaddress
import logging
from dataclasses import dataclass, field

from storaged.errors import ConfigError, InvalidRequest, Kind, StoragedError
from storaged.guest.mounts import Mounts, MountSystem, absolute, format_blank
from storaged.guest.processes import Launch, Processes, Status, parse_launch

log = logging.getLogger(__name__)

RESCUES = ("rescue=usebackuproot", "usebackuproot")
"""The second for kernels before 5.9; those of today no longer know it."""
_NOT_ABOUT_THE_DATA = {
    errno.EACCES,
    errno.EBUSY,
    errno.EPERM,
    errno.ENODEV,
    errno.ENOMEM,
    errno.ENOTBLK,
    errno.ENOTDIR,
    errno.ENXIO,
}
"""An older tree root would help with none of these, and its mount would be mistaken for a loss."""


@dataclass(frozen=True, slots=True)
class TerminaSettings:
    """What StartTermina does."""

    mountpoint: str = field(default="/mnt/stateful", metadata={"help": "Where the stateful disk is mounted."})
    device: str = field(default="/dev/vdb", metadata={"help": "The stateful disk, when the host names none."})
    options: str = field(
        default="user_subvol_rm_allowed,discard", metadata={"help": "Mount options of the stateful disk."}
    )
    services: tuple[str, ...] = field(
        default=(
            "lxcfs /var/lib/lxcfs",
            "tremplin -lxd_subnet {subnet}",
            "ndproxyd eth0 lxdbr0",
            "mcastd eth0 lxdbr0",
        ),
        metadata={
            "help": "Programs to keep running, with their arguments;"
            " {subnet} is the containers' subnet, {address} the host's address."
        },
    )
    environment: tuple[str, ...] = field(
        default=("LXD_DIR=/mnt/stateful/lxd", "LXD_CONF=/mnt/stateful/lxd_conf"),
        metadata={"help": "NAME=VALUE pairs that these programs find in their environment."},
    )


class MountResult(enum.Enum):
    """How the stateful disk was mounted; the values are the contract's."""

    SUCCESS = 1
    PARTIAL_DATA_LOSS = 2


@dataclass(frozen=True, slots=True)
class TerminaRequest:
    """What a host asks for. Make it with `parse_termina`."""

    address: ipaddress.IPv4Address
    subnet: str
    device: str


@dataclass(frozen=True, slots=True)
class TerminaResult:
    """How it went."""

    mount: MountResult
    free: int


def parse_termina(address: ipaddress.IPv4Address, subnet: str, device: str) -> TerminaRequest:
    """The request, checked. Raises InvalidRequest."""
    ip, slash, bits = subnet.partition("/")
    try:
        if not slash or not (bits.isascii() and bits.isdigit()):
            raise ValueError(subnet)
        ipaddress.IPv4Interface(f"{ip}/{bits}")
    except ValueError:
        raise InvalidRequest(f"lxd_ipv4_subnet {subnet!r} is not a.b.c.d/bits") from None
    return TerminaRequest(address, subnet, absolute("stateful_device", device) if device else "")


def service_launches(settings: TerminaSettings, request: TerminaRequest) -> dict[str, Launch]:
    """What to keep running, by name. Raises ConfigError."""
    import shlex  # most guests start no containers

    environment: dict[str, str] = {}
    for pair in settings.environment:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"termina.environment {pair!r} is not NAME=VALUE")
        environment[name] = value
    launches = {}
    for service in settings.services:
        try:
            # Split first: what a host sends never becomes another argument.
            words = [
                word.replace("{subnet}", request.subnet).replace("{address}", str(request.address))
                for word in shlex.split(service)
            ]
            launches[service] = parse_launch(words, environment, respawn=True)
        except (ValueError, InvalidRequest) as error:
            raise ConfigError(f"termina.services {service!r}: {error}") from error
    return launches


class Termina:
    """StartTermina: calls come one after the other, and each is done to its end whoever gives up."""

    def __init__(self, mounts: Mounts, processes: Processes, settings: TerminaSettings | None = None) -> None:
        self._mounts = mounts
        self._processes = processes
        self._settings = settings or TerminaSettings()
        self._result = MountResult.SUCCESS
        self._one = asyncio.Lock()
        self._tasks: set[asyncio.Task[TerminaResult]] = set()

    async def start(self, request: TerminaRequest) -> TerminaResult:
        """Disk, then services. What is there already stays as it is. Raises StoragedError."""
        task = asyncio.create_task(self._start(request))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[TerminaResult]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever called may be gone: it was looked at

    async def _start(self, request: TerminaRequest) -> TerminaResult:
        launches = service_launches(self._settings, request)
        device = request.device or self._settings.device
        async with self._one:
            loop = asyncio.get_running_loop()
            free = await loop.run_in_executor(self._mounts.threads, self._prepare, device)
            failed = [
                launch.name
                for name, launch in launches.items()
                if (await self._processes.ensure(name, launch)).status is Status.FAILED
            ]
        if failed:
            raise StoragedError(f"the disk is mounted, but these could not be started: {', '.join(failed)}")
        return TerminaResult(self._result, free)

    def _prepare(self, device: str) -> int:
        system, mountpoint = self._mounts.system, self._settings.mountpoint
        source = system.mounted(mountpoint)
        if source and not system.same_device(source, device):
            raise StoragedError(f"{source} is mounted at {mountpoint} already, not {device}", Kind.PRECONDITION)
        if not source:
            self._result = self._mount(system, device)
            try:
                # Only now: later on the filesystem may be smaller than its device because somebody wants it so.
                system.grow(mountpoint)
            except StoragedError as error:
                log.warning("%s was not grown to its device: %s", mountpoint, error.message)
        try:
            return system.free(mountpoint)
        except OSError as error:
            raise StoragedError(f"free space of {mountpoint}: {error.strerror}") from error

    def _mount(self, system: MountSystem, device: str) -> MountResult:
        mountpoint, options = self._settings.mountpoint, self._settings.options
        format_blank(system, device)
        made: list[str] = []
        try:
            made = system.make_directories(mountpoint)
            try:
                system.mount(device, mountpoint, "btrfs", 0, options)
            except OSError as error:
                if error.errno in _NOT_ABOUT_THE_DATA or not system.contents(device):
                    raise
                log.warning("%s does not mount (%s); trying an older tree root", device, error.strerror)
                self._rescue(system, device)
                log.warning("%s was mounted from an older tree root: its newest writes are lost", device)
                return MountResult.PARTIAL_DATA_LOSS
        except OSError as error:
            system.remove_directories(made)
            raise StoragedError(f"mounting {device} at {mountpoint}: {error.strerror}") from error
        return MountResult.SUCCESS

    def _rescue(self, system: MountSystem, device: str) -> None:
        for last, rescue in ((False, RESCUES[0]), (True, RESCUES[1])):
            options = f"{self._settings.options},{rescue}".lstrip(",")
            try:
                system.mount(device, self._settings.mountpoint, "btrfs", 0, options)
            except OSError as error:
                # EINVAL is also what a kernel says that does not know the word.
                if last or error.errno != errno.EINVAL:
                    raise
            else:
                return
