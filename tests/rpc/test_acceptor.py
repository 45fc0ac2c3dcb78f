"""Connections are taken on the event loop, and a lack of descriptors does not spin it."""

from __future__ import annotations

import asyncio
import errno
import socket
from pathlib import Path
from typing import Any

import pytest

from storaged.rpc import acceptor
from storaged.rpc.acceptor import Acceptor


class Short(socket.socket):
    """Has no descriptor for a connection the first times."""

    refused = 0
    refuses = 1
    code = errno.EMFILE

    def accept(self) -> tuple[socket.socket, Any]:
        if self.refused < self.refuses:
            self.refused += 1
            raise OSError(self.code, "none left")
        return super().accept()


def _listener(path: Path) -> Short:
    one = Short(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    one.bind(str(path))
    one.listen()
    return one


async def test_a_lack_of_descriptors_is_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "PAUSE_S", 0.2)
    listener, taken = _listener(tmp_path / "s"), asyncio.Queue[socket.socket]()
    listener.refuses = 2
    one = Acceptor(listener, lambda peer, _: taken.put_nowait(peer))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(tmp_path / "s"))
        await asyncio.sleep(0.1)
        assert listener.refused == 1  # and not once in every round
        with await asyncio.wait_for(taken.get(), 5) as peer:
            assert not peer.getblocking()
    assert listener.refused == 2
    one.close()


async def test_closed_in_a_pause_it_does_not_begin_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "PAUSE_S", 0.1)
    listener = _listener(tmp_path / "s")
    failed: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: failed.append(told))
    one = Acceptor(listener, lambda peer, _: peer.close())
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(tmp_path / "s"))
        await asyncio.sleep(0.02)
        assert listener.refused
        one.close()
        await asyncio.sleep(0.2)
    assert not failed


async def test_a_connection_that_is_gone_already_pauses_nothing(tmp_path: Path) -> None:
    listener, taken = _listener(tmp_path / "s"), asyncio.Queue[socket.socket]()
    listener.code = errno.ECONNABORTED
    one = Acceptor(listener, lambda peer, _: taken.put_nowait(peer))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(tmp_path / "s"))
        (await asyncio.wait_for(taken.get(), acceptor.PAUSE_S / 2)).close()
    one.close()
