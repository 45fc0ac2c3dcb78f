"""When a guest asks its host for room."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from storaged.balloon.plea import AGAIN_S, LEAST, LOOK_LEAST_S, LOOK_MOST_S, Seen, look, pause
from storaged.units import GIB, MIB

readings = st.lists(st.tuples(st.floats(0.1, 2.0), st.integers(0, 8 * GIB), st.integers(0, 8 * GIB)), max_size=40)


def _told(*readings: tuple[float, int, int]) -> list[tuple[float, int]]:
    """(seconds until this reading, available, held): when it asked, and for how much."""
    seen, at, asked = Seen(), 100.0, []
    for after_s, available, held in readings:
        at += after_s
        seen, size = look(seen, available, held, at)
        if size:
            asked.append((at, size))
    return asked


def _falls(start: int, rate: int, held: int, count: int = 20, every_s: float = 0.5) -> list[tuple[float, int, int]]:
    return [(every_s, max(start - int(rate * every_s * index), 0), held) for index in range(count)]


def test_who_will_soon_have_nothing_asks_for_thirty_seconds() -> None:
    asked = _told(*_falls(300 * MIB, 50 * MIB, 8 * GIB))
    assert asked
    at, size = asked[0]
    assert at <= 100 + 300 / 50, "before nothing is left"
    assert 0.5 * 1500 * MIB <= size <= 1500 * MIB


def test_who_has_plenty_or_stands_still_asks_nothing() -> None:
    assert not _told(*_falls(8 * GIB, 50 * MIB, 8 * GIB))
    assert not _told(*_falls(MIB, 0, 8 * GIB))
    assert not _told(*_falls(300 * MIB, 50 * MIB, 0)), "no balloon, no host to ask"


def test_a_deletion_is_no_writing() -> None:
    assert not _told((1, 10 * MIB, GIB), (1, 500 * MIB, GIB), (1, 500 * MIB, GIB), (1, 500 * MIB, GIB))


@given(readings)
def test_never_more_than_is_held_and_never_often(told: list[tuple[float, int, int]]) -> None:
    seen, at, last = Seen(), 100.0, None
    for after_s, available, held in told:
        at += after_s
        seen, size = look(seen, available, held, at)
        assert size == 0 or min(LEAST, held) <= size <= held
        if size:
            assert last is None or at >= last + AGAIN_S
            last = at
        assert LOOK_LEAST_S <= pause(seen, held) <= LOOK_MOST_S
