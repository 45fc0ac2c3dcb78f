"""A btrfs on a sparse image behind a loop device, as a guest's disk on its host. Needs root.

Everything lies in one directory whose name carries the owner's process id, so that `sweep` can find and clear what
a killed owner left, and never touches what another living process uses.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "storaged-lab-"
CLONE_NEWNS = 0x00020000
ROOM_IN_MEMORY = 4 << 30


def run(*command: str | Path) -> str:
    """Run a program to its end; its output. Raises RuntimeError with what it said."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def workspace(under: str | Path | None = None) -> Iterator[Path]:
    """A directory of this process' own; on the way out every mount, loop device and file in it is gone."""
    base = Path(under) if under is not None else Path(tempfile.gettempdir())
    path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=base))
    try:
        yield path
    finally:
        clear(path)


def memory() -> str | None:
    """Where images lie in memory, so that the host's disk need not flush for every cut; None where that is not."""
    place = "/dev/shm"
    return place if os.access(place, os.W_OK) and shutil.disk_usage(place).free > ROOM_IN_MEMORY else None


def private_mounts() -> None:
    """From now on this process and its children mount in a namespace of their own.

    A namespace that somebody makes meanwhile would take a copy of every mount along, and hold it after we let go.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    run("mount", "--make-rprivate", "/")


def sweep(under: str | Path | None = None) -> list[Path]:
    """Clear what killed owners left below `under`; the directories that were cleared."""
    base = Path(under) if under is not None else Path(tempfile.gettempdir())
    cleared = []
    for path in base.glob(PREFIX + "*"):
        owner = re.match(rf"{PREFIX}(\d+)-", path.name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            clear(path)
            cleared.append(path)
    return cleared


def clear(path: Path) -> None:
    """Unmount, detach and delete everything below `path`, also filesystems on images on filesystems."""
    for _ in range(100):
        mounts = _mounts_below(path)
        # By its name alone: of an image in another mount namespace the kernel shows only the path below its mount.
        mine = [device for device, image in loops() if f"/{path.name}/" in image]
        if not mounts and not mine:
            break
        for mountpoint in reversed(mounts):
            with contextlib.suppress(RuntimeError):
                run("umount", mountpoint)
        # A mounted device would only be marked for later, and its image keep the filesystem below it busy.
        mounted = Path("/proc/self/mounts").read_text(encoding="utf-8").split()
        for device in mine:
            if device not in mounted:
                with contextlib.suppress(RuntimeError):
                    run("losetup", "-d", device)
        if mounts:
            time.sleep(0.05)
    for mountpoint in reversed(_mounts_below(path)):
        with contextlib.suppress(RuntimeError):
            run("umount", "-l", mountpoint)
    shutil.rmtree(path, ignore_errors=True)


def _mounts_below(path: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    return [target for line in lines if (target := line.split()[1]).startswith(f"{path}/")]


def loops() -> list[tuple[str, str]]:
    """(device, image) of every attached loop device; a deleted image has ` (deleted)` behind its name."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found.append((f"/dev/{entry.parts[3]}", entry.read_text(encoding="utf-8").strip()))
    return found


def host_disk(directory: Path, size: int) -> Path:
    """An ext4 of `size` bytes below `directory`, mounted: a host's disk that nobody else writes to."""
    image, disk = directory / "host.img", directory / "host"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
    run("mount", "-o", "loop", image, disk)
    return disk


class Guest:
    """One guest's disk: `image` on the host, `device`, and the btrfs mounted at `mountpoint`."""

    def __init__(
        self,
        directory: Path,
        size: int,
        *,
        name: str = "guest",
        mkfs: tuple[str, ...] = (),
        mount: str = "",
        device_size: int | None = None,
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.image = directory / f"{name}.img"
        self.mountpoint = directory / name
        self.mountpoint.mkdir()
        self.mount_options = mount
        with self.image.open("wb") as file:
            file.truncate(size)
        run("mkfs.btrfs", "-q", *mkfs, self.image)
        if device_size is not None:
            os.truncate(self.image, device_size)
        self.device = ""
        self.attach()
        self.mount()

    def attach(self) -> None:
        """Put the image behind a loop device, as a host gives it to a guest."""
        self.device = run("losetup", "--show", "-f", "--direct-io=off", self.image)

    def detach(self) -> None:
        """Take the device away; the filesystem must be unmounted."""
        run("losetup", "-d", self.device)
        self.device = ""

    def mount(self) -> None:
        """Mount the filesystem."""
        options = ["-o", self.mount_options] if self.mount_options else []
        run("mount", *options, self.device, self.mountpoint)

    def unmount(self) -> None:
        """Unmount it, waiting for whoever just let go of it."""
        for attempt in range(50):
            try:
                run("umount", self.mountpoint)
            except RuntimeError:
                if attempt == 49:
                    raise
                time.sleep(0.1)
            else:
                return

    def close(self) -> None:
        """Unmount, detach and delete the image."""
        if os.path.ismount(self.mountpoint):
            self.unmount()
        if self.device:
            self.detach()
        self.image.unlink(missing_ok=True)

    def resize_image(self, size: int) -> None:
        """The host makes the disk larger or smaller, and the guest's kernel is told."""
        os.truncate(self.image, size)
        run("losetup", "-c", self.device)

    def host_bytes(self) -> int:
        """What the image really costs the host."""
        os.sync()
        return self.image.stat().st_blocks * 512

    def check(self, *, data: bool = False) -> str:
        """`btrfs check` on the unmounted filesystem, of all checksums with `data`; RuntimeError unless it is clean."""
        command = ("btrfs", "check", "--readonly", *(["--check-data-csum"] if data else []))
        for _ in range(50):
            try:
                return run(*command, self.device or self.image)
            except RuntimeError as error:
                if "busy" not in str(error):
                    raise
                time.sleep(0.1)  # the kernel lets go of the device a little after the unmount
        # Somebody else's mount namespace still has its copy of our mount: then the image tells as much.
        os.sync()
        return run(*command, self.image)


def fill(path: Path, most: int | None = None, block: int = 1 << 20) -> tuple[int, int]:
    """Write a file until `most` bytes or an error; (bytes that are safely in it, errno or 0)."""
    written = 0
    buffer = os.urandom(block)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    except OSError as failure:
        return 0, failure.errno or -1
    error = 0
    try:
        while most is None or written < most:
            part = block if most is None else min(block, most - written)
            try:
                written += os.write(fd, buffer[:part])
                if written % (64 << 20) < block:
                    os.fsync(fd)
            except OSError as failure:
                error = failure.errno or -1
                break
        try:
            os.fsync(fd)
        except OSError as failure:
            error = failure.errno or -1
            written = os.fstat(fd).st_blocks * 512
    finally:
        os.close(fd)
    return written, error
