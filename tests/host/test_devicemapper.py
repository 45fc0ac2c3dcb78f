"""What the kernel is asked about a device-mapper device, and what its answer says."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.loop import run, workspace
from storaged.host import devicemapper
from storaged.host.devicemapper import HEADER, TABLE_STATUS, TARGET, DeviceMapperError, lines, status, table
from storaged.host.watch import FilesystemSource, PoolError, ThinSource
from storaged.units import GIB, MIB


class Header(ctypes.Structure):
    """struct dm_ioctl, as a C compiler lays it out."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 3), ("data_size", ctypes.c_uint32), ("data_start", ctypes.c_uint32),
        ("target_count", ctypes.c_uint32), ("open_count", ctypes.c_int32), ("flags", ctypes.c_uint32),
        ("event_nr", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("dev", ctypes.c_uint64),
        ("name", ctypes.c_char * 128), ("uuid", ctypes.c_char * 129), ("data", ctypes.c_char * 7),
    )  # fmt: skip


class Spec(ctypes.Structure):
    """struct dm_target_spec."""

    _fields_ = (
        ("sector_start", ctypes.c_uint64), ("length", ctypes.c_uint64), ("status", ctypes.c_int32),
        ("next", ctypes.c_uint32), ("target_type", ctypes.c_char * 16),
    )  # fmt: skip


TARGETS = [(0, 409600, b"thin-pool", b"1 20/1024 1200/3200 - rw"), (409600, 8, b"linear", b"")]


