"""What runs here: the version, the revision it was built from, the Python below."""

from __future__ import annotations

import sys
from pathlib import Path

from storaged import __version__

UNKNOWN = "unknown"
_PACKAGE = Path(__file__).resolve().parent.parent


def revision(package: Path = _PACKAGE) -> str:
    """The first twelve digits of the commit: as packaging wrote it to `REVISION`, else as a checkout's git has it."""
    written = _read(package / "REVISION")
    if written:
        return written[:12]
    git = package.parent / ".git"
    pointer = _read(git)  # a linked worktree has a file there
    if pointer.startswith("gitdir: "):
        git = (package.parent / pointer.removeprefix("gitdir: ")).resolve()
    head = _read(git / "HEAD")
    if not head.startswith("ref: "):
        return head[:12] or UNKNOWN
    name = head.removeprefix("ref: ")
    shared = (git / (_read(git / "commondir") or ".")).resolve()
    for line in [_read(shared / name), *_read(shared / "packed-refs").splitlines()]:
        commit, _, ref = line.partition(" ")
        if commit and ref in ("", name):
            return commit[:12]
    return UNKNOWN


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def labels() -> tuple[str, str, str]:
    """Values for version, revision and python."""
    return __version__, revision(), "{}.{}.{}".format(*sys.version_info[:3])
