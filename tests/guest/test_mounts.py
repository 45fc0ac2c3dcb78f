"""What may be mounted: pure; and one contract for the simulation and for this kernel, in a private namespace."""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.loop import workspace
from storaged.errors import InvalidRequest, Kind, StoragedError
from storaged.guest.mounts import (
    HANDLED_ELSEWHERE,
    LONGEST_OPTIONS,
    Mount,
    Mount9P,
    absolute,
    check_9p,
    check_mount,
    options_9p,
)
from storaged.sim.mounts import MS_BIND
from tests.guest.places import REAL, Place, RealPlace, SimPlace

# --- pure ---------------------------------------------------------------------------------------------------------


@given(st.text(st.sampled_from("/.ab \0\n"), max_size=12))
def test_a_path_is_refused_or_tidy_and_means_the_same(text: str) -> None:
    if not text.startswith("/") or ".." in text.split("/") or "\0" in text or "\n" in text:
        with pytest.raises(InvalidRequest, match="target"):
            absolute("target", text)
    else:
        path = absolute("target", text)
        assert path.startswith("/")
        assert posixpath.normpath(path) == path
        assert [p for p in path.split("/") if p] == [p for p in text.split("/") if p not in ("", ".")]


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (Mount("s", "", "tmpfs"), "target"),
        (Mount("s", "mnt", "tmpfs"), "target"),
        (Mount("s", "/mnt/../etc", "tmpfs"), "target"),
        (Mount("s", "/m\0", "tmpfs"), "target"),
        (Mount("s", "/m\n/x", "tmpfs"), "target"),
        (Mount("s\0", "/mnt", "tmpfs"), "source"),
        (Mount("s", "/mnt", "tm\npfs"), "fstype"),
        (Mount("s", "/mnt", "tmpfs", options="a\0b"), "options"),
        (Mount("s", "/mnt", "tmpfs", options="x" * (LONGEST_OPTIONS + 1)), "options"),
        (Mount("s", "/" + "x" * 5000, "tmpfs"), "target"),
        (Mount("s", "/mnt", "tmpfs", permissions=0o10000), "permissions"),
        (Mount("vdb", "/mnt", "btrfs", mkfs_if_needed=True), "source"),
        (Mount("--help", "/mnt", "btrfs", mkfs_if_needed=True), "source"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(asked: Mount, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_mount(asked)
    assert field in caught.value.message


@pytest.mark.parametrize("asked", [Mount9P(0, "/m"), Mount9P(0xFFFFFFFF, "/m"), Mount9P(9999, "m"), Mount9P(9999, "")])
def test_so_is_a_9p_mount(asked: Mount9P) -> None:
    with pytest.raises(InvalidRequest):
        check_9p(asked)


def test_what_the_9p_client_is_told() -> None:
    assert options_9p(7, 1024) == "trans=fd,rfdno=7,wfdno=7,cache=none,access=any,version=9p2000.L,msize=1024"


# --- both worlds --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sim", pytest.param("real", marks=REAL)])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """Each world."""
    if request.param == "sim":
        yield SimPlace()
        return
    with workspace() as directory:
        real = RealPlace(directory)
        try:
            yield real
        finally:
            await real.close()


async def test_tmpfs_with_its_target_made_and_permissions_given(place: Place) -> None:
    target = f"{place.base}/a/b/c"
    asked = Mount("scratch", target + "//", "tmpfs", options="size=1m", create_target=True, permissions=0o1755)
    assert await place.mounts.mount(asked) == 0
    assert await place.source(target) == "scratch"
    assert await place.mode(target) == 0o1755
    assert await place.mode(f"{place.base}/a") == 0o755


async def test_without_create_target_a_missing_one_is_an_errno(place: Place) -> None:
    assert await place.mounts.mount(Mount("scratch", f"{place.base}/x", "tmpfs")) == errno.ENOENT
    assert await place.mode(f"{place.base}/x") is None


@pytest.mark.parametrize(
    ("fstype", "kind", "number"),
    [
        ("nonsensefs", "btrfs", errno.ENODEV),
        ("btrfs", "ext4", errno.EINVAL),
        ("ext4", "btrfs", errno.EINVAL),
        ("btrfs", "", errno.EINVAL),
    ],
)
async def test_a_refusal_is_the_kernels_errno_and_leaves_nothing(
    place: Place, fstype: str, kind: str, number: int
) -> None:
    target = f"{place.base}/a/b"
    asked = Mount(place.device(kind), target, fstype, create_target=True, permissions=0o700)
    assert await place.mounts.mount(asked) == number
    assert await place.source(target) == ""
    assert await place.mode(f"{place.base}/a") is None, "directories made for it are gone again"
    assert await place.mode(place.base) == 0o755, "what was there stays as it was"


async def test_a_missing_device_is_an_errno_too(place: Place) -> None:
    asked = Mount("/dev/no-such-disk", f"{place.base}/a", "btrfs", create_target=True, mkfs_if_needed=True)
    assert await place.mounts.mount(asked) == errno.ENOENT


@pytest.mark.parametrize("fstype", ["btrfs", "ext4"])
async def test_a_filesystem_on_a_device(place: Place, fstype: str) -> None:
    device = place.device(fstype)
    target = f"{place.base}/{fstype}"
    asked = Mount(device, target, fstype, create_target=True, permissions=0o711, mkfs_if_needed=True)
    assert await place.mounts.mount(asked) == 0
    assert await place.source(target) == device
    assert await place.mode(target) == 0o711


async def test_a_bind_mount(place: Place) -> None:
    assert await place.mounts.mount(Mount("one", f"{place.base}/one", "tmpfs", create_target=True)) == 0
    await place.on(lambda: place.system.make_directories(f"{place.base}/one/below"))
    asked = Mount(f"{place.base}/one", f"{place.base}/two", "", MS_BIND, create_target=True)
    assert await place.mounts.mount(asked) == 0
    assert await place.source(f"{place.base}/two")
    assert await place.mounts.mount(Mount(f"{place.base}/none", f"{place.base}/two", "", MS_BIND)) == errno.ENOENT


async def test_a_blank_device_is_formatted_if_that_was_asked_for(place: Place) -> None:
    device = place.device("")
    target = f"{place.base}/data"
    asked = Mount(device, target, "btrfs", create_target=True, mkfs_if_needed=True)
    assert await place.mounts.mount(asked) == 0
    assert await place.source(target) == device


@pytest.mark.parametrize("kind", ["ext4", "junk"])
async def test_one_with_anything_on_it_never_is(place: Place, kind: str) -> None:
    device = place.device(kind)
    found = await place.on(lambda: place.system.contents(device))
    assert found
    asked = Mount(device, f"{place.base}/data", "btrfs", create_target=True, mkfs_if_needed=True)
    assert await place.mounts.mount(asked) == errno.EINVAL
    assert await place.on(lambda: place.system.contents(device)) == found


async def test_only_a_btrfs_is_ever_made(place: Place) -> None:
    device = place.device("")
    asked = Mount(device, f"{place.base}/data", "ext4", create_target=True, mkfs_if_needed=True)
    assert await place.mounts.mount(asked) == errno.EINVAL
    assert await place.on(lambda: place.system.contents(device)) == ""


async def test_a_target_that_is_handled_elsewhere(place: Place) -> None:
    assert (
        await place.mounts.mount(Mount("/dev/no-such-disk", HANDLED_ELSEWHERE + "/", "btrfs", create_target=True)) == 0
    )
    assert await place.source(HANDLED_ELSEWHERE) == ""
    assert await place.mode(HANDLED_ELSEWHERE) is None


async def test_refused_requests_change_nothing(place: Place) -> None:
    with pytest.raises(InvalidRequest):
        await place.mounts.mount(Mount("s", f"{place.base}/a/../b", "tmpfs", create_target=True))
    with pytest.raises(InvalidRequest):
        await place.mounts.mount(Mount("s", f"{place.base}/a", "tmpfs", create_target=True, permissions=1 << 31))
    assert await place.mode(f"{place.base}/a") is None


async def test_permissions_that_cannot_be_given_undo_the_mount() -> None:
    place = SimPlace()

    def refuse(path: str, mode: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    place.sim.chmod = refuse  # type: ignore[method-assign]
    with pytest.raises(StoragedError, match="Read-only") as caught:
        await place.mounts.mount(Mount("s", "/mnt/a", "tmpfs", create_target=True, permissions=0o700))
    assert caught.value.kind is Kind.INTERNAL
    assert place.sim.table == []
    assert await place.mode("/mnt/a") is None
