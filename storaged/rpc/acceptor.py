"""Connections of a listening socket, taken on the event loop by ourselves.

A server of asyncio that is closed between its accept and the transport forgets the connection (Python 3.11 to 3.13,
`BaseSelectorEventLoop._accept_connection2`); here `taken` has it at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

BACKLOG = 64
PAUSE_S = 1.0
"""Without descriptors or memory the socket stays readable, and asking again at once would do nothing else."""
_SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

Taken = Callable[[socket.socket, Any], None]
"""Has the peer's socket, which does not block, and its address, as the family of the socket has them."""


class Acceptor:
    """Gives each connection of `listener`, which listens and does not block, to `taken`; owns `listener`."""

    def __init__(self, listener: socket.socket, taken: Taken) -> None:
        self._listener = listener
        self._taken = taken
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._listen()

    def _listen(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(BACKLOG):
            try:
                peer, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                log.warning("a connection was lost before it began: %s", error)
                if error.errno in _SHORT:
                    self._loop.remove_reader(self._listener)
                    self._pause = self._loop.call_later(PAUSE_S, self._listen)
                return
            peer.setblocking(False)  # noqa: FBT003  # the standard library's own signature
            self._taken(peer, address)

    def close(self) -> None:
        """Take no more; what was taken goes on."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()
