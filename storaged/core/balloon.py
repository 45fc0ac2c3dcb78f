"""The storage core's handlers of host pressure, write-back limits and the balloon (rules 1 to 3 of `core.machine`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from storaged.balloon.target import allowance
from storaged.core import events as ev
from storaged.core import pressure as pr
from storaged.core.model import Config, Level
from storaged.core.state import BALLOON_AFTER, BalloonSignal, Result, State
from storaged.units import format_size


def _lower(config: Config, level: Level) -> ev.SetDirtyLimits:
    return ev.SetDirtyLimits(config.critical_dirty if level is Level.CRITICAL else config.low_dirty)


ON_ENTER: dict[Level, tuple[str, ...]] = {
    Level.NORMAL: ("restore dirty limits",),
    Level.LOW: ("lower dirty limits", "trim"),
    Level.CRITICAL: ("floor dirty limits", "flush", "trim"),
}
"""What each level asks for when it is entered; whatever the level, the balloon is sized continuously."""

_ACTIONS: dict[str, Callable[[State], tuple[ev.Effect, ...]]] = {
    "restore dirty limits": lambda s: (ev.RestoreDirtyLimits(s.dirty_found),) if s.dirty_found is not None else (),
    "lower dirty limits": lambda s: (_lower(s.config, Level.LOW),),
    "floor dirty limits": lambda s: (_lower(s.config, Level.CRITICAL),),
    "flush": lambda _: (ev.Sync(),),
    "trim": lambda _: (ev.Trim(),),
}


def host_reported(state: State, event: ev.HostReported) -> Result:
    report = event.report
    if pr.carries_no_news(report):
        return replace(state, ignored_reports=state.ignored_reports + 1), (ev.IgnoreReport(),)
    limit = allowance(report.free, state.config.reserve)
    before, limit_before = state.pressure.level, state.balloon.limit
    state = replace(state, report=report, pressure=pr.reported(state.pressure, report, state.config))
    state, effects = entered(state, before, report.at)
    balloon = state.balloon
    signal = BalloonSignal.TIGHTEN if balloon.limit is None or limit < balloon.limit else BalloonSignal.LOOSEN
    balloon = replace(
        balloon,
        state=BALLOON_AFTER[balloon.state][signal],
        limit=limit,
        pending=True,
        asked=True,
        relief=0,
        retry_at=None,
    )
    # The answer waits for both: a crash half-way must not forget what was promised.
    news = limit != limit_before or state.pressure.level is not before
    return replace(state, balloon=balloon), (ev.HoldAvailable(limit), *effects, *((ev.Save(),) if news else ()))


def entered(state: State, before: Level, now: float) -> Result:
    """The effects of a change of level since `before`, and of staying above NORMAL."""
    level = state.pressure.level
    effects: list[ev.Effect] = []
    if level is not before:
        effects.append(ev.Note(f"host pressure {before.name} -> {level.name}", warning=level > before))
        state, acting = act(state, level, now)
        effects.extend(acting)
    elif (
        level is not Level.NORMAL
        and state.trimmed_at is not None
        and now - state.trimmed_at >= state.config.trim_again_s
    ):
        effects.append(ev.Trim())
    if any(isinstance(effect, ev.Trim) for effect in effects):
        state = replace(state, trimmed_at=now)
    return state, tuple(effects)


def _guard_at(state: State, event: ev.BalloonSettled | ev.BalloonSampled) -> float | None:
    """When to sample the space next: never while nothing is to be held back."""
    if state.balloon.limit is None and not event.size:
        return None
    config = state.config
    if event.tight:
        return event.at + config.guard_soon_s
    calm = isinstance(event, ev.BalloonSampled) and event.calm
    return event.at + (max(config.guard_calm_s, config.guard_every_s) if calm else config.guard_every_s)


def act(state: State, level: Level, now: float) -> Result:
    """What entering `level` asks for."""
    restoring = level is Level.NORMAL and state.dirty_found is not None
    # What was found is forgotten only once it is back.
    state = replace(state, restore_at=now + state.config.retry_most_s if restoring else None)
    return state, tuple(effect for action in ON_ENTER[level] for effect in _ACTIONS[action](state))


def balloon_settled(state: State, event: ev.BalloonSettled) -> Result:
    balloon = state.balloon
    guard_at = _guard_at(state, event)
    if event.limit != balloon.limit:
        # A newer limit came meanwhile; its own HoldAvailable is on the way.
        return replace(state, balloon=replace(balloon, size=event.size, guard_at=guard_at)), ()
    settled = replace(
        balloon,
        state=BALLOON_AFTER[balloon.state][BalloonSignal.SETTLED],
        size=event.size,
        pending=False,
        asked=False,
        failures=0,
        reason="",
        retry_at=event.at + state.config.retry_first_s if event.again and event.limit is not None else None,
        guard_at=guard_at,
        warning=event.warning,
    )
    effects: tuple[ev.Effect, ...] = (ev.AnswerReport(),) if balloon.asked else ()
    if balloon.failures:
        effects = (*effects, ev.Note("the balloon is at its target again"))
    return replace(state, balloon=settled), (*effects, *_warned(balloon.warning, event.warning))


def _warned(before: str, now: str) -> tuple[ev.Effect, ...]:
    """A warning is noted when it comes up, not again while it lasts."""
    return (ev.Note(now, warning=True),) if now and now != before else ()


def balloon_sampled(state: State, event: ev.BalloonSampled) -> Result:
    balloon = replace(
        state.balloon,
        size=event.size,
        relief=state.balloon.relief + event.relief,
        guard_at=_guard_at(state, event),
        warning=event.warning or (state.balloon.warning if event.size else ""),
    )
    note = ev.Note(f"gave {format_size(event.relief)} of the balloon to metadata, which was running out")
    warned = _warned(state.balloon.warning, event.warning)
    return replace(state, balloon=balloon), (*((note,) if event.relief else ()), *warned)


def balloon_failed(state: State, event: ev.BalloonFailed) -> Result:
    balloon = state.balloon
    if event.limit != balloon.limit:
        return replace(state, balloon=replace(balloon, size=event.size)), ()
    failures = balloon.failures + 1
    wait = min(state.config.retry_first_s * 2 ** min(failures - 1, 16), state.config.retry_most_s)
    failed = replace(
        balloon,
        state=BALLOON_AFTER[balloon.state][BalloonSignal.FAILED],
        size=event.size,
        pending=False,
        asked=False,
        failures=failures,
        reason=event.reason,
        retry_at=event.at + wait,
        guard_at=event.at + state.config.guard_every_s if event.size else None,
    )
    effects: list[ev.Effect] = [ev.AnswerReport(event.reason)] if balloon.asked else []
    if failures == 1 or event.reason != balloon.reason:
        effects.append(ev.Note(f"the balloon is not at its target: {event.reason}", warning=True))
    return replace(state, balloon=failed), tuple(effects)


def retry(state: State) -> Result:
    """Bring the balloon to its limit once more, if it has one."""
    balloon = state.balloon
    if balloon.pending or (balloon.limit is None and not balloon.failures):
        return state, ()
    again = replace(balloon, pending=True, retry_at=None)
    return replace(state, balloon=again), (ev.HoldAvailable(balloon.limit, fresh=False),)


def release_requested(state: State, event: ev.ReleaseRequested) -> Result:
    asked = state.balloon.asked
    balloon = replace(
        state.balloon,
        state=BALLOON_AFTER[state.balloon.state][BalloonSignal.LOOSEN],
        limit=None,
        pending=True,
        asked=False,
        retry_at=None,
        guard_at=None,
    )
    state, restoring = act(replace(state, balloon=balloon, pressure=pr.Pressure(), report=None), Level.NORMAL, event.at)
    reclaim = () if state.reclaim_found is None else (ev.RestoreReclaim(state.reclaim_found),)
    refused = (ev.AnswerReport("the balloon was released meanwhile: nothing is held"),) if asked else ()
    return state, (*refused, ev.HoldAvailable(None), *restoring, *reclaim, ev.Save())


def reclaim_found(state: State, event: ev.ReclaimFound) -> Result:
    note = ev.Note(
        f"the kernel relocates data chunks by itself (bg_reclaim_threshold {event.settings.threshold}, dynamic_reclaim"
        f" {event.settings.dynamic}, periodic_reclaim {event.settings.periodic}), which writes the balloon's extents:"
        " turned off until the balloon is released",
        warning=True,
    )
    return replace(state, reclaim_found=state.reclaim_found or event.settings), (ev.Save(), note)


def reclaim_restored(state: State, event: ev.ReclaimRestored) -> Result:
    return replace(state, reclaim_found=None), (ev.Save(),)


def dirty_limits_found(state: State, event: ev.DirtyLimitsFound) -> Result:
    if state.dirty_found is not None:
        return state, ()
    return replace(state, dirty_found=event.limits), (ev.Save(),)


def dirty_limits_restored(state: State, event: ev.DirtyLimitsRestored) -> Result:
    if state.pressure.level is not Level.NORMAL:
        return state, ()
    return replace(state, dirty_found=None, restore_at=None), (ev.Save(),)


def trimmed(state: State, event: ev.Trimmed) -> Result:
    if event.error:
        return state, (ev.Note(f"could not hand blocks back to the host: {event.error}", warning=True),)
    return replace(state, reclaimed=state.reclaimed + event.size), ()
