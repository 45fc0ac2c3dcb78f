"""The true disk and the true guests, apart from what the host believes of them, and a controller between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from storaged.host import events as ev
from storaged.host import leases
from storaged.host.leases import Answer
from storaged.host.model import State, established
from storaged.host.shares import next_wakeup, step


class HostFull(AssertionError):
    """A guest was allowed to write, and the disk under it had no room."""


@dataclass(slots=True)
class Vm:
    """A guest as it really is. `inbox`: grants that it may still apply, in order; `outbox`: its answers.

    `beyond`: what it can write whatever it is granted: room in metadata chunks, preallocated extents. `sparse`: blocks
    that it counts as used and its image does not hold. `moving`: what a resize may still write besides.
    """

    name: str
    size: int
    image: int
    allowed: int
    booting: bool
    hangs: bool = False
    sleeps: bool = False
    wrote_unseen: bool = False
    liar: bool = False  # says that it has nothing
    deaf: bool = False  # says that it obeys, and does not
    inbox: list[tuple[int, int]] = field(default_factory=list)
    outbox: list[tuple[int, Answer]] = field(default_factory=list)
    beyond: int = 0
    sparse: int = 0
    moving: int = 0
    sequence: int = 1
    unreported: int = 0  # relief that the host does not know of
    relieved_at: int = 0

    @property
    def reach(self) -> int:
        """All that it may write, what its image lacks included."""
        return min(self.allowed + self.beyond + self.sparse, self.size - self.image)

    @property
    def potential(self) -> int:
        """What it has used and can still use, by its own account."""
        return self.image + self.reach

    @property
    def honest(self) -> bool:
        """It obeys, and says what it can write."""
        return not self.deaf and not self.liar

    @property
    def may_write(self) -> bool:
        return not self.booting and not self.sleeps


_MAY_BREAK = (ev.PoolSampled, ev.GuestJoined, ev.GuestLeft, ev.GuestRestarted, ev.ClaimSet)
"""What can take room by itself; ClaimSet waits until it is there."""


@dataclass(slots=True)
class World:
    """Truth, and the core's state. Every event goes through `tell`."""

    size: int
    free: int
    state: State = field(default_factory=State)
    now: float = 1000.0
    vms: dict[str, Vm] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)  # seq of the call that has not ended
    outside_unseen: int = 0  # written by others since the last epoch
    outside_budget: int = 0  # what they may still write until the books balance again
    notes: list[ev.Note] = field(default_factory=list)
    poll: float = 0.0

    # --- what really happens

    def write(self, name: str, size: int) -> int:
        vm = self.vms[name]
        size = min(size, vm.allowed + vm.beyond + vm.sparse, vm.size - vm.image) if vm.may_write else 0
        if vm.deaf:
            size = self._beyond(vm, size)
        if size > self.free:
            raise HostFull(f"{name} may write {size}, the disk has {self.free}")
        if size:
            left = size
            for room in ("allowed", "sparse", "beyond"):
                part = min(left, getattr(vm, room))
                setattr(vm, room, getattr(vm, room) - part)
                left -= part
            vm.image += size
            vm.wrote_unseen = True
            self.free -= size
        return size

    def _beyond(self, vm: Vm, size: int) -> int:
        """What a guest takes that was not granted is like a burst of others: the reserve bears it until it is seen."""
        lease = self.state.guests[vm.name].lease
        granted = max(min(size, lease.ceiling - vm.image), 0) if lease.bound else size
        taken = min(size - granted, self.outside_budget)
        self.outside_budget -= taken
        self.outside_unseen += taken
        return granted + taken

    def discard(self, name: str, size: int) -> None:
        """Hand blocks back. What is written and discarded again before anybody looks is the reserve's business."""
        vm = self.vms[name]
        if vm.sleeps or (vm.wrote_unseen and (vm.inbox or vm.outbox or name in self.calls)):
            return
        size = min(size, vm.image)
        vm.image -= size
        vm.allowed += size
        self.free += size

    def others_write(self, size: int) -> None:
        size = min(size, self.outside_budget)
        if size > self.free:
            raise HostFull(f"others write {size}, the disk has {self.free}")
        self.free -= size
        self.outside_budget -= size
        self.outside_unseen += size

    def others_free(self, size: int) -> None:
        used = self.size - self.free - sum(vm.image for vm in self.vms.values())
        self.free += max(min(size, used), 0)

    def apply(self, name: str) -> None:
        """The guest applies the next grant that reached it, and answers, with a lie if it is a liar."""
        vm = self.vms[name]
        if not vm.inbox or vm.hangs or vm.sleeps:
            return
        seq, size = vm.inbox.pop(0)
        if not vm.deaf or vm.booting:
            vm.allowed = min(size, vm.size - vm.image)
        vm.booting = False
        vm.sequence += 1
        answer = Answer(vm.allowed + vm.beyond, vm.potential, vm.sequence)
        vm.outbox.append((seq, Answer(0) if vm.liar else answer))

    def relieve(self, name: str, size: int) -> None:
        """Metadata gets room beyond the grant; until it is reported the reserve bears it."""
        vm = self.vms[name]
        if not self.state.guests[name].lease.tells:
            return  # of one that was started with a balloon nothing is known before its first answer
        size = min(size, self.outside_budget, vm.size - vm.image - vm.allowed - vm.beyond - vm.sparse)
        if size <= 0 or not vm.honest or not vm.may_write:
            return
        vm.beyond += size
        vm.unreported += size
        vm.sequence += 1
        vm.relieved_at = vm.sequence
        self.outside_budget -= size

    def report(self, name: str) -> None:
        """Its report arrives at the host; one that was on its way with an answer is older and changes nothing."""
        vm = self.vms[name]
        if vm.honest and not vm.booting:
            self.tell(ev.PotentialReported(name, vm.potential, vm.sequence, self.now))

    def move(self, name: str, size: int) -> None:
        """A shrink claims what it will move, waits until the promise holds, moves it, and hands it back."""
        vm = self.vms[name]
        if vm.deaf or vm.sleeps:
            return
        self.report(name)
        self.tell(ev.ClaimSet(name, size, self.now))
        self.calm(4)
        moved = 0
        if established(self.state) and not self.state.guests[name].claim_lacks:
            moved = min(size, vm.size - vm.image - vm.reach)
            if moved > self.free:
                raise HostFull(f"{name} moves {moved}, the disk has {self.free}")
            vm.image += moved
            self.free -= moved
            self.epoch()
            assert not [note for note in self.notes if note.topic is ev.Topic.OVERRUN and note.guest == name]
        vm.image -= moved
        self.free += moved
        self.tell(ev.ClaimSet(name, 0, self.now))

    # --- what the controller does

    def tell(self, event: ev.Event) -> None:
        # What a guest says that it can write beyond its grant is true whatever was promised.
        held = established(self.state) and not any(vm.unreported for vm in self.vms.values())
        self.state, effects = step(self.state, event)
        self._heard(event)
        if held and not isinstance(event, _MAY_BREAK):
            assert established(self.state), f"nobody but the core can have broken it: {event}"
        for effect in effects:
            match effect:
                case ev.SetGrant(guest, size, seq):
                    assert guest not in self.calls, "one change at a time"
                    self.calls[guest] = seq
                    self.vms[guest].inbox.append((seq, size))
                case ev.Note():
                    self.notes.append(effect)
                case ev.Poll(interval):
                    self.poll = self.now + interval
                case ev.Publish():
                    pass

    def _heard(self, event: ev.Event) -> None:
        for name, vm in self.vms.items():
            if name not in self.state.guests:
                continue  # to a controller that has just started
            lease = self.state.guests[name].lease
            reported = isinstance(event, ev.PotentialReported) and event.guest == name and lease.flight is None
            if lease.sequence >= vm.relieved_at or (reported and lease.potential is not None):
                vm.unreported = 0

    def epoch(self, between: Callable[[str], None] = lambda _: None) -> None:
        """One bracket of reads; `between` happens after each image was read."""
        at, first = self.now, self.free
        images = {}
        for name, vm in self.vms.items():
            images[name] = vm.image
            vm.wrote_unseen = False
            between(name)
        self.outside_unseen = 0
        self.tell(ev.PoolSampled(min(first, self.free), at, images))
        self.settle_budget()

    def settle_budget(self) -> None:
        if self.state.holds:
            self.outside_budget = self.state.pool.reserve // 2

    def join(self, vm: Vm, weight: float = 1.0, keeps: int | None = None) -> None:
        self.vms[vm.name] = vm
        self.tell(ev.GuestJoined(vm.name, vm.size, vm.image, self.now, weight, keeps=keeps))

    def answer(self, name: str, *, look: bool = True) -> None:
        """The next answer arrives at the host."""
        vm = self.vms[name]
        if not vm.outbox:
            return
        seq, answer = vm.outbox.pop(0)
        if self.calls.get(name) == seq:
            del self.calls[name]
        self.tell(ev.GrantAcked(name, seq, answer, self.now))
        if look:
            vm.wrote_unseen = False
            self.tell(ev.GuestSampled(name, vm.image, self.now))

    def fail(self, name: str, *, certain: bool) -> None:
        """The call ends without an answer; unless `certain`, the grant may be applied all the same, late."""
        seq = self.calls.get(name)
        if seq is None:
            return
        vm = self.vms[name]
        waiting = any(waits == seq for waits, _ in vm.inbox)
        if certain and not waiting:
            return
        if certain:
            vm.inbox = [(waits, size) for waits, size in vm.inbox if waits != seq]
        del self.calls[name]
        self.tell(ev.GrantFailed(name, seq, "no answer", self.now, certain=certain))

    def end(self, name: str) -> None:
        del self.vms[name]
        self.calls.pop(name, None)
        self.tell(ev.GuestLeft(name, self.now))

    def restart(self, name: str) -> None:
        """Its agent starts anew, and says so; what was on its way may be applied all the same."""
        self.calls.pop(name, None)
        self.tell(ev.GuestRestarted(name, self.now))

    def restart_controller(self) -> None:
        """It is killed and starts again: it knows how far it let images grow, and what was on its way may arrive."""
        book = {name: leases.highest(self.state.guests[name].lease) for name in self.vms}
        self.state = State(self.state.settings)
        self.calls.clear()
        self.epoch()
        for vm in self.vms.values():
            vm.inbox = [(-1, size) for _, size in vm.inbox]  # nobody hears the answer
            vm.outbox.clear()
            self.tell(ev.GuestJoined(vm.name, vm.size, vm.image, self.now, ceiling=book[vm.name]))
        self.epoch()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        wakes = next_wakeup(self.state)
        if wakes is not None and wakes <= self.now:
            self.tell(ev.Tick(self.now))

    def calm(self, rounds: int = 30) -> None:
        """Everybody answers at once and nobody writes."""
        for _ in range(rounds):
            self.pass_time(1.0)
            self.epoch()
            for name in list(self.vms):
                self.report(name)
                while self.vms[name].inbox and not (self.vms[name].hangs or self.vms[name].sleeps):
                    self.apply(name)
                    self.answer(name)
