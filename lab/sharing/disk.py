"""The host's disk and its guests as they really are, moved by a workload in steps, and what a sharer may do to them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from lab.sharing.workload import NEVER, STEP_S, Plan, Workload
from storaged.units import GIB

ANSWER_S = 5.0
"""After this long a call has failed, for the sharer; the guest may act on it all the same."""


class Sharer(Protocol):
    """Decides what guests are told; `look` comes at every step."""

    def joined(self, guest: int) -> None: ...
    def left(self, guest: int) -> None: ...
    def slept(self, guest: int) -> None: ...
    def woke(self, guest: int) -> None: ...
    def answered(self, guest: int, seq: int, available: int) -> None: ...
    def failed(self, guest: int, seq: int) -> None: ...
    def look(self) -> None: ...


@dataclass(slots=True)
class Vm:
    """A guest; `allowed` is what applications in it can still write, `beyond` what they can write besides."""

    plan: Plan
    image: int
    allowed: int = 0
    beyond: int = 0
    told: bool = False  # before the first word its applications have not started
    runs: bool = False
    sleeps: bool = False
    hangs: bool = False
    inbox: list[tuple[float, int, int]] = field(default_factory=list)  # when it would be applied, seq, size
    calls: dict[int, float] = field(default_factory=dict)  # seq: when it was sent


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a sharer did to its guests: seconds, bytes, calls. `broken`: bytes that met a full disk."""

    full_s: float
    denied: int
    broken: int
    calls: int
    starved: dict[str, int]


class Disk:
    """One run of a workload under a sharer."""

    def __init__(self, workload: Workload, sharer: Callable[[Disk], Sharer]) -> None:
        self.workload = workload
        self.now = 0.0
        self.free = workload.room
        self.calls = 0
        self.vms = [Vm(plan, plan.image, beyond=plan.beyond) for plan in workload.guests]
        self._rng = random.Random(workload.seed)  # the same every time
        self._sharer = sharer(self)
        self._moments = self._schedule()
        self._deletes: dict[int, list[tuple[int, int]]] = {}
        self._outside = 0
        self._full_steps = self._denied = self._broken = 0
        self._starved: dict[str, int] = {}
        self._active: set[int] = set()  # guests with something under way

    def _schedule(self) -> dict[int, list[tuple[str, int]]]:
        moments: dict[int, list[tuple[str, int]]] = {}
        for index, vm in enumerate(self.vms):
            plan = vm.plan
            for begins, ends, windows in (
                ("join", "leave", plan.runs),
                ("sleep", "wake", plan.sleeps),
                ("hang", "recover", plan.hangs),
            ):
                for start, end in windows:
                    moments.setdefault(start, []).append((begins, index))
                    moments.setdefault(end, []).append((ends, index))
        return moments

    # --- what sharers use

    def send(self, guest: int, seq: int, size: int) -> None:
        """Tell a guest what it may write; it acts after a while, in the order in which it was told."""
        vm = self.vms[guest]
        self.calls += 1
        vm.calls[seq] = self.now
        after = self.now + min(self._rng.lognormvariate(-2.5, 1.0), 4.0)
        vm.inbox.append((max(after, vm.inbox[-1][0] if vm.inbox else 0.0), seq, size))
        self._active.add(guest)

    # --- time

    def run(self) -> Outcome:
        """Two hours."""
        for step in range(self.workload.steps):
            self.now = step * STEP_S
            for what, guest in self._moments.get(step, ()):
                self._moment(what, guest)
            for guest, size in self._deletes.pop(step, ()):
                vm = self.vms[guest]
                vm.image -= size
                vm.allowed += size
                self.free += size
            self._others(step)
            for guest, size, until in self.workload.wants[step]:
                self._write(guest, size, until)
            if self.free <= 0:
                self._full_steps += 1
            for guest in tuple(self._active):
                self._answers(guest)
            self._sharer.look()
        return Outcome(self._full_steps * STEP_S, self._denied, self._broken, self.calls, self._starved)

    def _moment(self, what: str, guest: int) -> None:
        vm = self.vms[guest]
        if what == "join":
            vm.runs = True
            vm.told, vm.allowed, vm.inbox, vm.calls = False, 0, [], {}
            self._sharer.joined(guest)
            if vm.sleeps:
                self._sharer.slept(guest)
        elif what == "leave":
            vm.runs = False
            vm.inbox, vm.calls = [], {}
            self._sharer.left(guest)
        elif what in {"sleep", "wake"}:
            slept, vm.sleeps = vm.sleeps, what == "sleep"
            if vm.runs and slept is not vm.sleeps:
                (self._sharer.slept if vm.sleeps else self._sharer.woke)(guest)
        else:
            vm.hangs = what == "hang"

    def _others(self, step: int) -> None:
        change = self.workload.outside[step] - self._outside
        change = min(change, max(self.free, 0))
        self._outside += change
        self.free -= change

    def _write(self, guest: int, size: int, until: int) -> None:
        vm = self.vms[guest]
        granted = min(size, max(vm.allowed, 0)) if vm.told else 0
        besides = min(size - granted, vm.beyond) if vm.told else 0
        wrote = granted + besides
        if wrote > self.free:
            self._broken += wrote - max(self.free, 0)
            wrote = max(self.free, 0)
            granted = min(granted, wrote)
            besides = wrote - granted
        if wrote < size:
            self._denied += size - wrote
            self._starved[vm.plan.name] = self._starved.get(vm.plan.name, 0) + size - wrote
        vm.image += wrote
        vm.allowed -= granted
        vm.beyond -= besides
        self.free -= wrote
        if until < NEVER and wrote:
            self._deletes.setdefault(until, []).append((guest, wrote))

    def _answers(self, guest: int) -> None:
        vm = self.vms[guest]
        while vm.inbox and vm.inbox[0][0] <= self.now and not vm.hangs and not vm.sleeps:
            _, seq, size = vm.inbox.pop(0)
            vm.allowed, vm.told = size, True
            if vm.calls.pop(seq, None) is not None:
                self._sharer.answered(guest, seq, size)
        for seq, sent in tuple(vm.calls.items()):
            if self.now - sent >= ANSWER_S:
                del vm.calls[seq]
                self._sharer.failed(guest, seq)
        if not vm.inbox and not vm.calls:
            self._active.discard(guest)


def gib(size: float) -> float:
    """`size` bytes in GiB."""
    return size / GIB
