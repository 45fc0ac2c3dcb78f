"""`storaged-host`, which kills itself with -9 before its n-th step; n is in the environment as DIES_AT.

A step is everything that lasts: a page of the journal, a change of the image, a call to the guest; before and after.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from storaged.host import __main__, guests, images, journal, loop

_left = int(os.environ["DIES_AT"])


def _step(what: str) -> None:
    global _left  # noqa: PLW0603  # a process has one life
    if _left == 0:
        sys.stderr.write(f"killed {what}\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    _left -= 1


def _around(owner: Any, name: str) -> None:
    call: Callable[..., Any] = getattr(owner, name)

    def stepping(*arguments: Any) -> Any:
        _step(f"before {name}")
        answer = call(*arguments)
        _step(f"after {name}")
        return answer

    async def stepping_async(*arguments: Any) -> Any:
        _step(f"before {name}")
        answer = await call(*arguments)
        _step(f"after {name}")
        return answer

    setattr(owner, name, stepping_async if name in {"resize", "_step"} else stepping)


_around(journal.Journal, "save")
_around(loop.LoopImage, "_resize")
_around(images.RawImage, "_step")
_around(guests.GuestClient, "resize")
# Between the new length of the file and what the loop device shows of it.
_around(os, "truncate")

if __name__ == "__main__":
    sys.exit(__main__.main())
