"""Refusals in the log: one line for each peer and reason in a while, with the number of those left out."""

from __future__ import annotations

import asyncio
import logging

import pytest

from storaged.quiet import MOST, BoundedLog, peer_of

log = logging.getLogger("tests.quiet")


async def test_what_is_left_out_is_counted_at_the_end_of_the_window(caplog: pytest.LogCaptureFixture) -> None:
    refusals = BoundedLog(log, every_s=0.2)
    for _ in range(50):
        refusals.note("10.0.0.5", "token", "10.0.0.5: no token")
    refusals.note("10.0.0.5", "name", "10.0.0.5: no name")
    refusals.note("10.0.0.6", "token", "10.0.0.6: no token")
    assert caplog.messages == ["10.0.0.5: no token", "10.0.0.5: no name", "10.0.0.6: no token"]
    await asyncio.sleep(0.3)
    assert caplog.messages[3:] == ["10.0.0.5: 49 more refused in 0.2 s: token"]
    refusals.note("10.0.0.6", "token", "10.0.0.6: again")
    refusals.note("10.0.0.5", "token", "10.0.0.5: again")
    assert caplog.messages[4:] == ["10.0.0.6: again"], "a window that had any is followed by another"
    await asyncio.sleep(0.5)


async def test_a_flood_of_peers_is_counted_together(caplog: pytest.LogCaptureFixture) -> None:
    refusals = BoundedLog(log, every_s=0.2)
    for number in range(MOST + 100):
        refusals.note(f"peer {number}", "token", f"line {number}")
    assert len(caplog.messages) == MOST + 1
    await asyncio.sleep(0.3)
    assert caplog.messages[-1] == "other peers: 99 more refused in 0.2 s: token"
    await asyncio.sleep(0.3)


@pytest.mark.parametrize(
    ("told", "peer"),
    [
        ("ipv4:127.0.0.1:4711", "ipv4:127.0.0.1"),
        ("ipv6:%5B::1%5D:4711", "ipv6:%5B::1%5D"),
        ("unix:/run/x-1/7-123", "unix:/run/x-1/7"),
        ("unix:", "unix:"),
        ("unix:/run/host.sock", "unix:/run/host.sock"),
    ],
)
def test_a_peer_is_the_same_at_its_next_connection(told: str, peer: str) -> None:
    assert peer_of(told) == peer
