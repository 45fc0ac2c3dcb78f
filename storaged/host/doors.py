"""Where guests come in that gRPC cannot hear: vsock, and the sockets at which a machine monitor hands vsock on.

Their connections are relayed to a socket that nobody else can reach, each from a name that says who it is: gRPC shows
that name as the peer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket

from storaged.addresses import ANY_CID, HYBRID, VsockAddress
from storaged.config import VsockConfig
from storaged.errors import StoragedError
from storaged.host.sockets import clear
from storaged.rpc.acceptor import BACKLOG, Acceptor
from storaged.rpc.private import PrivateDirectory
from storaged.rpc.vsock import Relay

log = logging.getLogger(__name__)
FIRST_GUEST = 3
"""0 to 2 are the hypervisor, this machine and the host (vsock(7)): no guest has them."""
_LIMITS = VsockConfig(connections=1024, connections_per_cid=4)


class Doors:
    """Takes connections of guests on vsock and on monitors' sockets, and knows afterwards whose each was."""

    def __init__(self) -> None:
        self._private = PrivateDirectory()
        self.backend = self._private.socket("backend")
        self._hybrid: dict[int, str] = {}  # below 0, where no context id is
        self.relay = Relay(self.backend, _LIMITS, cids=self, names=self._private.path)
        self._acceptors: list[tuple[Acceptor, str]] = []

    def __contains__(self, cid: object) -> bool:
        """True for whoever may be a guest."""
        return isinstance(cid, int) and (FIRST_GUEST <= cid < ANY_CID or cid in self._hybrid)

    def listen(self, address: VsockAddress) -> VsockAddress:
        """Accept on vsock. Raises StoragedError."""
        return self.relay.listen(address)

    def listen_hybrid(self, path: str) -> None:
        """Accept at `path`, where a monitor connects for its guest; it stays away with a warning if it cannot."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            clear(path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            listener.bind(path)
            os.chmod(path, 0o666)  # noqa: S103  # monitors have users of their own: the directory decides who may come
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            log.warning("the guest behind %s cannot announce itself: %s", path, error.strerror)
            return
        except StoragedError:
            listener.close()
            raise
        number = -1 - len(self._hybrid)
        self._hybrid[number] = path
        self._acceptors.append((Acceptor(listener, lambda peer, _: self.relay.adopt(peer, number)), path))

    def peer(self, told: str) -> str | None:
        """Who `told`, gRPC's peer without escapes, is: `vsock:7` or `hybrid:/path`; None when it came another way."""
        directory, name = os.path.split(told.removeprefix("unix:"))
        if directory != self._private.path:
            return None
        number = int(name.rpartition("-")[0])
        return f"{HYBRID}{self._hybrid[number]}" if number in self._hybrid else f"vsock:{number}"

    async def close(self) -> None:
        """Take no more connections, and end those that are there."""
        for acceptor, path in self._acceptors:
            acceptor.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._acceptors.clear()
        await self.relay.close()
        self._private.remove()
