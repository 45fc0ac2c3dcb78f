"""What must be denied even by a sharer that knows every demand and every deletion, and keeps nothing in reserve.

A wanted byte is an interval from its write to its deletion, and the disk is the number of intervals that may overlap.
The most that can be had is found by going through time and, where too many overlap, giving up those that would stay
longest (the greedy for k-colourable subgraphs of interval graphs: Carlisle and Lloyd, 1995; exchanging a byte given
up for one that leaves earlier never makes the future worse, and this holds for a disk whose size varies, too).
"""

from __future__ import annotations

import heapq

from lab.sharing.workload import Workload


def in_hindsight(workload: Workload) -> int:
    """The least number of bytes that any sharer has to deny on `workload`."""
    alive: dict[int, int] = {}  # bytes by the step at which they leave
    latest: list[int] = []
    total = lost = 0
    for step in range(workload.steps):
        total -= alive.pop(step, 0)
        for _, size, until in workload.wants[step]:
            if until not in alive:
                alive[until] = 0
                heapq.heappush(latest, -until)
            alive[until] += size
            total += size
        over = total - (workload.room - workload.outside[step])
        while over > 0:
            until = -latest[0]
            have = alive.get(until, 0)
            gives = min(have, over)
            over -= gives
            total -= gives
            lost += gives
            if gives == have:
                alive.pop(until, None)
                heapq.heappop(latest)
            else:
                alive[until] = have - gives
    return lost


def denied(workload: Workload) -> int:
    """Bytes denied by a sharer that knows every demand: no promise lies idle, nothing is held back, and it denies
    only when the disk is full but for what no sharer can hand out."""
    leaves: dict[int, int] = {}
    held = lost = 0
    for step in range(workload.steps):
        held -= leaves.pop(step, 0)
        room = workload.room - workload.spoken_for - workload.outside[step]
        for _, size, until in workload.wants[step]:
            gets = max(min(size, room - held), 0)
            lost += size - gets
            held += gets
            leaves[until] = leaves.get(until, 0) + gets
    return lost
