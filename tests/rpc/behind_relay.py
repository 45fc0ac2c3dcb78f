"""A simulated guest behind a relay, for a test that floods it from outside: `behind_relay.py DIRECTORY`.

The sockets `host` and `other` in DIRECTORY stand for peers with the context ids 2 and 7; both may come in.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

from storaged.config import VsockConfig
from storaged.rpc.vsock import Relay
from tests.rpc.conftest import Guest

PEERS = {"host": 2, "other": 7}


async def main(directory: Path) -> None:
    guest = Guest(directory)
    await guest.start()
    relay = Relay(guest.path, VsockConfig(cids=(2, 7), preface_s=2.0))
    loop = asyncio.get_running_loop()

    def take(listener: socket.socket, cid: int) -> None:
        for _ in range(64):
            try:
                peer, _ = listener.accept()
            except BlockingIOError:
                return
            relay.adopt(peer, cid)

    for name, cid in PEERS.items():
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind(str(directory / name))
        listener.listen(128)
        loop.add_reader(listener, take, listener, cid)
    (directory / "ready").touch()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
