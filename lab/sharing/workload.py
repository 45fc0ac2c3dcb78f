"""What guests and others on the host will want to write, drawn from a seed and known before any sharer is tried.

A byte that is wanted has a moment at which it is written and one at which it would be deleted again. A byte that a
sharer denies is never written: its application got ENOSPC and gave up.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from storaged.units import GIB, KIB, MIB

STEP_S = 0.25
NEVER = 1 << 60
OUTSIDE_MOST = GIB // 2
METADATA_ROOM = 128 * MIB


@dataclass(frozen=True, slots=True)
class Plan:
    """What one guest is and when. Times are steps; windows are [from, to)."""

    name: str
    weight: float
    size: int
    image: int
    runs: tuple[tuple[int, int], ...]
    sleeps: tuple[tuple[int, int], ...]
    hangs: tuple[tuple[int, int], ...]
    beyond: int = 0
    """Bytes that no balloon keeps it from: files it has preallocated, room in its metadata's chunks."""

    def awake(self, at: int) -> bool:
        """True when applications in it can want something."""
        return _inside(self.runs, at) and not _inside(self.sleeps, at)


Want = tuple[int, int, int]
"""Guest, bytes, the step at which they are deleted again."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Two hours. `wants` and `outside` by step; `outside` is how much others on the host hold then."""

    seed: int
    steps: int
    room: int
    guests: list[Plan]
    wants: list[list[Want]]
    outside: list[int]

    @property
    def spoken_for(self) -> int:
        """What no sharer can hand out: guests can write it whatever they are told."""
        return sum(plan.beyond for plan in self.guests)

    @property
    def wanted(self) -> int:
        """All bytes that guests want to write."""
        return sum(size for wants in self.wants for _, size, _ in wants)


def _inside(windows: tuple[tuple[int, int], ...], at: int) -> bool:
    return any(start <= at < end for start, end in windows)


