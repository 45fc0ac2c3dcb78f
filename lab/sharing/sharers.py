"""The sharers that are compared: everybody is told the same, equal shares, and the project's own core."""

from __future__ import annotations

from lab.sharing.disk import Disk
from storaged.host import events as ev
from storaged.host.leases import Answer
from storaged.host.model import State
from storaged.host.settings import Sharing
from storaged.host.shares import next_wakeup, step
from storaged.units import GIB, MIB


class Broadcast:
    """As ChromeOS' host does it: every guest is told what is free, and subtracts 1 GiB by itself."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._running: set[int] = set()
        self._told: dict[int, int] = {}
        self._next = 0.0
        self._seq = 0

    def joined(self, guest: int) -> None:
        self._running.add(guest)
        self._told.pop(guest, None)
        self._next = 0.0

    def left(self, guest: int) -> None:
        self._running.discard(guest)

    def slept(self, guest: int) -> None: ...
    def woke(self, guest: int) -> None: ...
    def answered(self, guest: int, seq: int, available: int) -> None: ...

    def failed(self, guest: int, seq: int) -> None:  # noqa: ARG002
        self._told.pop(guest, None)

    def look(self) -> None:
        disk = self._disk
        if disk.now < self._next:
            return
        free = disk.free
        self._next = disk.now + (5.0 if free > 2 * GIB else 3.0 if free > GIB else 1.0)
        for guest in sorted(self._running):
            told = self._told.get(guest)
            if told is None or abs(free - told) >= 100 * MIB or free <= GIB:
                self._told[guest] = free
                self._seq += 1
                disk.send(guest, self._seq, self._share(free))

    def _share(self, free: int) -> int:
        return max(free - GIB, 0)


class Equal(Broadcast):
    """The same, but each guest is told its equal part of what is free."""

    def _share(self, free: int) -> int:
        return max(free - GIB, 0) // max(len(self._running), 1)


class Ours:
    """The sharing core, driven as the controller does it."""

    def __init__(self, disk: Disk, settings: Sharing | None = None) -> None:
        self._disk = disk
        self.state = State(settings or Sharing())
        self._poll_at = 0.0
        self._index = {vm.plan.name: index for index, vm in enumerate(disk.vms)}

    def _tell(self, event: ev.Event) -> None:
        self.state, effects = step(self.state, event)
        for effect in effects:
            if isinstance(effect, ev.SetGrant):
                self._disk.send(self._index[effect.guest], effect.seq, effect.size)
            elif isinstance(effect, ev.Poll):
                self._poll_at = self._disk.now + effect.interval_s

    def _name(self, guest: int) -> str:
        return self._disk.vms[guest].plan.name

    def joined(self, guest: int) -> None:
        vm = self._disk.vms[guest]
        self._tell(ev.GuestJoined(vm.plan.name, vm.plan.size, vm.image, self._disk.now, vm.plan.weight, keeps=0))

    def left(self, guest: int) -> None:
        self._tell(ev.GuestLeft(self._name(guest), self._disk.now))

    def slept(self, guest: int) -> None:
        self._tell(ev.Suspended(self._name(guest), self._disk.now))

    def woke(self, guest: int) -> None:
        self._tell(ev.Resumed(self._name(guest), self._disk.now))

    def answered(self, guest: int, seq: int, available: int) -> None:
        name, vm = self._name(guest), self._disk.vms[guest]
        reach = available + vm.beyond
        self._tell(ev.GrantAcked(name, seq, Answer(reach, vm.image + reach, seq), self._disk.now))
        self._tell(ev.GuestSampled(name, self._disk.vms[guest].image, self._disk.now))

    def failed(self, guest: int, seq: int) -> None:
        self._tell(ev.GrantFailed(self._name(guest), seq, "no answer", self._disk.now))

    def look(self) -> None:
        disk = self._disk
        wakes = next_wakeup(self.state)
        if wakes is not None and wakes <= disk.now:
            self._tell(ev.Tick(disk.now))
        if disk.now >= self._poll_at:
            images = {vm.plan.name: vm.image for vm in disk.vms if vm.runs}
            self._tell(ev.PoolSampled(disk.free, disk.now, images))
