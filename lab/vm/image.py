"""The guest's disk and initramfs: made once, named by a hash of what went in."""

from __future__ import annotations

import compileall
import hashlib
import importlib.metadata
import os
import py_compile
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from lab.vm.parts import BUILD, GUEST, ROOT, kernel, kernel_release

MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_net", "ext4", "overlay", "btrfs", "9p", "9pnet_fd"),
    *("vmw_vsock_virtio_transport", "vsock_loopback", "loop", "dm_thin_pool"),
)
PASSWD = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
GROUP = "root:x:0:\nnogroup:x:65534:\n"
IMAGE_MIB = 512


def _run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


def _hash(*parts: object) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.read_bytes() if isinstance(part, Path) else str(part).encode())
        found.update(b"\0")
    return found.hexdigest()[:16]


def _files(directory: Path, *patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in directory.rglob(pattern) if path.is_file())


def _packages() -> Iterable[importlib.metadata.Distribution]:
    """The daemon's own dependencies, as they are pinned and installed beside these tests."""
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if (name := re.match(r"([a-z0-9-]+)==", line)) and "win32" not in line:
            yield importlib.metadata.distribution(name[1])


def disk() -> Path:
    """The guest's read-only system: Debian's packages and the daemon's dependencies."""
    debs = sorted((BUILD / "debs").glob("*.deb"))
    key = _hash(Path(__file__), ROOT / "requirements.txt", *(deb.name for deb in debs))
    made = BUILD / f"disk-{key}.img"
    if made.exists():
        return made
    for old in BUILD.glob("disk-*.img"):
        old.unlink()
    with tempfile.TemporaryDirectory(dir=BUILD) as work:
        tree = Path(work) / "tree"
        for name in ("bin", "sbin", "lib", "lib64"):
            (tree / "usr" / name).mkdir(parents=True)
            (tree / name).symlink_to(f"usr/{name}")
        for deb in debs:
            with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as unpack:
                into = ["tar", "-x", "--keep-directory-symlink", "-C", str(tree)]
                subprocess.run(into, stdin=unpack.stdout, check=True, capture_output=True)
        for name in ("proc", "sys", "dev", "run", "tmp", "mnt/stateful", "opt/site", "var/lib/storaged", "root"):
            (tree / name).mkdir(parents=True, exist_ok=True)
        (tree / "etc/passwd").write_text(PASSWD)
        (tree / "etc/group").write_text(GROUP)
        (tree / "etc/localtime").symlink_to("/usr/share/zoneinfo/Etc/UTC")
        if not (tree / "usr/bin/sh").exists():
            (tree / "usr/bin/sh").symlink_to("dash")
        for package in _packages():
            for file in package.files or []:
                if ".." in file.parts or "__pycache__" in file.parts:
                    continue
                into_site = tree / "opt/site" / file
                into_site.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(str(file.locate()), into_site)
        for place in ("usr/lib/python3.11", "opt/site"):
            _compile(tree / place, f"/{place}")
        for name in ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/lib/dpkg", "lib/modules"):
            shutil.rmtree(tree / name, ignore_errors=True)
        _run("ldconfig", "-r", tree)
        image = Path(work) / "disk.img"
        with image.open("wb") as sparse:
            sparse.truncate(IMAGE_MIB << 20)
        _run("mkfs.ext4", "-q", "-O", "^has_journal", "-d", tree, image)
        image.rename(made)
    return made


def _compile(directory: Path, as_seen: str) -> None:
    compileall.compile_dir(
        directory,
        ddir=as_seen,
        quiet=2,
        workers=2,
        force=True,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


def initramfs() -> Path:
    """The kernel's modules, what boots the guest, and the daemon itself: a change to it needs no new disk."""
    product = _files(ROOT / "storaged", "*.py", "*.pyi", "*.proto", "py.typed")
    key = _hash(Path(__file__), kernel().name, *_files(GUEST, "*"), *product)
    made = BUILD / f"initramfs-{key}.cpio"
    if made.exists():
        return made
    for old in BUILD.glob("initramfs-*.cpio"):
        old.unlink()
    with tempfile.TemporaryDirectory(dir=BUILD) as work:
        tree = Path(work) / "tree"
        for name in ("bin", "proc", "sys", "dev", "modules", "product/storaged"):
            (tree / name).mkdir(parents=True)
        _busybox(tree / "bin/busybox")
        _kernel_modules(tree / "modules")
        shutil.copy2(GUEST / "init", tree / "init")
        for name in ("boot", "agent"):
            shutil.copy2(GUEST / name, tree / "product" / name)
        for path in product:
            copy = tree / "product" / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
        _compile(tree / "product/storaged", "/opt/product/storaged")
        for path in (tree / "init", tree / "product/boot", tree / "product/agent"):
            path.chmod(0o755)
        archive = Path(work) / "archive"
        names = b"\0".join(os.fsencode(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
        with archive.open("wb") as out:
            pack = [str(tree / "bin/busybox"), "cpio", "-o", "-0", "-H", "newc"]
            subprocess.run(pack, input=names, stdout=out, stderr=subprocess.DEVNULL, cwd=tree, check=True)
        archive.rename(made)
    return made


def _busybox(into: Path) -> None:
    (deb,) = (BUILD / "debs").glob("busybox-static_*.deb")
    with tempfile.TemporaryDirectory(dir=BUILD) as work:
        _run("dpkg-deb", "-x", deb, work)
        shutil.copy2(next(Path(work).rglob("bin/busybox")), into)


def _kernel_modules(into: Path) -> None:
    """The modules and what they need, with the order in which to load them."""
    base = BUILD / "kernel"
    _run("depmod", "-b", base, kernel_release())
    order: list[str] = []
    for module in MODULES:
        listed = subprocess.run(
            ["modprobe", "-d", base, "-S", kernel_release(), "--show-depends", module],
            check=True,
            capture_output=True,
            text=True,
        )
        for line in listed.stdout.splitlines():
            kind, _, path = line.partition(" ")
            name = Path(path.split()[0]).name if kind == "insmod" else ""
            if name and name not in order:
                order.append(name)
                shutil.copy2(path.split()[0], into / name)
    (into / "order").write_text("".join(f"{name}\n" for name in order))
