"""A guest that is itself one container: the token with which it proves to its host who it is."""

from __future__ import annotations

import asyncio
import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from storaged.errors import InvalidRequest, StoragedError
from storaged.guest.users import check_name

LONGEST_TOKEN = 4096


@dataclass(frozen=True, slots=True)
class ContainerSettings:
    """Where a container guest finds its token."""

    token: str = field(default="/dev/.container_token", metadata={"help": "The file that gets the container's token."})
    token_mode: int = field(default=0o600, metadata={"help": "Its permissions."})


def check_guest(token: str, username: str) -> bytes:
    """What goes into the file. Raises InvalidRequest, which never shows the token."""
    if not token or len(token) > LONGEST_TOKEN or not token.isprintable():
        raise InvalidRequest(f"container_token: 1 to {LONGEST_TOKEN} printable characters are accepted")
    if username:
        check_name("vm_username", username)
    return token.encode()


class TokenStore(Protocol):
    """Where the token is kept."""

    def put(self, token: bytes) -> None:
        """Replace it, whole or not at all. Raises OSError."""
        ...


class TokenFile:
    """A file of this machine."""

    def __init__(self, settings: ContainerSettings) -> None:
        self._path = settings.token
        self._mode = settings.token_mode

    def put(self, token: bytes) -> None:
        temporary = f"{self._path}.{os.urandom(8).hex()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(token)
                file.flush()
                os.fchmod(fd, self._mode)  # whatever the umask is
                os.fsync(fd)
            os.replace(temporary, self._path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


class Containers:
    """ConfigureContainerGuest."""

    def __init__(self, store: TokenStore) -> None:
        self._store = store
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="token")

    async def configure(self, token: str, username: str) -> None:
        """Put the token where the container finds it. Raises InvalidRequest, StoragedError."""
        content = check_guest(token, username)
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._store.put, content)
        except OSError as error:
            raise StoragedError(f"the container's token could not be written: {error.strerror}") from error

    def close(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
