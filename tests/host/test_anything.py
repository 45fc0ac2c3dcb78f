"""Whatever guests, messages and others on the host do, the disk is never full and the promises never exceed it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from storaged.host import events as ev
from storaged.host.model import State, books, established
from storaged.host.settings import Sharing
from storaged.units import GIB, MIB
from tests.host.world import Vm, World

NAMES = ["a", "b", "c"]
names = st.sampled_from(NAMES)
sizes = st.integers(0, 40 * GIB) | st.sampled_from([0, MIB, 64 * MIB, GIB, 8 * GIB, 1 << 50])
moments = st.sampled_from([0.0, 0.05, 0.3, 1.0, 6.0, 40.0, 700.0])


class Anything(RuleBasedStateMachine):
    """Three guests at most, one disk, others who write on it."""

    @initialize(free=st.sampled_from([3, 6, 20, 90]), kept=st.sampled_from([1 / 8, 0.0]), begun=st.integers(0, 3))
    def begin(self, free: int, kept: float, begun: int) -> None:
        free *= GIB
        self.world = World(free + 40 * GIB, free, State(Sharing(kept_share=kept)))
        self.world.epoch()
        for name in NAMES[:begun]:
            self.world.join(Vm(name, 500 * GIB, 0, 0, booting=False), keeps=0)
        self.world.calm(3)

    def vm(self, name: str) -> Vm | None:
        return self.world.vms.get(name)

    @rule(name=names, size=st.sampled_from([2 * GIB, 30 * GIB, 500 * GIB]), weight=st.sampled_from([1.0, 1.0, 4.0]),
          keeps=st.none() | st.integers(0, 2 * GIB),
          lies=st.sampled_from(["", "", "has nothing", "obeys"]),
          beyond=st.sampled_from([0, 512 * MIB, GIB]), sparse=st.sampled_from([0, 0, GIB]))  # fmt: skip
    def join(self, name: str, size: int, weight: float, keeps: int | None, lies: str, beyond: int, sparse: int) -> None:
        if self.vm(name) is not None:
            return
        if keeps is not None and books(self.world.state).slack < keeps:
            keeps = None  # a host that starts a guest for which there is no room has broken its word itself
        allowed = size if keeps is None else min(keeps, size)
        if lies or keeps is not None or books(self.world.state).slack < beyond + sparse:
            beyond = sparse = 0  # of these nothing is known before the first answer
        vm = Vm(name, size, 0, allowed, booting=keeps is None, liar=lies == "has nothing", deaf=lies == "obeys")
        vm.beyond, vm.sparse = beyond, min(sparse, size - beyond)
        self.world.join(vm, weight, keeps)

    @rule(name=names, size=sizes)
    def write(self, name: str, size: int) -> None:
        if self.vm(name):
            self.world.write(name, size)

    @rule(name=names, size=sizes)
    def discard(self, name: str, size: int) -> None:
        if self.vm(name):
            self.world.discard(name, size)

    @rule(size=sizes)
    def others_write(self, size: int) -> None:
        self.world.others_write(size)

    @rule(size=sizes)
    def others_free(self, size: int) -> None:
        self.world.others_free(size)

    @rule(size=st.none() | sizes, discards=st.booleans(), seconds=moments)
    def epoch(self, size: int | None, discards: bool, seconds: float) -> None:
        """Guests may write, or else discard, between any two of the reads."""
        self.world.pass_time(seconds)
        order = list(self.world.vms)

        def between(name: str) -> None:
            other = order[-1 - order.index(name)]
            for each in (name, other):
                if size is not None and discards:
                    self.world.discard(each, size)
                elif size is not None:
                    self.world.write(each, size)

        self.world.epoch(between)

    @rule(name=names, size=sizes, seconds=moments, twice=st.booleans(), look=st.booleans())
    def spend_and_be_told(self, name: str, size: int, seconds: float, twice: bool, look: bool) -> None:
        """A guest works, an epoch follows; it spends all it has before the grant reaches it, and all of that, too."""
        if not (vm := self.vm(name)):
            return
        self.world.write(name, size)
        self.world.pass_time(seconds)
        self.world.epoch()
        if vm.inbox:
            self.world.write(name, 1 << 60)
            self.world.apply(name)
        if twice:
            self.world.write(name, 1 << 60)
        self.world.answer(name, look=look)

    @rule(name=names, heir=names)
    def die_in_debt(self, name: str, heir: str) -> None:
        """A guest ends that has spent what no epoch saw; another one wants all that seems to be left."""
        if not self.vm(name) or not self.vm(heir) or name == heir:
            return
        self.world.calm(2)
        self.world.write(name, 1 << 60)
        self.world.end(name)
        self.world.tell(ev.RoomAsked(heir, 1 << 50, self.world.now))
        self.world.apply(heir)
        self.world.write(heir, 1 << 60)

    @rule(name=names, size=sizes, gone=st.booleans())
    def be_told_too_late(self, name: str, size: int, gone: bool) -> None:
        """The call fails though the grant arrives; and perhaps its guest ends."""
        if not (vm := self.vm(name)) or vm.hangs or vm.sleeps:
            return
        self.world.epoch()
        self.world.write(name, size)
        if vm.inbox:
            self.world.fail(name, certain=False)
            self.world.apply(name)
            self.world.write(name, size)
        if gone:
            self.world.end(name)

    @rule(name=names, size=sizes, more=sizes)
    def be_told_and_discard(self, name: str, size: int, more: int) -> None:
        """A grant is applied on top of much, which is discarded before the host looks again."""
        if not (vm := self.vm(name)):
            return
        self.world.write(name, size)
        self.world.pass_time(1.0)
        self.world.epoch()
        self.world.apply(name)
        self.world.discard(name, more)
        self.world.answer(name)
        self.world.write(vm.name, 1 << 60)

    @rule(name=names, size=sizes, more=sizes)
    def relieve(self, name: str, size: int, more: int) -> None:
        """Metadata gets room beyond the grant, some of which is written before anybody knows."""
        if self.vm(name):
            self.world.relieve(name, size)
            self.world.write(name, more)

    @rule(name=names)
    def report(self, name: str) -> None:
        if self.vm(name):
            self.world.report(name)

    @rule(name=names, size=sizes)
    def move(self, name: str, size: int) -> None:
        if self.vm(name):
            self.world.move(name, size)

    @rule(name=names)
    def lift(self, name: str) -> None:
        self.world.tell(ev.FenceLifted(name, self.world.now))

    @rule(name=names)
    def apply(self, name: str) -> None:
        if self.vm(name):
            self.world.apply(name)

    @rule(name=names, look=st.booleans(), seconds=moments)
    def answer(self, name: str, look: bool, seconds: float) -> None:
        self.world.pass_time(seconds)
        if self.vm(name):
            self.world.answer(name, look=look)

    @rule(name=names, certain=st.booleans())
    def fail(self, name: str, certain: bool) -> None:
        if self.vm(name):
            self.world.fail(name, certain=certain)

    @rule(name=names, size=sizes)
    def plead(self, name: str, size: int) -> None:
        self.world.tell(ev.RoomAsked(name, size, self.world.now))

    @rule(name=names)
    def hang_or_recover(self, name: str) -> None:
        if vm := self.vm(name):
            vm.hangs = not vm.hangs
            if vm.hangs:
                self.world.tell(ev.GuestSilent(name, self.world.now))

    @rule(name=names)
    def sleep_or_wake(self, name: str) -> None:
        if vm := self.vm(name):
            vm.sleeps = not vm.sleeps
            event = ev.Suspended if vm.sleeps else ev.Resumed
            self.world.tell(event(name, self.world.now))

    @rule(heir=names, rounds=st.integers(0, 2))
    def restart_of_the_controller(self, heir: str, rounds: int) -> None:
        """One guest answers the new controller and wants all there is; then the others spend what they had."""
        if any(not vm.honest or vm.booting for vm in self.world.vms.values()):
            return  # of these nothing is known before their first answer
        self.world.restart_controller()
        for _ in range(rounds):
            if self.vm(heir):
                self.world.tell(ev.RoomAsked(heir, 1 << 50, self.world.now))
                self.world.apply(heir)
                self.world.answer(heir)
            self.world.pass_time(1.0)
            self.world.epoch()
        for name in self.world.vms:
            self.world.write(name, 1 << 60)

    @rule(name=names)
    def end(self, name: str) -> None:
        if self.vm(name):
            self.world.end(name)

    @rule(name=names)
    def restart(self, name: str) -> None:
        if self.vm(name):
            self.world.restart(name)

    @rule()
    def calm(self) -> None:
        self.world.calm(4)

    @rule(name=names, weight=st.sampled_from([0.5, 1.0, 9.0]))
    def weigh(self, name: str, weight: float) -> None:
        self.world.tell(ev.GuestChanged(name, self.world.now, weight=weight))

    @invariant()
    def no_image_can_pass_its_ceiling(self) -> None:
        for name, vm in self.world.vms.items():
            guest = self.world.state.guests[name]
            if guest.lease.bound and not vm.deaf:
                most = vm.image + vm.allowed + vm.beyond + vm.sparse - vm.unreported
                assert min(most, vm.size) <= guest.lease.ceiling + guest.lease.raised

    @invariant()
    def promises_fit(self) -> None:
        state = self.world.state
        if established(state):
            allowed = sum(vm.reach for vm in self.world.vms.values() if not vm.deaf)
            unseen = self.world.outside_unseen + sum(vm.unreported for vm in self.world.vms.values())
            assert allowed <= self.world.free + unseen - state.pool.reserve

    def teardown(self) -> None:
        """Everybody writes all it may, applies the next grant that is on its way, and does so again."""
        for name, vm in self.world.vms.items():
            vm.hangs = vm.sleeps = False
            while True:
                self.world.write(name, 1 << 60)
                if not vm.inbox:
                    break
                self.world.apply(name)


Anything.TestCase.settings = settings(max_examples=200, stateful_step_count=40)
TestAnything = Anything.TestCase
