"""The modules of the guest that are not storage: this machine's, or in memory."""

from __future__ import annotations

import os
from dataclasses import dataclass

from storaged.addresses import VsockAddress, parse_address
from storaged.app.options import Options
from storaged.config import HOST, Settings
from storaged.guest.clock import Clock, KernelClock
from storaged.guest.containers import Containers
from storaged.guest.mounts import Mounts
from storaged.guest.network import Network
from storaged.guest.power import Power, real_power
from storaged.guest.processes import Processes, ProcessSettings, Report
from storaged.guest.reaper import Reaper
from storaged.guest.resolv import Resolv, ResolvFile
from storaged.guest.termina import Termina
from storaged.guest.users import Users
from storaged.rpc.crash import CRASH_LISTENER_PORT, CrashReports
from storaged.rpc.outward import reach

HOST_CID = 2
"""VMADDR_CID_HOST (vsock(7))."""


@dataclass(frozen=True, slots=True)
class GuestModules:
    """All that is not storage, on this machine or in memory."""

    network: Network
    resolv: Resolv
    clock: Clock
    processes: Processes
    mounts: Mounts
    termina: Termina
    containers: Containers
    users: Users
    power: Power

    async def close(self) -> None:
        """Begin nothing more; what runs keeps running."""
        await self.processes.close()
        for part in (self.mounts, self.containers, self.users):
            part.close()


def real_guest(settings: Settings, report: Report | None = None) -> GuestModules:
    """The modules of this machine. Call it from the main thread."""
    from storaged.guest.containers import TokenFile
    from storaged.guest.kernel_mounts import KernelMounts
    from storaged.guest.kernel_network import KernelNetwork
    from storaged.guest.local_users import LocalUsers
    from storaged.guest.spawn import RealSpawner, hand_down_default_signals
    from storaged.guest.zones import ZoneFiles

    hand_down_default_signals()
    processes = Processes(RealSpawner(settings.processes), settings.processes, report=report)
    mounts = Mounts(KernelMounts(), settings.mounts)
    return GuestModules(
        Network(KernelNetwork(timeout_s=settings.network.timeout_s), settings.network),
        Resolv(ResolvFile(settings.resolv.path), settings.resolv),
        Clock(KernelClock(), ZoneFiles(settings.clock)),
        processes,
        mounts,
        Termina(mounts, processes, settings.termina),
        Containers(TokenFile(settings.containers)),
        Users(LocalUsers()),
        real_power(),
    )


def sim_guest(settings: Settings) -> GuestModules:
    """The same in memory: this machine is not touched."""
    from storaged.sim.clock import SimWallClock, SimZones
    from storaged.sim.mounts import SimMounts
    from storaged.sim.network import SimNetwork, SimResolv
    from storaged.sim.power import SimPower
    from storaged.sim.processes import SimSpawner
    from storaged.sim.users import SimToken, SimUsers

    processes = Processes(SimSpawner(), settings.processes)
    mounts = Mounts(SimMounts(), settings.mounts)
    termina = Termina(mounts, processes, settings.termina)
    return GuestModules(
        Network(SimNetwork()),
        Resolv(SimResolv()),
        Clock(SimWallClock(), SimZones()),
        processes,
        mounts,
        termina,
        Containers(SimToken()),
        Users(SimUsers()),
        SimPower(),
    )


def make_reaper(settings: ProcessSettings) -> Reaper | None:
    """Reaps orphans where this process is asked to, or is process 1 and nobody else would."""
    if os.getpid() != 1 and not settings.adopt_orphans:
        return None
    from storaged.guest.reaper import become_subreaper

    if os.getpid() != 1:
        become_subreaper()
    return Reaper()


def guest_modules(options: Options) -> GuestModules | None:
    """The guest modules that the server gets; a simulated guest has simulated ones."""
    if options.settings.serve.only_storage:
        return None
    if options.sim:
        return sim_guest(options.settings)
    return real_guest(options.settings, _crash_reports(options.settings.serve.crash_host))


def _crash_reports(name: str) -> Report | None:
    """Who is told of programs that ended though they should not have."""
    if not name:
        return None
    address = VsockAddress(HOST_CID, CRASH_LISTENER_PORT) if name == HOST else parse_address(name)

    async def report(program: str) -> None:
        async with reach(address) as target:
            await CrashReports(target)(program)

    return report
