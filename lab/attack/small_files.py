"""Many small files: what metadata takes, and whether it can still grow when the grant is nearly used up."""

from __future__ import annotations

import errno
import os
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lab.attack.oracle import Allocation, allocated, available, data_chunk, fill_up, image_bytes
from lab.attack.registry import add
from lab.attack.testbed import Testbed, mib, report, sync, why
from lab.loop import Guest, fill, run
from storaged.units import GIB, MIB

SIZE = 4 * GIB
FILES = 80_000
PER_FOLDER = 4000
GRANTS = (67 * MIB, 333 * MIB)
CREATED_WITHIN_S = 3.0
LEFT = 30 * MIB
NEARLY_FULL = 12 * MIB
PATIENCE_S = 5.0
CLEANER_S = 45.0
PIECE = 4 * MIB


@dataclass(slots=True)
class Made:
    """Small files that were made, and how often there was no room for one."""

    files: int = 0
    refused: int = 0


def make_small(folder: Path, count: int, made: Made, over: threading.Event, *, patience_s: float) -> None:
    """Make up to `count` files of 500 bytes to 2 KiB. Ends when there was no room for `patience_s`."""
    content = os.urandom(2048)
    last = time.monotonic()
    while made.files < count and not over.is_set():
        where = folder / str(made.files // PER_FOLDER)
        try:
            where.mkdir(exist_ok=True)
            (where / str(made.files)).write_bytes(content[: 500 + made.files * 37 % 1500])
            made.files += 1
            last = time.monotonic()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            made.refused += 1
            if time.monotonic() - last >= patience_s:
                return
            time.sleep(0.02)


def beside_data(bed: Testbed, grant: int, mkfs: tuple[str, ...]) -> list[str]:
    """80,000 small files beside a writer of data: the data stays within the grant and one chunk."""
    guest = bed.guest(SIZE, mkfs=mkfs)
    daemon = bed.daemon(guest)
    if not report(daemon, grant):
        return [f"an empty guest is answered FAILED: {why(daemon)}"]
    counts = Allocation(guest)
    image, metadata, made, over = image_bytes(guest), counts.metadata(), Made(), threading.Event()
    folder = guest.mountpoint / "small"
    folder.mkdir()
    thread = threading.Thread(target=partial(make_small, folder, FILES, made, over, patience_s=PATIENCE_S), daemon=True)
    thread.start()
    files: list[Path] = []
    try:
        while thread.is_alive():
            files.append(guest.mountpoint / f"data{len(files)}")
            fill(files[-1], PIECE)
            thread.join(0.1)
    finally:
        over.set()
        thread.join()
    files += fill_up(guest, "last")
    data = allocated(files) * counts.copies()
    grown, more = image_bytes(guest) - image, counts.metadata() - metadata
    chunk = data_chunk(guest)
    # Without what metadata has left behind on its way through its chunks.
    run("fstrim", guest.mountpoint)
    trimmed = image_bytes(guest) - image
    bed.say(
        grant=mib(grant),
        small_files=made.files,
        refused=made.refused,
        data=mib(data),
        metadata=mib(more),
        image=mib(grown),
        image_trimmed=mib(trimmed),
        chunk=mib(chunk),
        says=why(daemon),
    )
    faults = []
    if data > grant + chunk:
        faults.append(f"{mib(data)} MiB of data were written, {mib(grant)} granted and a chunk is {mib(chunk)}")
    if not made.files:
        faults.append("not one small file could be made")
    return faults


def last_file(bed: Testbed, grant: int, mkfs: tuple[str, ...]) -> list[str]:
    """Metadata is used up while some tens of MiB of the grant are left: a small file can be made within 3 s."""
    guest = bed.guest(GIB, mkfs=mkfs)
    counts, made, never = Allocation(guest), Made(), threading.Event()
    folder = guest.mountpoint / "small"
    folder.mkdir()
    while counts.metadata_headroom() > NEARLY_FULL and made.files < FILES:
        step = 2500 if counts.metadata_headroom() > 4 * NEARLY_FULL else 500
        make_small(folder, made.files + step, made, never, patience_s=PATIENCE_S)
        sync(guest)
    before = made.files
    daemon = bed.daemon(guest)
    headroom = counts.metadata_headroom()
    if not report(daemon, grant):
        return [f"FAILED with metadata nearly full: {why(daemon)}"]
    metadata = counts.metadata()
    faults, longest, waits = [], 0.0, 0
    for _ in range(bed.tries(3, 12)):
        refusals = made.refused
        # statvfs shows 0 while metadata is short: what is left of the grant is what metadata has not taken.
        while (left := grant - (counts.metadata() - metadata)) >= LEFT and made.refused == refusals:
            if made.files >= FILES:
                break
            make_small(folder, made.files + 500, made, never, patience_s=0.0)
        if made.files >= FILES or left < LEFT:
            break
        refused, waits = time.monotonic(), waits + 1
        make_small(folder, made.files + 1, made, never, patience_s=10.0)
        waited = time.monotonic() - refused
        longest = max(longest, waited)
        if waited > CREATED_WITHIN_S:
            faults.append(f"a small file waited {waited:.1f} s with {mib(left)} MiB of the grant left ({why(daemon)})")
            break
    sync(guest)
    bed.say(
        grant=mib(grant),
        headroom_at_report=mib(headroom),
        files_before=before,
        files_after=made.files,
        refusals=waits,
        longest_s=round(longest, 2),
        left=mib(grant - (counts.metadata() - metadata)),
        available=mib(available(guest) or 0),
        headroom=mib(counts.metadata_headroom()),
    )
    return faults


def after_filling(bed: Testbed) -> list[str]:
    """Data fills the guest before any report; then 0 is allowed, then 40 MiB: small files can be made.

    Where data had taken all chunks, the kernel hands the empty ones to metadata only after its discards, 10 s and more.
    """
    guest: Guest = bed.guest(SIZE, mkfs=("-m", "single"))
    first = fill_up(guest, "first")
    first[0].unlink()
    for path in first[1:]:
        path.unlink()
    run("btrfs", "subvolume", "create", guest.mountpoint / "sub")
    daemon = bed.daemon(guest)
    faults = [] if report(daemon, 0) else [f"0 is answered FAILED: {why(daemon)}"]
    if not report(daemon, 40 * MIB):
        faults.append(f"40 MiB are answered FAILED: {why(daemon)}")
    begun, made = time.monotonic(), Made()
    make_small(guest.mountpoint / "sub", 500, made, threading.Event(), patience_s=CLEANER_S)
    took = time.monotonic() - begun
    bed.say(files=made.files, refused=made.refused, took_s=round(took, 2), available=mib(available(guest) or 0))
    if made.files < 500:
        text = f"{made.files} of 500 small files in {took:.1f} s, refused {made.refused} times"
        faults.append(f"{text} ({why(daemon)}; {' '.join(str(daemon.report().filesystem).split())})")
    return faults


def _register() -> None:
    for grant in GRANTS:
        add(f"small-files-beside-data-{mib(grant)}", partial(beside_data, grant=grant, mkfs=()))
        add(f"small-files-last-{mib(grant)}", partial(last_file, grant=grant, mkfs=()), quick=grant == GRANTS[0])
        add(f"small-files-last-{mib(grant)}-4k", partial(last_file, grant=grant, mkfs=("--nodesize", "4096")))
        for name, mkfs in (("single-4k", ("-m", "single", "--nodesize", "4096")), ("mixed", ("--mixed",))):
            add(f"small-files-beside-data-{mib(grant)}-{name}", partial(beside_data, grant=grant, mkfs=mkfs))
    add("small-files-after-filling", after_filling)


_register()
