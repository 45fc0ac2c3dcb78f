"""The resizer's cancel on the real kernel: what moves stops soon, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable

import pytest

from lab.loop import fill
from storaged.btrfs.filesystem import BtrfsFilesystem
from storaged.btrfs.resizer import ChildResizer
from storaged.errors import FilesystemError
from storaged.resize.layout import Chunk
from storaged.units import GIB, MIB
from tests.btrfs import support
from tests.btrfs.conftest import MakeGuest
from tests.btrfs.support import Figures

pytestmark = pytest.mark.btrfs
DISK = 10 * GIB
SOON_S = 1.0
TRIES = 3
"""On a busy machine a whole chunk may be moved while nobody who looks at it gets to run."""


def _rewrite(resizer: ChildResizer, chunk: Chunk) -> None:
    resizer.move_out(chunk.logical)


def _cut(resizer: ChildResizer, chunk: Chunk) -> None:
    resizer.resize(chunk.top - MIB)


def _cancelled(resizer: ChildResizer, call: Callable[[ChildResizer, Chunk], None], chunk: Chunk) -> float | None:
    """Seconds from the cancel, in the middle of what `call` moves, to its end; None when it was through before."""
    written = resizer.written()
    errors: list[int | None] = []
    ended = threading.Event()

    def work() -> None:
        try:
            call(resizer, chunk)
        except FilesystemError as error:
            errors.append(error.errno)
        finally:
            ended.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    support.until(lambda: ended.is_set() or resizer.written() > written + 4 * MIB, pause_s=0.001)
    began = time.monotonic()
    resizer.cancel()
    thread.join(60)
    if not errors:
        return None
    assert errors == [errno.ECANCELED]
    return time.monotonic() - began


def _tried(make_guest: MakeGuest, call: Callable[[ChildResizer, Chunk], None]) -> float | None:
    guest = make_guest(DISK)
    fill(guest.mountpoint / "below", GIB)
    fill(guest.mountpoint / "data", GIB)
    (guest.mountpoint / "below").unlink()
    support.sync(guest)
    before = support.hashes(guest.mountpoint)
    filesystem = BtrfsFilesystem(str(guest.mountpoint))
    with contextlib.closing(filesystem), contextlib.closing(ChildResizer(filesystem)) as resizer:
        resizer.start()
        chunk = max((c for c in filesystem.layout().chunks if c.kind == "data"), key=lambda c: c.used)
        took = _cancelled(resizer, call, chunk)
        if took is not None:
            support.until(lambda: filesystem.space().exclusive_operation == "none", within_s=5)
            assert filesystem.size() == DISK
            assert any(c.logical == chunk.logical for c in filesystem.layout().chunks), "it stays where it was"
    assert support.hashes(guest.mountpoint) == before
    guest.unmount()
    guest.check()
    guest.close()
    return took


@pytest.mark.parametrize("call", [_rewrite, _cut])
def test_a_cancel_in_the_middle_of_a_chunk_ends_it_soon(
    call: Callable[[ChildResizer, Chunk], None], make_guest: MakeGuest, figures: Figures
) -> None:
    took = next((took for _ in range(TRIES) if (took := _tried(make_guest, call)) is not None), None)
    assert took is not None, "it was never stopped"
    figures.note(cancelled=call.__name__.strip("_"), took_s=round(took, 3))
    assert took < SOON_S