def _answer(buffer: bytearray, targets: list[tuple[int, int, bytes, bytes]]) -> None:
    """As retrieve_status (drivers/md/dm-ioctl.c) writes it."""
    header = Header.from_buffer(buffer)
    start = ctypes.sizeof(Header)
    header.data_start, at = start, start
    for begin, length, kind, text in targets:
        end = at + ctypes.sizeof(Spec) + len(text) + 1
        following = -(-(end - start) // 8) * 8
        if start + following > header.data_size:
            header.flags |= 1 << 8
            return
        spec = Spec.from_buffer(buffer, at)
        spec.sector_start, spec.length, spec.target_type, spec.next = begin, length, kind, following
        buffer[at + ctypes.sizeof(Spec) : end] = text + b"\0"
        header.target_count += 1
        at = start + following


class Kernel:
    """A kernel that knows the device `vg-pool`, made of `targets`. `asked`: what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Header] = []
        self.targets = TARGETS

    def ioctl(self, _: int, number: int, buffer: bytearray) -> int:
        assert number == TABLE_STATUS
        header = Header.from_buffer(buffer)
        assert header.version[0] == 4
        assert header.data_size == len(buffer)
        assert header.data_start == ctypes.sizeof(Header)
        self.asked.append(Header.from_buffer_copy(buffer))
        if header.name != b"vg-pool":
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        _answer(buffer, self.targets)
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """It answers instead of ours."""
    kernel = Kernel()
    monkeypatch.setattr(devicemapper, "CONTROL", "/dev/null")
    monkeypatch.setattr(fcntl, "ioctl", kernel.ioctl)
    return kernel


SAID = "0 409600 thin-pool 1 20/1024 1200/3200 - rw\n409600 8 linear"


def test_a_device_is_asked_for_its_status_and_its_table(kernel: Kernel) -> None:
    assert status("vg-pool") == table("vg-pool") == SAID
    assert [each.flags for each in kernel.asked] == [1 << 11, 1 << 4], "the status without a flush"


def test_an_answer_that_does_not_fit_is_asked_for_again(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devicemapper, "_ROOM", 360)
    assert status("vg-pool") == SAID
    assert [each.data_size for each in kernel.asked] == [360, 1440]


def test_a_device_that_is_not_there_is_said_so(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceMapperError, match="device nope: there is no such device"):
        status("nope")
    with pytest.raises(DeviceMapperError, match="at most 127"):
        status("x" * 128)
    monkeypatch.setattr(devicemapper, "CONTROL", "/none/control")
    with pytest.raises(DeviceMapperError, match="/none/control: No such file"):
        status("vg-pool")


def test_an_answer_that_makes_no_sense_is_refused(kernel: Kernel) -> None:
    buffer = devicemapper.request("vg-pool", 0, 1024)
    Header.from_buffer(buffer).target_count = 40
    Header.from_buffer(buffer).data_start = 1000
    with pytest.raises(DeviceMapperError, match="not understood"):
        lines(bytes(buffer))


def test_the_source_asks_no_process(tmp_path: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    kernel.targets = [(0, 409600, b"thin-pool", b"253:0 253:1 128 32768 0")]
    source = ThinSource(FilesystemSource(str(tmp_path)), "vg-pool")
    with pytest.raises(PoolError):
        source.free()  # a table is no status
    kernel.targets = [(0, 409600, b"thin-pool", b"1 20/1024 3100/3200 - rw x y z 1024")]
    assert source.free() == 100 * 65536
    kernel.targets = [(0, 8, b"linear", b"8:0 0")]
    with pytest.raises(PoolError, match="not a thin pool"):
        source.free()


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
@pytest.mark.skipif(not Path("/usr/include/linux/dm-ioctl.h").exists(), reason="linux/dm-ioctl.h is not installed")
def test_the_layout_is_that_of_the_kernels_header(tmp_path: Path) -> None:
    (tmp_path / "layout.c").write_text("""
#include <linux/dm-ioctl.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <stdio.h>
int main(void) {
    printf("%lu %zu %zu %zu %zu %zu %zu %zu %d %d %d", (unsigned long)DM_TABLE_STATUS,
        sizeof(struct dm_ioctl), sizeof(struct dm_target_spec), offsetof(struct dm_ioctl, flags),
        offsetof(struct dm_ioctl, target_count), offsetof(struct dm_ioctl, name), offsetof(struct dm_target_spec, next),
        offsetof(struct dm_target_spec, target_type), DM_STATUS_TABLE_FLAG, DM_BUFFER_FULL_FLAG, DM_NOFLUSH_FLAG);
}
""")
    run("gcc", "-o", tmp_path / "layout", tmp_path / "layout.c")
    assert [int(word) for word in run(tmp_path / "layout").split()] == [
        TABLE_STATUS, HEADER.size, TARGET.size, Header.flags.offset, Header.target_count.offset, Header.name.offset,
        Spec.next.offset, Spec.target_type.offset,
        devicemapper.STATUS_TABLE, devicemapper.BUFFER_FULL, devicemapper.NOFLUSH,
    ]  # fmt: skip
    assert (ctypes.sizeof(Header), ctypes.sizeof(Spec)) == (HEADER.size, TARGET.size)


# --- a real one -----------------------------------------------------------------------------------------------


@pytest.fixture
def thin_pool() -> Iterator[str]:
    """A thin pool of 64 MiB, of blocks of 64 KiB."""
    name = f"storaged-test-{os.getpid()}"
    devices = []
    with workspace() as directory:
        try:
            for part, size in (("metadata", 4 * MIB), ("data", 64 * MIB)):
                with (directory / part).open("wb") as file:
                    file.truncate(size)
                devices.append(run("losetup", "--show", "-f", directory / part))
            run("dmsetup", "create", name, "--table", f"0 {64 * MIB // 512} thin-pool {' '.join(devices)} 128 0")
            yield name
        finally:
            with contextlib.suppress(RuntimeError):
                run("dmsetup", "remove", "--retry", name)
            for device in devices:
                run("losetup", "-d", device)


@pytest.mark.btrfs
@pytest.mark.skipif(not Path(devicemapper.CONTROL).exists(), reason="this kernel has no device-mapper")
@pytest.mark.skipif(not shutil.which("dmsetup"), reason="dmsetup is not installed")
def test_a_real_thin_pool_says_what_dmsetup_says(thin_pool: str, tmp_path: Path) -> None:
    assert status(thin_pool).split() == run("dmsetup", "status", "--noflush", thin_pool).split()
    assert table(thin_pool).split() == run("dmsetup", "table", thin_pool).split()

    class Roomy(FilesystemSource):
        def free(self) -> int:
            return GIB

    source = ThinSource(Roomy(str(tmp_path)), thin_pool)
    assert source.free() == 64 * MIB
    begun = time.monotonic()
    for _ in range(100):
        source.free()
    assert time.monotonic() - begun < 1
    with pytest.raises(DeviceMapperError, match="no such device"):
        status(f"{thin_pool}-none")