@dataclass(slots=True)
class _Draft:
    """A workload in the making."""

    rng: random.Random
    steps: int
    wants: list[list[Want]] = field(default_factory=list)

    def write(self, index: int, plan: Plan, at_s: float, size: float, rate: float, keeps_s: float | None) -> float:
        """`size` bytes from `at_s` on at `rate` a second, deleted as one `keeps_s` after; when it ends."""
        at, left = int(at_s / STEP_S), int(size)
        takes = max(int(size / rate / STEP_S), 1)
        until = NEVER if keeps_s is None else at + takes + int(keeps_s / STEP_S) + 1
        while until < self.steps and not plan.awake(until):
            until += 1  # a guest that does not run deletes nothing
        if until >= self.steps:
            until = NEVER
        each = -(-left // takes)
        for step in range(at, min(at + takes, self.steps)):
            if plan.awake(step) and left > 0:
                self.wants[step].append((index, min(each, left), until))
            left -= each
        return at_s + takes * STEP_S


Kind = Callable[[_Draft, int, Plan, float], None]


def _trickle(draft: _Draft, index: int, plan: Plan, end_s: float) -> None:
    """Logs and the like, in every guest."""
    rng = draft.rng
    at_s = rng.uniform(0, 30)
    while at_s < end_s:
        draft.write(index, plan, at_s, rng.uniform(64 * KIB, 4 * MIB), 8 * MIB, rng.expovariate(1 / 1800))
        at_s += rng.expovariate(1 / 20)


def _idle(draft: _Draft, index: int, plan: Plan, end_s: float) -> None:
    """Nothing but its trickle."""


def _desktop(draft: _Draft, index: int, plan: Plan, end_s: float) -> None:
    """A download or an installation now and then; some are deleted again."""
    rng = draft.rng
    at_s = rng.expovariate(1 / 400)
    while at_s < end_s:
        size = min(rng.lognormvariate(0.3, 1.0), 16) * GIB
        keeps = rng.expovariate(1 / 900) if rng.random() < 0.6 else None
        at_s = draft.write(index, plan, at_s, size, rng.uniform(10, 80) * MIB, keeps) + rng.expovariate(1 / 500)


def _builder(draft: _Draft, index: int, plan: Plan, end_s: float) -> None:
    """Builds: a lot at once, most of it thrown away soon after."""
    rng = draft.rng
    at_s = rng.expovariate(1 / 200)
    while at_s < end_s:
        size, rate = rng.uniform(1, 12) * GIB, rng.uniform(40, 400) * MIB
        at_s = draft.write(index, plan, at_s, size * 0.9, rate, rng.uniform(30, 400))
        at_s = draft.write(index, plan, at_s, size * 0.1, rate, rng.expovariate(1 / 1800))
        at_s += rng.expovariate(1 / 300)


def _database(draft: _Draft, index: int, plan: Plan, end_s: float) -> None:
    """A stream of segments, merged and dropped as it goes."""
    rng = draft.rng
    at_s, rate = 0.0, rng.uniform(2, 12) * MIB
    while at_s < end_s:
        at_s = draft.write(index, plan, at_s, 512 * MIB, rate, rng.uniform(300, 2400))


def _hoarder(draft: _Draft, index: int, plan: Plan, end_s: float) -> None:
    """One copy that is larger than what is left, or two."""
    rng = draft.rng
    at_s = rng.uniform(300, 3000)
    while at_s < end_s:
        keeps = rng.uniform(900, 2400) if rng.random() < 0.7 else None
        at_s = draft.write(index, plan, at_s, rng.uniform(10, 40) * GIB, rng.uniform(60, 500) * MIB, keeps)
        at_s += rng.uniform(1500, 4000)


KINDS: list[tuple[Kind, int]] = [(_idle, 3), (_desktop, 4), (_builder, 3), (_database, 2), (_hoarder, 1)]
"""Who works in guests, and how often."""


def draw(seed: int, seconds: float = 7200.0) -> Workload:
    """The workload of `seed`."""
    rng = random.Random(seed)  # the same every time
    steps = int(seconds / STEP_S)
    draft = _Draft(rng, steps, [[] for _ in range(steps)])
    guests: list[Plan] = []
    kinds = rng.choices([kind for kind, _ in KINDS], [count for _, count in KINDS], k=rng.randint(6, 14))
    own = random.Random(f"{seed} beyond")  # what came before these stays as it was
    for index, kind in enumerate(kinds):
        plan = _plan(rng, f"vm{index:02}", steps)
        plan = replace(plan, beyond=int(own.uniform(0, 2) * GIB) if kind is _database else METADATA_ROOM)
        guests.append(plan)
        _trickle(draft, index, plan, seconds)
        kind(draft, index, plan, seconds)
    guests += [replace(plan, name=f"mute{index}") for index, plan in enumerate(_mute(own, steps))]
    for _ in range(rng.randint(0, 2)):
        _update(draft, guests, rng.uniform(0, seconds))
    for wants in draft.wants:
        rng.shuffle(wants)
    room = max(int(_peak(draft.wants) * rng.uniform(0.3, 0.8)), 8 * GIB)
    return Workload(seed, steps, room, guests, draft.wants, _outside(rng, steps))


def _peak(wants: list[list[Want]]) -> int:
    """The most that guests would hold at once on an endless disk: rooms are a part of it, or nothing is scarce."""
    held = most = 0
    leaves: dict[int, int] = {}
    for step, here in enumerate(wants):
        held -= leaves.pop(step, 0)
        for _, size, until in here:
            held += size
            leaves[until] = leaves.get(until, 0) + size
        most = max(most, held)
    return most


def _update(draft: _Draft, plans: list[Plan], at_s: float) -> None:
    """The hour of updates: every guest fetches and unpacks the same, within a few seconds."""
    rng = draft.rng
    size = rng.uniform(0.5, 3) * GIB
    for index, plan in enumerate(plan for plan in plans if not plan.name.startswith("mute")):
        begins_s = at_s + rng.expovariate(1 / 5)
        ends_s = draft.write(index, plan, begins_s, size, rng.uniform(50, 200) * MIB, 120)
        draft.write(index, plan, ends_s, size / 2, rng.uniform(50, 200) * MIB, None)


def _plan(rng: random.Random, name: str, steps: int) -> Plan:
    start, end = 0, steps
    if rng.random() < 0.25:
        start = rng.randrange(steps // 2)
    runs: tuple[tuple[int, int], ...] = ((start, end),)
    if rng.random() < 0.2:  # dies, and most come back
        dies = rng.randrange(start + 1, end)
        back = dies + int(rng.uniform(20, 300) / STEP_S)
        runs = ((start, dies), (back, end)) if rng.random() < 0.7 and back < end else ((start, dies),)
    sleeps = _windows(rng, steps, 0.3, 60, 900)
    hangs = _windows(rng, steps, 0.4, 5, 240)
    return Plan(name, rng.choice([1.0, 1.0, 1.0, 2.0, 4.0]), 200 * GIB, 0, runs, sleeps, hangs)


def _mute(rng: random.Random, steps: int) -> list[Plan]:
    """Machines whose agents never answer, and whose applications never begin."""
    always = ((0, steps),)
    return [Plan("", 1.0, 200 * GIB, 0, always, (), always) for _ in range(rng.choice((0, 0, 1, 4)))]


def _windows(
    rng: random.Random, steps: int, chance: float, least_s: float, most_s: float
) -> tuple[tuple[int, int], ...]:
    windows = []
    while rng.random() < chance:
        start = rng.randrange(steps)
        windows.append((start, start + int(rng.uniform(least_s, most_s) / STEP_S)))
    return tuple(windows)


def _outside(rng: random.Random, steps: int) -> list[int]:
    """What others on the host hold beyond the usual: bursts (backups, downloads, swap) that go away again.

    At most half of the smallest reserve, all together: no sharer of what is left could withstand more. When guests
    have filled the disk down to the reserve, with data that they may keep, the reserve is all that others have.
    """
    changes = [0] * (steps + 1)
    at_s = rng.expovariate(1 / 300)
    while at_s < steps * STEP_S:
        size, rate = rng.uniform(0.05, 0.5) * GIB, rng.uniform(20, 150) * MIB
        begin, takes = int(at_s / STEP_S), int(size / rate / STEP_S) + 1
        for step in range(begin, min(begin + takes, steps)):
            changes[step] += int(size / takes)
        gone = begin + takes + int(rng.expovariate(1 / 300) / STEP_S)
        if gone < steps:
            changes[gone] -= int(size / takes) * takes
        at_s += rng.expovariate(1 / 300)
    held, outside = 0, []
    for change in changes[:steps]:
        held += change
        outside.append(min(held, OUTSIDE_MOST))
    return outside
