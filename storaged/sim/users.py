"""Users and a token in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from storaged.guest.users import Group, User, UserRequest


@dataclass
class SimUsers:
    """Nobody is created on this machine."""

    passwd: list[User] = field(default_factory=lambda: [User("root", 0, 0)])
    group: list[Group] = field(
        default_factory=lambda: [Group("root", 0), Group("audio", 29), Group("video", 44), Group("kvm", 105)]
    )
    lingers: set[str] = field(default_factory=set)

    def users(self) -> list[User]:
        return list(self.passwd)

    def groups(self) -> list[Group]:
        return list(self.group)

    def add(self, request: UserRequest) -> None:
        uid = request.uid if request.uid is not None else max(999, *(user.uid for user in self.passwd)) + 1
        self.passwd.append(User(request.name, uid, uid))
        self.group.append(Group(request.name, uid))
        self.join(request.name, request.groups)

    def join(self, name: str, groups: Sequence[str]) -> None:
        self.group = [
            replace(group, members=(*group.members, name)) if group.name in groups else group for group in self.group
        ]

    def linger(self, name: str) -> None:
        self.lingers.add(name)


class SimToken:
    """A token that no container finds."""

    content = b""

    def put(self, token: bytes) -> None:
        self.content = token
