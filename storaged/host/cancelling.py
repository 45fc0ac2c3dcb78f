"""Which resize a cancel means. Pure: a resize's id and a guest's name must agree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from storaged.errors import Kind, StoragedError


class Resizing(Protocol):
    """A resize, as far as a cancel has to know it."""

    @property
    def id(self) -> str: ...
    @property
    def guest(self) -> str: ...
    @property
    def active(self) -> bool: ...


_T = TypeVar("_T", bound=Resizing)


def meant(resizes: Iterable[_T], wanted: str, guest: str) -> _T:
    """The running resize with the id `wanted`, of the guest `guest`; one of the two may be empty.

    Raises StoragedError: NOT_FOUND when there is none, PRECONDITION when it is another guest's or has ended.
    """
    known = list(resizes)
    found = [each for each in known if (each.id == wanted if wanted else each.guest == guest)]
    if not found:
        what = " ".join(([wanted] if wanted else []) + ([f"of {guest}"] if guest else []))
        raise StoragedError(f"there is no resize {what}: nothing was cancelled", Kind.NOT_FOUND)
    other = next((each for each in found if guest and each.guest != guest), None)
    if other is not None:
        raise StoragedError(
            f"the resize {wanted} is of guest {other.guest}, not of {guest}: nothing was cancelled", Kind.PRECONDITION
        )
    running = next((each for each in found if each.active), None)
    if running is None:
        raise StoragedError(
            f"the resize {found[0].id} of {found[0].guest} has ended already: nothing was cancelled", Kind.PRECONDITION
        )
    return running
