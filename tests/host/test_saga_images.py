"""The images' backends: a loop device, a real QEMU over QMP, a peer that speaks crosvm's protocol."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from lab.loop import Guest, fill, run, workspace
from storaged.host import images, superblock
from storaged.host.crosvm import CrosvmImage
from storaged.host.images import ImageBackend, ImageError, RawImage, WouldCut, make_backend
from storaged.host.loop import LoopImage
from storaged.host.qmp import QmpImage
from storaged.units import GIB, MIB

SIZE = GIB
needs_qemu = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="qemu-system-x86_64 is not installed")
needs_btrfs = pytest.mark.skipif(not shutil.which("mkfs.btrfs"), reason="mkfs.btrfs is not installed")


def make_image(path: Path, size: int = SIZE, *options: str) -> Path:
    """A sparse image with a btrfs in it; needs no root."""
    with path.open("wb") as file:
        file.truncate(size)
    run("mkfs.btrfs", "-q", "-f", *options, path)
    return path


def make_qcow2(path: Path, size: int) -> None:
    """An empty qcow2, version 2, as docs/interop/qcow2.txt in QEMU has it: needs no qemu-img, which few have."""
    cluster, bits = 64 << 10, 16
    refcounts, block, mapping = cluster, 2 * cluster, 3 * cluster
    mapped = cluster // 8 * cluster  # what an entry of the first table maps
    header = struct.pack(
        *(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 0, 0, bits, size, 0),
        *(-(-size // mapped), mapping, refcounts, 1, 0, 0),
    )
    with path.open("wb") as file:
        file.write(header)
        file.seek(refcounts)
        file.write(struct.pack(">Q", block))
        file.seek(block)
        file.write(struct.pack(">4H", 1, 1, 1, 1))
        file.truncate(4 * cluster)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "g.img")


# --- the superblock -------------------------------------------------------------------------------------------


@needs_btrfs
@pytest.mark.parametrize("checksum", ["crc32c", "xxhash", "sha256", "blake2"])
def test_the_size_is_read_from_the_image(tmp_path: Path, checksum: str) -> None:
    path = make_image(tmp_path / "i.img", SIZE, "--csum", checksum)
    os.truncate(path, 2 * SIZE)
    assert superblock.read(str(path)).size == SIZE


@needs_btrfs
def test_what_cannot_be_believed_is_not(image: Path, tmp_path: Path) -> None:
    with image.open("r+b") as file:
        file.seek(superblock.AT + 0x70)
        file.write(b"\0\0\0\1")
    with pytest.raises(superblock.NoFilesystem, match="damaged"):
        superblock.read(str(image))
    empty = tmp_path / "empty.img"
    with empty.open("wb") as file:
        file.truncate(SIZE)
    with pytest.raises(superblock.NoFilesystem, match="no btrfs"):
        superblock.read(str(empty))


@needs_btrfs
def test_a_filesystem_of_two_devices_is_refused(tmp_path: Path) -> None:
    one, two = make_image(tmp_path / "1.img"), tmp_path / "2.img"
    with two.open("wb") as file:
        file.truncate(SIZE)
    run("mkfs.btrfs", "-q", "-f", one, two)
    with pytest.raises(superblock.NoFilesystem, match="2 devices"):
        superblock.read(str(one))


def test_crc32c_is_castagnolis() -> None:
    assert superblock.crc32c(b"123456789") == 0xE3069283


def open_at(path: Path, at: int) -> BinaryIO:
    """The file, at that byte."""
    file = path.open("r+b", buffering=0)
    file.seek(at)
    return file


# --- every backend --------------------------------------------------------------------------------------------


async def obeys(backend: ImageBackend, path: Path) -> None:
    """What all backends promise."""
    await backend.check()
    cost = os.stat(path).st_blocks
    assert await backend.size() == SIZE
    assert await backend.grow(3 * SIZE) == 3 * SIZE
    assert await backend.grow(2 * SIZE) == 3 * SIZE, "growing cuts nothing"
    assert os.stat(path).st_size == 3 * SIZE
    assert os.stat(path).st_blocks <= cost + 64, "a hole"
    assert await backend.filesystem_size() == SIZE
    assert await backend.shrink(2 * SIZE) == 2 * SIZE
    with open_at(path, SIZE - 1) as file:
        file.write(b"x")
    with pytest.raises(WouldCut, match=str(SIZE)):
        await backend.shrink(SIZE - 4096)
    with open_at(path, SIZE - 1) as file:
        assert file.read(1) == b"x", "not even for a moment"
    assert os.stat(path).st_size == await backend.size() == 2 * SIZE, "nothing was cut"
    assert await backend.shrink(SIZE) == await backend.shrink(2 * SIZE) == SIZE


@needs_btrfs
async def test_a_filesystem_that_grows_at_the_moment_of_the_cut_gets_its_room_back(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Racing(RawImage):
        async def _set(self, size: int) -> None:
            os.truncate(self.path, size)
            grown = [2 * SIZE]
            monkeypatch.setattr(superblock, "read", lambda _: superblock.Superblock(grown[0]))

    os.truncate(image, 2 * SIZE)
    with pytest.raises(WouldCut):
        await Racing(str(image)).shrink(SIZE)
    assert os.stat(image).st_size == 2 * SIZE


async def test_what_cannot_be_read_is_never_cut(tmp_path: Path) -> None:
    path = tmp_path / "no.img"
    path.write_bytes(b"x" * MIB)

    class Plain(RawImage):
        async def _set(self, size: int) -> None:
            os.truncate(self.path, size)

    with pytest.raises(ImageError, match="no btrfs"):
        await Plain(str(path)).shrink(4096)
    assert os.stat(path).st_size == MIB
    with pytest.raises(ImageError, match="No such file"):
        await Plain(str(tmp_path / "none")).shrink(4096)


# --- loop -----------------------------------------------------------------------------------------------------


@pytest.mark.btrfs
async def test_a_loop_device_follows() -> None:
    with workspace() as directory:
        guest = Guest(directory / "g", SIZE, mount="discard=sync")
        try:
            await obeys(LoopImage(str(guest.image)), guest.image)
            os.truncate(guest.image, 2 * SIZE)  # as a daemon that was killed before it told the device
            await LoopImage(str(guest.image)).grow(2 * SIZE)
            assert int(run("blockdev", "--getsize64", guest.device)) == 2 * SIZE
            await LoopImage(str(guest.image)).shrink(SIZE)
            before = guest.host_bytes()
            fill(guest.mountpoint / "data", 128 * MIB)
            assert guest.host_bytes() > before + 100 * MIB
            (guest.mountpoint / "data").unlink()
            run("btrfs", "filesystem", "sync", guest.mountpoint)
            assert guest.host_bytes() < before + 32 * MIB, "discards still reach the file"
        finally:
            guest.close()


@pytest.mark.btrfs
async def test_an_image_that_nobody_shows_is_refused() -> None:
    with workspace() as directory:
        path = make_image(directory / "i.img")
        backend = LoopImage(str(path))
        with pytest.raises(ImageError, match="no loop device"):
            await backend.check()
        with pytest.raises(ImageError, match="no loop device"):
            await backend.grow(2 * SIZE)
        assert os.stat(path).st_size == SIZE
        device = run("losetup", "--show", "-f", "-o", "4096", path)
        try:
            with pytest.raises(ImageError, match="only a part"):
                await backend.check()
        finally:
            run("losetup", "-d", device)


# --- crosvm ---------------------------------------------------------------------------------------------------


class Crosvm:
    """A peer that takes what crosvm takes: packets of JSON, disks by their number, one answer each."""

    def __init__(self, path: Path, disks: list[Path]) -> None:
        self._disks = disks
        self.said: list[object] = []
        self.garbles: bytes | None = None
        self.suspends, self.suspended = True, False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            with peer:
                request = json.loads(peer.recv(65536))
                self.said.append(request)
                peer.send(self.garbles if self.garbles is not None else json.dumps(self._answer(request)).encode())

    def _answer(self, request: object) -> object:
        match request:
            case "SuspendVcpus" | "ResumeVcpus" if self.suspends:
                self.suspended = request == "SuspendVcpus"
                return "Ok"
            case {"DiskCommand": {"disk_index": int(index), "command": {"Resize": {"new_size": int(size)}}}}:
                if index >= len(self._disks):
                    return {"Err": 19}
                os.truncate(self._disks[index], size)
                return "Ok"
        return {"Err": 22}

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)


@pytest.fixture
def crosvm(tmp_path: Path, image: Path) -> Iterator[Crosvm]:
    peer = Crosvm(tmp_path / "crosvm.sock", [tmp_path / "other.img", image])
    yield peer
    peer.close()


@needs_btrfs
async def test_crosvm_resizes_its_disk(tmp_path: Path, image: Path, crosvm: Crosvm) -> None:
    backend = make_backend(f"crosvm:{tmp_path}/crosvm.sock", str(image), "1")
    await obeys(backend, image)
    resize = {"disk_index": 1, "command": {"Resize": {"new_size": 3 * SIZE}}}
    assert {"DiskCommand": resize} in crosvm.said


@needs_btrfs
async def test_what_crosvm_refuses_is_said(tmp_path: Path, image: Path, crosvm: Crosvm) -> None:
    with pytest.raises(ImageError, match="disk 7: No such device"):
        await CrosvmImage(str(image), f"{tmp_path}/crosvm.sock", 7).grow(2 * SIZE)
    crosvm.garbles = b"\xff"
    with pytest.raises(ImageError, match="not understood"):
        await CrosvmImage(str(image), f"{tmp_path}/crosvm.sock", 1).grow(2 * SIZE)
    with pytest.raises(ImageError, match="No such file"):
        await CrosvmImage(str(image), f"{tmp_path}/none.sock", 1).grow(2 * SIZE)
    assert os.stat(image).st_size == SIZE


# --- QEMU -----------------------------------------------------------------------------------------------------


@pytest.fixture
def qemu(tmp_path: Path, image: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A machine that stands still, with the image as its disk."""
    other = make_image(tmp_path / "other.img")
    make_qcow2(tmp_path / "q.qcow2", SIZE)
    process = subprocess.Popen([
        *("qemu-system-x86_64", "-S", "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-display", "none"),
        *("-qmp", f"unix:{tmp_path}/qmp.sock,server=on,wait=off"),
        *("-blockdev", f"driver=file,node-name=f0,filename={image},discard=unmap"),
        *("-blockdev", "driver=raw,node-name=disk0,file=f0,discard=unmap"),
        *("-device", "virtio-blk-pci,drive=disk0,id=vd0"),
        *("-blockdev", f"driver=raw,node-name=disk1,file.driver=file,file.filename={other}"),
        *("-device", "virtio-blk-pci,drive=disk1,id=vd1"),
        *("-blockdev", f"driver=qcow2,node-name=disk2,file.driver=file,file.filename={tmp_path}/q.qcow2"),
    ])  # fmt: skip
    ends = time.monotonic() + 20
    while not (tmp_path / "qmp.sock").exists():
        assert process.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.02)
    yield process
    process.kill()
    process.wait()


