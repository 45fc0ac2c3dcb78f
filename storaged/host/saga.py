"""A resize from end to end: `step(saga, event) -> (saga, effects)`. Image and filesystem, in the right order.

The rules, in prose:

1. The image is never smaller than the filesystem. Growing, the image goes first; shrinking, it goes last, and only
   after the filesystem's size was read from the image itself.
2. Each stage has one work, which ends in one event. Every work can be done twice: after a crash the stage that the
   journal names is begun again, and finds what it had done already.
3. The stage is written down before its work begins.
4. What was begun is taken back (a larger image cut again, a smaller filesystem grown again) when the resize is
   cancelled or the guest says that it failed; never while the guest may still be at work, unheard.
5. After the image is as asked for, it is too late to cancel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from storaged.host.saga_model import (
    AwaitCapacity,
    CancelAsked,
    CapacitySeen,
    CutImage,
    Direction,
    Effect,
    Event,
    Failed,
    GrowImage,
    GuestEnded,
    ImageIs,
    Interrupt,
    Outcome,
    Progressed,
    ResizeFilesystem,
    Resumed,
    Saga,
    Save,
    Stage,
    Stopped,
    Survey,
    Surveyed,
    Verified,
    Verify,
)  # fmt: skip
from storaged.units import format_size

Result = tuple[Saga, tuple[Effect, ...]]

# --- the tables -----------------------------------------------------------------------------------------------

PATH: dict[Direction, tuple[Stage, ...]] = {
    Direction.UNKNOWN: (Stage.PREPARING,),
    Direction.GROW: (
        Stage.PREPARING, Stage.IMAGE, Stage.CAPACITY, Stage.FILESYSTEM, Stage.VERIFYING, Stage.ENDED,
    ),
    Direction.SHRINK: (
        Stage.PREPARING, Stage.BALLOON, Stage.FILESYSTEM, Stage.VERIFYING, Stage.IMAGE, Stage.ENDED,
    ),
}  # fmt: skip
WORK: dict[tuple[Direction, Stage], Callable[[Saga], Effect]] = {
    (Direction.UNKNOWN, Stage.PREPARING): lambda _: Survey(),
    (Direction.GROW, Stage.IMAGE): lambda saga: GrowImage(saga.to),
    (Direction.GROW, Stage.CAPACITY): lambda saga: AwaitCapacity(saga.to),
    (Direction.GROW, Stage.FILESYSTEM): lambda saga: ResizeFilesystem(saga.to),
    (Direction.GROW, Stage.VERIFYING): lambda _: Verify(),
    (Direction.GROW, Stage.RESTORING): lambda saga: CutImage(saga.image_start),
    (Direction.SHRINK, Stage.BALLOON): lambda saga: ResizeFilesystem(saga.to),
    (Direction.SHRINK, Stage.FILESYSTEM): lambda saga: ResizeFilesystem(saga.to),
    (Direction.SHRINK, Stage.VERIFYING): lambda _: Verify(),
    (Direction.SHRINK, Stage.IMAGE): lambda saga: CutImage(saga.to),
    (Direction.SHRINK, Stage.RESTORING): lambda saga: ResizeFilesystem(saga.start),
}
EXPECTS: dict[type[Any], frozenset[Stage]] = {
    Surveyed: frozenset({Stage.PREPARING}),
    ImageIs: frozenset({Stage.IMAGE, Stage.RESTORING}),
    CapacitySeen: frozenset({Stage.CAPACITY}),
    Progressed: frozenset({Stage.BALLOON, Stage.FILESYSTEM, Stage.RESTORING}),
    GuestEnded: frozenset({Stage.BALLOON, Stage.FILESYSTEM, Stage.RESTORING}),
    Verified: frozenset({Stage.VERIFYING}),
    Stopped: frozenset({Stage.PREPARING, Stage.CAPACITY, Stage.BALLOON, Stage.FILESYSTEM}),
    Failed: frozenset(Stage) - {Stage.ENDED},
    CancelAsked: frozenset(Stage) - {Stage.ENDED, Stage.RESTORING},
    Resumed: frozenset(Stage) - {Stage.ENDED},
}
"""An event that means nothing in its stage (a late one) changes nothing."""
ASKS = frozenset({Stage.BALLOON, Stage.FILESYSTEM})


def step(saga: Saga, event: Event) -> Result:
    """The saga after `event`, and what is to be done, in this order."""
    if saga.stage not in EXPECTS[type(event)]:
        return saga, ()
    return HANDLERS[type(event)](saga, event)


def begun(saga: Saga) -> Result:
    """What a new saga asks for first."""
    return saga, (Save(), WORK[saga.direction, saga.stage](saga))


def cuts(saga: Saga) -> bool:
    """True in a stage whose work cuts the image."""
    return isinstance(WORK.get((saga.direction, saga.stage), lambda _: None)(saga), CutImage)


# --- what the rest is made of ---------------------------------------------------------------------------------


def _enter(saga: Saga, stage: Stage) -> Result:
    saga = replace(saga, stage=stage, sent=saga.sent or stage in ASKS, rate=None, eta=None)
    if stage is Stage.ENDED:
        return saga, (Save(),)
    return saga, (Save(), WORK[saga.direction, stage](saga))


def _next(saga: Saga) -> Result:
    path = PATH[saga.direction]
    stage = path[path.index(saga.stage) + 1]
    if stage is Stage.ENDED:
        return _end(saga, Outcome.DONE, "")
    return _enter(saga, stage)


def _end(saga: Saga, outcome: Outcome, reason: str) -> Result:
    done = outcome is Outcome.DONE
    saga = replace(saga, outcome=outcome, reason=reason, progress=1.0 if done else saga.progress)
    return _enter(saga, Stage.ENDED)


def truth(saga: Saga) -> str:
    """What is true now, in words."""

    def size(value: int | None) -> str:
        return "a size that is not known" if value is None else f"{format_size(value)} ({value} bytes)"

    return f"the image has {size(saga.image)}, the filesystem {size(saga.filesystem)}"


def _restore(saga: Saga, outcome: Outcome, reason: str) -> Result:
    """Take back what was begun; only when the guest is certainly not at work."""
    saga = replace(saga, outcome=outcome, reason=reason)
    if saga.direction is Direction.GROW:
        begun_nothing = saga.image is not None and saga.image <= saga.image_start
    else:
        begun_nothing = not saga.sent or saga.filesystem == saga.start
    if begun_nothing:
        return _end(saga, outcome, _with_truth(reason, saga))
    return _enter(saga, Stage.RESTORING)


def _with_truth(reason: str, saga: Saga) -> str:
    return f"{reason}; {truth(saga)}"


CANCELLED = "cancelled as asked"

# --- events ---------------------------------------------------------------------------------------------------


def _surveyed(saga: Saga, event: Surveyed) -> Result:
    grows = saga.to > event.image
    saga = replace(
        saga,
        start=event.filesystem, image_start=event.image, image=event.image, filesystem=event.filesystem,
        direction=Direction.GROW if grows else Direction.SHRINK,
    )  # fmt: skip
    if event.filesystem > event.image:
        return _end(saga, Outcome.FAILED, _with_truth("the image was cut already: it needs a repair", saga))
    if saga.cancelling:
        return _end(saga, Outcome.CANCELLED, _with_truth(CANCELLED, saga))
    if saga.to < event.minimum:
        least = f"the least it can have is {format_size(event.minimum)} ({event.minimum} bytes)"
        return _end(saga, Outcome.FAILED, _with_truth(least, saga))
    if saga.to == event.image == event.filesystem:
        return _end(saga, Outcome.DONE, "")
    return _next(saga)


def _image_is(saga: Saga, event: ImageIs) -> Result:
    saga = replace(saga, image=event.size)
    if saga.stage is Stage.RESTORING:
        return _restored(saga)
    if saga.cancelling and saga.direction is Direction.GROW:
        return _restore(saga, Outcome.CANCELLED, CANCELLED)
    return _next(saga)


def _restored(saga: Saga) -> Result:
    assert saga.outcome is not None
    return _end(saga, saga.outcome, _with_truth(saga.reason, saga))


def _capacity_seen(saga: Saga, event: CapacitySeen) -> Result:  # noqa: ARG001  # as all of the table
    if saga.cancelling:
        return _restore(saga, Outcome.CANCELLED, CANCELLED)
    return _next(saga)


def _progressed(saga: Saga, event: Progressed) -> Result:
    stage = Stage.FILESYSTEM if event.moving and saga.stage is Stage.BALLOON else saga.stage
    restoring = saga.stage is Stage.RESTORING
    share = saga.progress if restoring else min(max(event.share, saga.progress), 0.99)
    moved = max(saga.moved, event.moved)
    # Not written down: after a crash the guest is asked again, and tells.
    saga = replace(
        saga, stage=stage, filesystem=event.filesystem, moved=moved, progress=share, rate=event.rate, eta=event.eta
    )
    return saga, ()


def _guest_ended(saga: Saga, event: GuestEnded) -> Result:
    saga = replace(saga, filesystem=event.filesystem)
    if saga.stage is Stage.RESTORING:
        if event.filesystem != saga.start and event.reason:
            saga = replace(saga, reason=f"{saga.reason}; it could not be taken back: {event.reason}")
        return _restored(saga)
    if event.filesystem == saga.to:
        if saga.cancelling and saga.direction is Direction.SHRINK:
            return _restore(saga, Outcome.CANCELLED, CANCELLED)
        return _enter(saga, Stage.VERIFYING)
    if saga.cancelling:
        return _restore(saga, Outcome.CANCELLED, CANCELLED)
    return _restore(saga, Outcome.FAILED, event.reason or "the guest ended at another size")


def _verified(saga: Saga, event: Verified) -> Result:
    saga = replace(saga, image=event.image, filesystem=event.filesystem)
    if event.filesystem != saga.to:
        reason = "what the image says is not what the guest said"
        return _end(saga, Outcome.FAILED, _with_truth(reason, saga))
    if saga.cancelling and saga.direction is Direction.SHRINK:
        return _restore(saga, Outcome.CANCELLED, CANCELLED)
    return _next(saga)


def _stopped(saga: Saga, event: Stopped) -> Result:  # noqa: ARG001  # as all of the table
    return _restore(saga, Outcome.CANCELLED, CANCELLED)


def _failed(saga: Saga, event: Failed) -> Result:
    saga = replace(saga, image=event.image, filesystem=event.filesystem)
    if saga.stage is Stage.RESTORING:
        reason = f"{saga.reason}; it could not be taken back: {event.reason}"
        return _end(saga, saga.outcome or Outcome.FAILED, _with_truth(reason, saga))
    outcome, reason = Outcome.FAILED, event.reason
    if not saga.sent and saga.stage in {Stage.IMAGE, Stage.CAPACITY}:
        if saga.cancelling:
            outcome, reason = Outcome.CANCELLED, CANCELLED
        return _restore(saga, outcome, reason)
    # Whether the guest is at work is not known: nothing may be taken from under it.
    return _end(saga, outcome, _with_truth(reason, saga))


def _cancel_asked(saga: Saga, event: CancelAsked) -> Result:  # noqa: ARG001  # as all of the table
    if saga.cancelling:
        return saga, ()
    return replace(saga, cancelling=True), (Save(), Interrupt())


def _resumed(saga: Saga, event: Resumed) -> Result:  # noqa: ARG001  # as all of the table
    saga = replace(saga, resumed=saga.resumed + 1)
    return saga, (Save(), WORK[saga.direction, saga.stage](saga))


HANDLERS: dict[type[Any], Callable[[Saga, Any], Result]] = {
    Surveyed: _surveyed,
    ImageIs: _image_is,
    CapacitySeen: _capacity_seen,
    Progressed: _progressed,
    GuestEnded: _guest_ended,
    Verified: _verified,
    Stopped: _stopped,
    Failed: _failed,
    CancelAsked: _cancel_asked,
    Resumed: _resumed,
}
