"""The applications of the storm: threads that write in every way, and what they must find again."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from lab.attack.preallocation import Unwritten, left
from lab.recovery import digest_of
from storaged.units import KIB, MIB

MOST_KEPT = 60
AFTER_ENOSPC_S = 0.1
PAUSES_S = (0.0, 0.05)

Step = Callable[["Applications", random.Random, int], None]


class Applications:
    """Writer threads below `root`. `kept` holds the digest of every file that was durable when its writer went on."""

    def __init__(self, root: Path, seed: int, steps: dict[str, Step]) -> None:
        self.root = root
        self.counts: Counter[str] = Counter()
        self.kept: dict[Path, str] = {}
        self.lock = threading.RLock()
        """Guards `kept` and `preallocated`."""
        self.preallocated: list[Unwritten] = []
        self.errors: list[str] = []
        self._over = threading.Event()
        self._turns = {name: threading.Lock() for name in steps}
        self._threads = [
            threading.Thread(target=self._run, args=(name, step, random.Random(f"{seed} {name}")), daemon=True)
            for name, step in steps.items()
        ]

    def start(self) -> None:
        """Let them write."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let each end its step."""
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No writer is in a step while the block runs."""
        with contextlib.ExitStack() as stack:
            for turn in self._turns.values():
                stack.enter_context(turn)
            yield

    def unwritten(self) -> int:
        """Bytes that were preallocated and are not written yet."""
        with self.lock:
            return left(self.preallocated)

    def keep(self, path: Path, digest: str) -> None:
        """A file that must be found whole; the oldest go when there are too many."""
        with self.lock:
            self.kept[path] = digest
        while len(self.kept) > MOST_KEPT:
            self.drop(1)

    def forget(self, path: Path) -> None:
        """The file is about to be written anew."""
        with self.lock:
            self.kept.pop(path, None)

    def drop(self, count: int) -> None:
        """Delete the oldest files."""
        with self.lock:
            for path in list(self.kept)[:count]:
                del self.kept[path]
                with contextlib.suppress(OSError):
                    path.unlink()
                    self.counts["deleted"] += 1

    def any_kept(self, dice: random.Random) -> Path | None:
        """One of the files, which another thread may delete at any time."""
        with self.lock:
            return dice.choice(list(self.kept)) if self.kept else None

    def verify(self) -> list[str]:
        """The files that are not as they were written."""
        with self.lock:
            files = dict(self.kept)
        damaged = [f"damaged: {path.name}" for path, digest in files.items() if digest_of(path) != digest]
        self.counts["whole"] = len(files) - len(damaged)
        self.counts["damaged"] = len(damaged)
        return damaged

    def _run(self, name: str, step: Step, dice: random.Random) -> None:
        number = 0
        while not self._over.is_set():
            with self._turns[name]:
                try:
                    step(self, dice, number)
                    self.counts[name] += 1
                except OSError as error:
                    self._refused(name, error, dice)
            number += 1
            # Locks are not fair: without this pause nobody else gets the turn.
            time.sleep(dice.uniform(*PAUSES_S) + 0.002)

    def _refused(self, name: str, error: OSError, dice: random.Random) -> None:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EBUSY, errno.ETXTBSY):
            self.errors.append(f"{name}: {error}")
        self.counts["ENOSPC" if error.errno == errno.ENOSPC else "other errors"] += 1
        if error.errno == errno.ENOSPC and dice.random() < 0.3:
            self.drop(max(len(self.kept) // 5, 1))
        time.sleep(AFTER_ENOSPC_S)


def random_size(dice: random.Random) -> int:
    """From a block to 16 MiB."""
    return dice.choice((4 * KIB, 60 * KIB, 300 * KIB, MIB, 4 * MIB, 16 * MIB))


def digest(content: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(content).hexdigest()
