"""The saga's core: whatever happens, in whatever order, the image is never smaller than the filesystem."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from storaged.host import saga as sagas
from storaged.host import saga_model as sm
from storaged.host.saga import EXPECTS, HANDLERS, PATH, WORK, begun, step
from storaged.host.saga_model import Direction, Outcome, Saga, Stage
from storaged.units import GIB

SIZES = [size * GIB for size in (1, 2, 3, 4)]


def new(to: int, guest: str = "g") -> Saga:
    return Saga("id", guest, to, 1000.0)


def walk(saga: Saga, *events: sm.Event) -> tuple[Saga, list[sm.Effect]]:
    """The saga after all of them, and every effect on the way."""
    saga, effects = begun(saga)
    done = list(effects)
    for event in events:
        saga, effects = step(saga, event)
        done += effects
    return saga, done


def works(effects: list[sm.Effect]) -> list[sm.Effect]:
    return [effect for effect in effects if not isinstance(effect, sm.Save | sm.Interrupt)]


def test_growing_the_image_goes_first() -> None:
    saga, effects = walk(
        new(4), sm.Surveyed(2, 2), sm.ImageIs(4), sm.CapacitySeen(), sm.GuestEnded(4), sm.Verified(4, 4)
    )
    assert works(effects) == [
        sm.Survey(), sm.GrowImage(4), sm.AwaitCapacity(4), sm.ResizeFilesystem(4), sm.Verify(),
    ]  # fmt: skip
    assert (saga.stage, saga.outcome, saga.progress, saga.start) == (Stage.ENDED, Outcome.DONE, 1.0, 2)


def test_shrinking_the_image_goes_last() -> None:
    saga, effects = walk(
        new(2),
        sm.Surveyed(4, 4, 1), sm.Progressed(4, moving=False), sm.Progressed(3, moving=True, moved=5, share=0.5),
        sm.GuestEnded(2), sm.Verified(4, 2), sm.ImageIs(2),
    )  # fmt: skip
    assert works(effects) == [sm.Survey(), sm.ResizeFilesystem(2), sm.Verify(), sm.CutImage(2)]
    assert (saga.outcome, saga.image, saga.filesystem, saga.moved) == (Outcome.DONE, 2, 2, 5)


def test_a_filesystem_that_grows_within_its_image_waits_for_no_image() -> None:
    saga, effects = walk(new(3), sm.Surveyed(4, 2))
    assert saga.direction is Direction.SHRINK
    assert works(effects)[-1] == sm.ResizeFilesystem(3)


def test_every_work_waits_until_it_is_written_down() -> None:
    for events in (
        (sm.Surveyed(2, 2), sm.ImageIs(4), sm.CapacitySeen(), sm.GuestEnded(4), sm.Verified(4, 4)),
        (sm.Surveyed(8, 8), sm.GuestEnded(4), sm.Verified(8, 4), sm.ImageIs(4)),
    ):
        _, effects = walk(new(4), *events)
        for first, then in itertools.pairwise(effects):
            assert isinstance(then, sm.Save) or isinstance(first, sm.Save)


def test_what_a_guest_says_is_not_enough_for_a_cut() -> None:
    saga, effects = walk(new(2), sm.Surveyed(4, 4), sm.GuestEnded(2), sm.Verified(4, 3))
    assert saga.outcome is Outcome.FAILED
    assert not any(isinstance(effect, sm.CutImage) for effect in effects)
    assert "the image has 4 B (4 bytes), the filesystem 3 B (3 bytes)" in saga.reason


def test_nothing_is_taken_from_a_guest_that_may_be_at_work() -> None:
    saga, effects = walk(
        new(4), sm.Surveyed(2, 2), sm.ImageIs(4), sm.CapacitySeen(), sm.Failed("it does not answer", 4, 2)
    )
    assert saga.outcome is Outcome.FAILED
    assert not any(isinstance(effect, sm.CutImage) for effect in effects)


@pytest.mark.parametrize(
    ("events", "restores"),
    [
        ((), None),
        ((sm.Surveyed(2, 2),), sm.CutImage(2)),
        ((sm.Surveyed(2, 2), sm.ImageIs(4)), sm.CutImage(2)),
        ((sm.Surveyed(2, 2), sm.ImageIs(4), sm.CapacitySeen()), sm.CutImage(2)),
        ((sm.Surveyed(8, 8),), sm.ResizeFilesystem(8)),
        ((sm.Surveyed(8, 8), sm.GuestEnded(4)), sm.ResizeFilesystem(8)),
    ],
)
def test_a_cancel_takes_back_what_was_begun(events: tuple[sm.Event, ...], restores: sm.Effect | None) -> None:
    saga, _ = walk(new(4), *events)
    saga, effects = step(saga, sm.CancelAsked())
    assert sm.Interrupt() in effects
    done: list[sm.Effect] = []
    image, filesystem = saga.image or 2, saga.filesystem or 2
    answers: dict[Stage, sm.Event] = {
        Stage.PREPARING: sm.Surveyed(2, 2),
        Stage.IMAGE: sm.ImageIs(4),
        Stage.CAPACITY: sm.Stopped(),
        Stage.BALLOON: sm.GuestEnded(5, "stopped"),
        Stage.FILESYSTEM: sm.GuestEnded(2, "stopped"),
        Stage.VERIFYING: sm.Verified(image, filesystem),
    }
    while saga.active and saga.stage is not Stage.RESTORING:
        saga, effects = step(saga, answers[saga.stage])
        done += effects
    assert works(done)[-1:] == ([restores] if restores is not None else [])
    if restores is not None:
        answer = sm.ImageIs(2) if isinstance(restores, sm.CutImage) else sm.GuestEnded(8)
        saga, _ = step(saga, answer)
    assert saga.outcome is Outcome.CANCELLED
    assert saga.reason.startswith(sagas.CANCELLED)


def test_after_the_cut_it_is_too_late() -> None:
    saga, _ = walk(new(4), sm.Surveyed(8, 8), sm.GuestEnded(4), sm.Verified(8, 4), sm.CancelAsked(), sm.ImageIs(4))
    assert saga.outcome is Outcome.DONE


def test_an_image_that_was_cut_already_is_left_alone() -> None:
    saga, effects = walk(new(8), sm.Surveyed(2, 4))
    assert saga.outcome is Outcome.FAILED
    assert works(effects) == [sm.Survey()]


def test_below_the_minimum_nothing_begins() -> None:
    saga, effects = walk(new(2), sm.Surveyed(8, 8, 3))
    assert saga.outcome is Outcome.FAILED
    assert "least" in saga.reason
    assert works(effects) == [sm.Survey()]


def test_the_tables_are_whole() -> None:
    assert set(HANDLERS) == set(EXPECTS)
    for direction, path in PATH.items():
        for stage in path if direction is Direction.UNKNOWN else path[1:]:
            assert stage is Stage.ENDED or (direction, stage) in WORK


def test_a_late_event_changes_nothing() -> None:
    saga, _ = walk(new(4), sm.Surveyed(2, 2))
    for late in (sm.CapacitySeen(), sm.GuestEnded(4), sm.Verified(4, 4), sm.Surveyed(1, 1)):
        assert step(saga, late) == (saga, ())
    ended = replace(saga, stage=Stage.ENDED, outcome=Outcome.DONE)
    for event in (sm.Failed("x"), sm.CancelAsked(), sm.Resumed(), sm.ImageIs(1)):
        assert step(ended, event) == (ended, ())


class World(RuleBasedStateMachine):
    """An image, a filesystem in it and a guest that resizes; everything fails, dies and is cancelled at any time."""

    @initialize(image=st.sampled_from(SIZES), less=st.integers(0, 2), to=st.sampled_from(SIZES))
    def begin(self, image: int, less: int, to: int) -> None:
        self.image = image
        self.filesystem = max(image - less * GIB, GIB)
        self.job: int | None = None  # what the guest is at, heard or not
        self.written: Saga | None = None
        self.saga, self.effects = begun(new(to))
        self.work: sm.Effect | None = None
        self.begun_at = (self.image, self.filesystem)
        self.steps = 0
        self._settle()

    def _settle(self) -> None:
        """Carry out what asks nobody: the journal."""
        self.work = None
        for effect in self.effects:
            if isinstance(effect, sm.Save):
                self.written = self.saga
            elif not isinstance(effect, sm.Interrupt):
                assert self.written == self.saga, "written down before its work"
                self.work = effect

    def _feed(self, event: sm.Event) -> None:
        work = self.work
        self.saga, self.effects = step(self.saga, event)
        self._settle()
        if self.work is None and self.saga.active:
            self.work = work

    def _cut(self, size: int) -> bool:
        """As the backend does: never below what the image itself says."""
        if size < self.filesystem:
            return False
        self.image = min(self.image, size)
        return True

    @precondition(lambda self: self.work is not None)
    @rule()
    def works(self) -> None:
        assert self.work is not None
        match self.work:
            case sm.Survey():
                self._feed(sm.Surveyed(self.image, self.filesystem))
            case sm.GrowImage(size):
                self.image = max(self.image, size)
                self._feed(sm.ImageIs(self.image))
            case sm.CutImage(size):
                event = sm.ImageIs(self.image) if self._cut(size) else self._failure("the filesystem is larger")
                self._feed(replace(event, size=self.image) if isinstance(event, sm.ImageIs) else event)
            case sm.AwaitCapacity(size):
                assert self.image >= size
                self._feed(sm.CapacitySeen())
            case sm.ResizeFilesystem(size):
                if self.saga.cancelling and self.saga.stage is not Stage.RESTORING:
                    self.job = None
                elif self.image >= size:
                    self.filesystem = size
                    self.job = None
                self._feed(sm.GuestEnded(self.filesystem, "" if self.filesystem == size else "it was stopped"))
            case sm.Verify():
                self._feed(sm.Verified(self.image, self.filesystem))

    def _failure(self, reason: str, *, knows: bool = True) -> sm.Failed:
        return sm.Failed(reason, self.image, self.filesystem) if knows else sm.Failed(reason)

    @precondition(lambda self: self.work is not None)
    @rule(half=st.booleans(), knows=st.booleans())
    def fails(self, half: bool, knows: bool) -> None:
        """The work fails, before or after it has done what it should."""
        match self.work:
            case sm.GrowImage(size) if half:
                self.image = max(self.image, size)
            case sm.CutImage(size) if half:
                self._cut(size)
            case sm.ResizeFilesystem(size) if half:
                self.job = size  # it was asked, and nobody hears of it any more
        self._feed(self._failure("broken", knows=knows))

    @precondition(lambda self: self.work is not None and isinstance(self.work, sm.ResizeFilesystem))
    @rule(share=st.floats(0, 1))
    def guest_gives_up_on_the_way(self, share: float) -> None:
        assert isinstance(self.work, sm.ResizeFilesystem)
        if self.work.size < self.filesystem:
            self.filesystem = int(self.filesystem - share * (self.filesystem - self.work.size))
        self.job = None
        self._feed(sm.GuestEnded(self.filesystem, "no room"))

    @precondition(lambda self: self.work is not None and isinstance(self.work, sm.ResizeFilesystem))
    @rule(share=st.floats(0, 1), moving=st.booleans())
    def guest_gets_on(self, share: float, moving: bool) -> None:
        assert isinstance(self.work, sm.ResizeFilesystem)
        before = self.saga.progress
        self.job = self.work.size
        self._feed(sm.Progressed(self.filesystem, moving, share=share))
        assert before <= self.saga.progress < 1

    @precondition(lambda self: self.job is not None)
    @rule()
    def the_guest_goes_on_unheard(self) -> None:
        """Also long after the saga has ended: a kernel grows a filesystem to what its device has, never beyond."""
        assert self.job is not None
        if self.job <= self.filesystem or self.job <= self.image:
            self.filesystem = self.job
        else:
            assert not self.saga.sent or self.saga.direction is Direction.SHRINK or self.saga.outcome is not None
        self.job = None

    @rule()
    def cancel(self) -> None:
        self._feed(sm.CancelAsked())

    @precondition(lambda self: self.written is not None and self.written.active)
    @rule()
    def dies_and_starts_again(self) -> None:
        assert self.written is not None
        self.saga = self.written
        self._feed(sm.Resumed())
        assert self.saga.resumed == self.written.resumed

    @invariant()
    def the_image_holds_the_filesystem(self) -> None:
        if hasattr(self, "image"):
            assert self.image >= self.filesystem

    @invariant()
    def an_end_is_an_end_and_says_what_is_true(self) -> None:
        if not hasattr(self, "saga"):
            return
        assert self.saga.active == (self.work is not None)
        if self.saga.active:
            return
        assert self.written == self.saga
        if self.saga.outcome is Outcome.DONE:
            assert self.saga.progress == 1.0
        else:
            assert "the image has" in self.saga.reason
            if self.job is None and self.saga.image is not None:
                assert self.saga.image == self.image or self.saga.filesystem is None

    def teardown(self) -> None:
        """Undisturbed, every saga comes to an end in a few steps."""
        for _ in range(10):
            if self.work is None:
                break
            self.works()
        assert not self.saga.active


World.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestWorld = World.TestCase
