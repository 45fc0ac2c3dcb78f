"""Users in the files below a root, changed by the tools of the shadow package, behind `guest.users`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence

from storaged.errors import StoragedError
from storaged.guest.users import Group, User, UserRequest

SHELL = "/bin/bash"


class LocalUsers:
    """The users of the tree at `root`."""

    def __init__(self, root: str = "/") -> None:
        self._root = root.rstrip("/")
        self._prefix = ["--prefix", self._root] if self._root else []

    def users(self) -> list[User]:
        return [
            User(fields[0], int(fields[2]), int(fields[3]))
            for fields in self._lines("passwd")
            if len(fields) == 7 and fields[2].isdigit() and fields[3].isdigit()
        ]

    def groups(self) -> list[Group]:
        return [
            Group(fields[0], int(fields[2]), tuple(filter(None, fields[3].split(","))))
            for fields in self._lines("group")
            if len(fields) == 4 and fields[2].isdigit()
        ]

    def add(self, request: UserRequest) -> None:
        uid = [] if request.uid is None else ["--uid", str(request.uid)]
        groups = ["--groups", ",".join(request.groups)] if request.groups else []
        _run("useradd", *self._prefix, "--create-home", "--shell", SHELL, *uid, *groups, "--", request.name)

    def join(self, name: str, groups: Sequence[str]) -> None:
        _run("usermod", *self._prefix, "--append", "--groups", ",".join(groups), "--", name)

    def linger(self, name: str) -> None:
        if not self._root and os.path.isdir("/run/systemd/system"):
            try:
                _run("loginctl", "enable-linger", name)
            except StoragedError:
                pass  # the manager may not run yet; it finds the file when it does
            else:
                return
        directory = f"{self._root}/var/lib/systemd/linger"
        try:
            os.makedirs(directory, mode=0o755, exist_ok=True)
            fd = os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            os.close(fd)
        except OSError as error:
            raise StoragedError(f"lingering of {name}: {error.strerror}") from error

    def _lines(self, name: str) -> Iterator[list[str]]:
        path = f"{self._root}/etc/{name}"
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                for line in file:
                    yield line.rstrip("\n").split(":")
        except OSError as error:
            raise StoragedError(f"{path}: {error.strerror}") from error


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise StoragedError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise StoragedError(done.stderr.strip() or f"{command[0]}: exit status {done.returncode}")