@needs_btrfs
@needs_qemu
@pytest.mark.parametrize("disk", ["", "disk0", "vd0"])
async def test_qemu_resizes_its_disk(tmp_path: Path, image: Path, qemu: subprocess.Popen[bytes], disk: str) -> None:
    await obeys(make_backend(f"qmp:{tmp_path}/qmp.sock", str(image), disk), image)


@needs_btrfs
@needs_qemu
async def test_another_disk_than_the_image_is_refused(
    tmp_path: Path, image: Path, qemu: subprocess.Popen[bytes]
) -> None:
    monitor = f"{tmp_path}/qmp.sock"
    with pytest.raises(ImageError, match=r"is in .*other\.img, not in"):
        await QmpImage(str(image), monitor, "disk1").grow(2 * SIZE)
    with pytest.raises(ImageError, match="only raw"):
        await QmpImage(str(image), monitor, "disk2").grow(2 * SIZE)
    with pytest.raises(ImageError, match="has no disk nope"):
        await QmpImage(str(image), monitor, "nope").check()
    with pytest.raises(ImageError, match="QEMU refuses block_resize"):
        await QmpImage(str(image), monitor, "").grow(1 << 62)
    assert os.stat(image).st_size == os.stat(tmp_path / "other.img").st_size == SIZE


@needs_btrfs
@needs_qemu
async def test_a_machine_that_hangs_or_has_ended_is_no_end_of_us(
    tmp_path: Path, image: Path, qemu: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "WITHIN_S", 0.5)
    backend = QmpImage(str(image), f"{tmp_path}/qmp.sock", "")
    await backend.check()
    os.kill(qemu.pid, 19)  # SIGSTOP
    with pytest.raises(ImageError, match="did not answer"):
        await backend.grow(2 * SIZE)
    qemu.kill()
    await asyncio.to_thread(qemu.wait)
    with pytest.raises(ImageError, match="QEMU's monitor"):
        await backend.grow(2 * SIZE)
    assert os.stat(image).st_size == SIZE
