"""A pool's state, and what its steps asked for: for tests of the sharing core by hand."""

from __future__ import annotations

from storaged.host import events as ev
from storaged.host.leases import Answer
from storaged.host.model import State
from storaged.host.shares import step
from storaged.units import GIB


class Told:
    """A state, and what its steps asked for."""

    def __init__(self, *guests: str, free: int = 40 * GIB, size: int = 500 * GIB, total: int = 0) -> None:
        self.state = State()
        self.now = 0.0
        self.total = total
        self.open: dict[str, ev.SetGrant] = {}
        self.images = dict.fromkeys(guests, 0)
        for name in guests:
            self.step(ev.GuestJoined(name, size, 0, self.now))
        self.look(free)

    def step(self, event: ev.Event) -> dict[str, ev.SetGrant]:
        self.state, effects = step(self.state, event)
        self.notes = [effect for effect in effects if isinstance(effect, ev.Note)]
        self.sent = {effect.guest: effect for effect in effects if isinstance(effect, ev.SetGrant)}
        self.open.update(self.sent)
        return self.sent

    def look(self, free: int, after_s: float = 1.0) -> dict[str, ev.SetGrant]:
        self.now += after_s
        return self.step(ev.PoolSampled(free, self.now, self.images, self.total))

    def answer(self, *grants: ev.SetGrant) -> None:
        for grant in grants:
            self.step(ev.GrantAcked(grant.guest, grant.seq, Answer(grant.size), self.now))

    def says(self, grant: ev.SetGrant, answer: Answer, refused: str = "") -> None:
        """The guest answers to `grant` with more than that it got there."""
        self.step(ev.GrantAcked(grant.guest, grant.seq, answer, self.now, refused))

    def settle(self, free: int, rounds: int = 4) -> None:
        """Answer and look, until nothing changes any more in the calm."""
        for _ in range(rounds):
            self.answer(*self.open.values())
            self.open = {}
            self.look(free)
