"""What a cut that failed says about the image is true: never that it is not cut when it is."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.host import loop, superblock
from storaged.host.images import ImageError, RawImage
from storaged.host.loop import LoopImage
from storaged.units import GIB
from tests.host.resizable import write_superblock

SMALL, LARGE = GIB, 2 * GIB


class File(RawImage):
    """An image that nobody holds. `breaks`: the step at which it fails, `release`: whether letting go fails, too."""

    def __init__(self, path: Path, grows_at: str = "", breaks: str = "", *, refuses: int = 0) -> None:
        super().__init__(str(path), self._at)
        self.file, self._grows_at, self._breaks, self._refuses = path, grows_at, breaks, refuses
        self._broken = False

    async def _at(self, step: str) -> None:
        if step == self._grows_at:
            write_superblock(self.file, LARGE)
        self._broken = self._broken or step == self._breaks

    async def filesystem_size(self) -> int:
        if self._broken:
            raise ImageError("the image cannot be read: Input/output error")
        return await super().filesystem_size()

    async def _set(self, size: int) -> None:
        if size == self._refuses:
            raise ImageError("no: No space left on device")
        os.truncate(self.path, size)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "g.img"
    with path.open("wb") as file:
        file.truncate(LARGE)
    write_superblock(path, SMALL)
    return path


def _said(backend: RawImage) -> str:
    with pytest.raises(ImageError) as failed:
        asyncio.run(backend.shrink(SMALL))
    return failed.value.message


def _true(said: str, image: Path) -> None:
    """What is said about the cut is what has become of the file."""
    size = image.stat().st_size
    denied = "not cut" in said or "cannot be cut" in said
    assert not (denied and size == SMALL), said
    if size == SMALL:
        assert f"was cut to {SMALL}" in said


@pytest.mark.parametrize("step", ["checked", "held", "flushed", "read", "cut", "confirmed", "released"])
@pytest.mark.parametrize("grows", [False, True])
def test_a_superblock_that_cannot_be_read_from_some_step_on(image: Path, step: str, grows: bool) -> None:
    said = _said(File(image, step if grows else "", step))
    _true(said, image)
    assert "Input/output error" in said


@pytest.mark.parametrize("step", ["checked", "held", "flushed", "read", "cut", "confirmed", "released"])
def test_a_filesystem_that_grows_at_some_step(image: Path, step: str) -> None:
    said = _said(File(image, step))
    assert image.stat().st_size == superblock.read(str(image)).size == LARGE
    assert ("was cut to" in said) == (step not in {"checked", "held", "flushed"})
    assert ("was not cut" in said) == (step in {"checked", "held", "flushed"})


def test_an_image_that_cannot_be_made_larger_again_is_said_to_be_cut(image: Path) -> None:
    said = _said(File(image, "cut", refuses=LARGE))
    assert image.stat().st_size == SMALL
    _true(said, image)
    assert f"its filesystem has {LARGE}" in said
    assert "No space left" in said


def test_an_image_that_was_cut_too_far_before_gets_its_room_back(image: Path) -> None:
    os.truncate(image, SMALL // 2)
    said = _said(File(image))
    assert image.stat().st_size == SMALL
    assert f"had {SMALL // 2} bytes" in said


def test_a_limit_that_cannot_be_removed_is_no_reason_to_deny_the_cut(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Limited(LoopImage):
        def _attached(self) -> dict[str, bool]:
            return {"/dev/loop77": True}

        async def _set(self, size: int) -> None:
            os.truncate(self.path, size)

        def _flush_devices(self) -> None:
            pass

    def limits(device: str, path: str, size: int) -> None:
        if not size:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(loop, "_limit", limits)
    monkeypatch.setattr(loop, "devices", lambda _: {})
    said = _said(Limited(str(image)))
    assert image.stat().st_size == SMALL
    assert "cannot be cut" not in said
    assert "had put on /dev/loop77 is still there" in said


def test_a_device_with_dirty_pages_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = [errno.EAGAIN, errno.EAGAIN]
    requests = []

    def ioctl(fd: int, request: int, *_: object) -> int:
        requests.append(request)
        if request == loop._SET_STATUS64 and refusals:
            raise OSError(refusals.pop(), "again")
        return 0

    @contextlib.contextmanager
    def opened(_: str) -> Iterator[int]:
        yield 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(loop, "_opened", opened)
    monkeypatch.setattr(loop, "AGAIN_S", 0.0)
    loop._limit("/dev/loop77", "/x", 512)
    assert requests.count(loop._SET_STATUS64) == 3
    assert requests[-1] == loop._SET_CAPACITY
