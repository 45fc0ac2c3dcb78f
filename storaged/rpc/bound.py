"""What a guest can still write, told beside the answer to UpdateStorageBalloon: its trailing metadata.

The contract's answer says only whether the balloon got there. A host that shares its disk must know what can reach it
beyond the grant: room in metadata chunks, and preallocated extents. Hosts that do not read it lose nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, unquote

MAY_WRITE = "storaged-may-write-bytes"
"""As `Balloon.may_write_bytes` of storaged.v1."""
POTENTIAL = "storaged-potential-bytes"
"""As `Balloon.potential_bytes` of storaged.v1."""
SEQUENCE = "storaged-sequence"
"""As `Report.sequence` of storaged.v1: reports with a greater one are of later."""
REASON = "storaged-reason"
"""Why the answer is BALLOON_INFLATE_FAILED, percent-encoded; absent with SUCCESS."""
MOST_REASON = 500

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Bound:
    """What a guest tells: bytes of the host's disk, and the sequence of its report at that moment.

    `reason`: why it did not get there; empty for SUCCESS.
    """

    may_write: int
    potential: int
    sequence: int
    reason: str = ""


def as_metadata(bound: Bound) -> list[tuple[str, str]]:
    """The trailing metadata of an answer."""
    pairs = [(MAY_WRITE, str(bound.may_write)), (POTENTIAL, str(bound.potential)), (SEQUENCE, str(bound.sequence))]
    if bound.reason:
        pairs.append((REASON, quote(bound.reason[:MOST_REASON])))
    return pairs


def read_bound(metadata: Metadata | None, most: int) -> Bound | None:
    """What trailing metadata tells; None where it is missing or no numbers from 0 to `most`."""
    found = {key: value if isinstance(value, str) else "" for key, value in metadata or ()}
    may_write, potential, sequence = (_number(found.get(key, ""), most) for key in (MAY_WRITE, POTENTIAL, SEQUENCE))
    if may_write is None or potential is None or sequence is None:
        return None
    return Bound(may_write, potential, sequence, unquote(found.get(REASON, ""))[:MOST_REASON])


def _number(text: str, most: int) -> int | None:
    if not (text.isascii() and text.isdecimal() and len(text) <= 20):
        return None
    number = int(text)
    return number if number <= most else None
