"""A user of this guest: created, or made a member of more groups. What exists is never changed beyond that."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from storaged.errors import InvalidRequest, StoragedError

NAME = re.compile(r"[a-z][-a-z0-9_]*\$?", re.ASCII)
LONGEST_NAME = 32
"""LOGIN_NAME_MAX of every tool that is around, less its NUL."""
NO_UID = 0xFFFFFFFF
"""(uid_t)-1 means "leave it as it is"."""


@dataclass(frozen=True, slots=True)
class User:
    """A line of passwd(5)."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Group:
    """A line of group(5)."""

    name: str
    gid: int
    members: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UserRequest:
    """Who is asked for; without a uid the guest chooses one."""

    name: str
    uid: int | None = None
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Add:
    """There is no such user yet."""

    request: UserRequest


@dataclass(frozen=True, slots=True)
class Join:
    """The user exists and lacks these groups; none is as asked for."""

    groups: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Conflict:
    """What exists contradicts what is asked for."""

    reason: str


def check_name(field: str, name: str) -> None:
    """Raises InvalidRequest unless `name` can be a user's."""
    if NAME.fullmatch(name) is None or len(name) > LONGEST_NAME:
        raise InvalidRequest(
            f"{field} {name!r}: a lower-case letter, then at most {LONGEST_NAME - 1} of a-z 0-9 - _ are accepted"
        )


def check_user(request: UserRequest, groups: Sequence[Group]) -> None:
    """Raises InvalidRequest for what can never be right, or names a group that does not exist."""
    check_name("username", request.name)
    if request.uid is not None and not 0 < request.uid < NO_UID:
        raise InvalidRequest(f"uid {request.uid}: 1 to {NO_UID - 1} is accepted")
    known = {group.name for group in groups}
    for name in request.groups:
        if name not in known:
            raise InvalidRequest(f"group_names: there is no group {name!r}")


def plan(request: UserRequest, users: Sequence[User], groups: Sequence[Group]) -> Add | Join | Conflict:
    """What to do so that the user is as asked for."""
    found = next((user for user in users if user.name == request.name), None)
    if found is None:
        owner = next((user.name for user in users if user.uid == request.uid), None)
        return Conflict(f"uid {request.uid} belongs to {owner}") if owner is not None else Add(request)
    if found.uid == 0:
        return Conflict(f"{found.name} has uid 0")
    if request.uid is not None and found.uid != request.uid:
        return Conflict(f"{found.name} exists with uid {found.uid}, not {request.uid}")
    has = {group.name for group in groups if found.name in group.members or group.gid == found.gid}
    return Join(tuple(sorted(set(request.groups) - has)))


class UserSystem(Protocol):
    """The machine's user database. Every call may block; StoragedError says why something could not be done."""

    def users(self) -> list[User]: ...

    def groups(self) -> list[Group]: ...

    def add(self, request: UserRequest) -> None:
        """Create the user, with a home."""
        ...

    def join(self, name: str, groups: Sequence[str]) -> None:
        """Make the user a member of these groups too."""
        ...

    def linger(self, name: str) -> None:
        """Have the user's services run without a login."""
        ...


class Users:
    """SetUpUser, one call after the other."""

    def __init__(self, system: UserSystem) -> None:
        self._system = system
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="users")

    async def set_up(self, request: UserRequest) -> str:
        """Empty when the user is as asked for now, else why not. Raises InvalidRequest."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._set_up, request)

    def close(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _set_up(self, request: UserRequest) -> str:
        check_name("username", request.name)  # before the database is asked for anything
        groups = self._system.groups()
        check_user(request, groups)
        try:
            match plan(request, self._system.users(), groups):
                case Conflict(reason):
                    return reason
                case Add():
                    self._system.add(request)
                case Join(missing) if missing:
                    self._system.join(request.name, missing)
            self._system.linger(request.name)
        except StoragedError as error:
            return error.message
        return ""
