"""The guest's part of a resize: asked for until it is done or refused, or the guest is silent for too long."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from storaged.errors import StoragedError
from storaged.host import saga as sagas
from storaged.host import saga_model as sm
from storaged.host.guests import Lost, Refused, ResizeStatus
from storaged.rpc.proto import storaged_v1_pb2
from storaged.units import format_size

if TYPE_CHECKING:
    from storaged.host.resizes import Job
    from storaged.host.settings import Resizing

log = logging.getLogger(__name__)
_T = TypeVar("_T")
_MOVING = {storaged_v1_pb2.JOB_RUNNING, storaged_v1_pb2.JOB_CANCELLING}


class Agent(Protocol):
    """A guest's agent, for resizes; see `guests.GuestClient`."""

    report: storaged_v1_pb2.Report | None

    async def resize_status(self) -> ResizeStatus: ...
    async def resize(self, size: int) -> bool: ...
    async def cancel_resize(self) -> None: ...
    async def minimum(self) -> int: ...
    async def fresh_report(self) -> storaged_v1_pb2.Report | None: ...


class GuestWork:
    """What one saga has its guest do. Raises StoragedError when whether the guest is at work is not known."""

    def __init__(
        self, job: Job, settings: Resizing, agent: Callable[[str], Agent | None], changed: Callable[[], None]
    ) -> None:
        self._job = job
        self._settings = settings
        self._agent = agent
        self._changed = changed

    @property
    def stops(self) -> bool:
        """True when the resize is to stop: the guest is not asked to resize any more."""
        return self._job.saga.cancelling and self._job.saga.stage is not sm.Stage.RESTORING

    async def patient(self, call: Callable[[Agent], Awaitable[_T]]) -> _T:
        """The call's answer, asked for again while nobody answers. Raises Lost after a while, Refused at once."""
        until = time.monotonic() + self._settings.patience_s
        while True:
            try:
                agent = self._agent(self._job.saga.guest)
                if agent is None:
                    raise Lost("the guest's machine does not run")
                return await call(agent)
            except Lost as lost:
                if time.monotonic() >= until:
                    raise Lost(f"{lost.message}, for {self._settings.patience_s:g} s") from lost
            await asyncio.sleep(self._settings.poll_s)

    async def capacity(self, size: int) -> sm.Event:
        """Wait until the guest's kernel sees `size` bytes of disk."""
        until = time.monotonic() + self._settings.capacity_s
        while not self.stops:
            report = await self.patient(lambda agent: agent.fresh_report())
            if report is None or report.filesystem.device_bytes >= size:
                return sm.CapacitySeen()  # who cannot be asked waits for it when it resizes
            if time.monotonic() >= until:
                has = format_size(report.filesystem.device_bytes)
                raise StoragedError(f"the guest does not see its larger disk: it has {has} there")
            await self._pause()
        return sm.Stopped()

    async def filesystem(self, size: int) -> sm.Event:
        """Bring the guest's filesystem to `size`, or follow whoever does already."""
        asked = told = False
        while True:
            status = await self.patient(lambda agent: agent.resize_status())
            if status.running:
                if status.target != size and not self._is_ours(status):
                    raise StoragedError(f"the guest resizes its filesystem to {status.target}, asked by somebody else")
                asked = asked or status.target == size
                if (self.stops or status.target != size) and not told:
                    told = await self._cancel()
                    continue
                self._tell(status, size)
            elif status.current == size:
                return sm.GuestEnded(size)
            elif asked or self.stops:
                return sm.GuestEnded(status.current, await self._why(size))
            else:
                try:
                    asked = await self.patient_once(size)
                except Refused as refused:
                    return sm.GuestEnded(status.current, refused.message)
                continue
            await self._pause()

    async def patient_once(self, size: int) -> bool:
        """Ask for the resize; False when it is not known whether that arrived: the status tells."""
        try:
            agent = self._agent(self._job.saga.guest)
            return agent is not None and await agent.resize(size)
        except Lost:
            await asyncio.sleep(self._settings.poll_s)
            return False

    def _is_ours(self, status: ResizeStatus) -> bool:
        """True for the job that is being taken back."""
        return self._job.saga.stage is sm.Stage.RESTORING and status.target == self._job.saga.to

    async def _cancel(self) -> bool:
        """Have the guest stop; True when asking again is of no use."""
        agent = self._agent(self._job.saga.guest)
        if agent is None:
            return False
        try:
            await agent.cancel_resize()
        except Lost:
            return False
        except Refused as refused:
            log.debug(
                "%s: no cancel: %s", self._job.saga.guest, refused.message
            )  # it ended, or cannot: the status tells
        return True

    async def _why(self, size: int) -> str:
        """Why the guest's job did not get there, in its own words."""
        report = None
        with contextlib.suppress(StoragedError):
            report = await self.patient(lambda agent: agent.fresh_report())
        if report is not None and report.HasField("job") and report.job.requested_size == size and report.job.reason:
            return f"the guest's resize ended early: {report.job.reason}"
        return "the guest's resize ended early, and it does not say why"

    def _tell(self, status: ResizeStatus, size: int) -> None:
        agent = self._agent(self._job.saga.guest)
        report = agent.report if agent is not None else None
        news = sm.Progressed(status.current, moving=report is None)
        if report is not None and report.HasField("job") and report.job.requested_size == size:
            job = report.job
            news = sm.Progressed(
                status.current, job.state in _MOVING, job.moved_bytes, job.progress,
                job.rate_bytes_per_s if job.HasField("rate_bytes_per_s") else None,
                job.eta_s if job.HasField("eta_s") else None,
            )  # fmt: skip
        self._job.saga, _ = sagas.step(self._job.saga, news)
        self._changed()

    async def _pause(self) -> None:
        """Until it is time to ask again; a cancel that comes meanwhile is seen at once."""
        if self._job.interrupt.is_set():
            await asyncio.sleep(self._settings.poll_s)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.poll_s):
                await self._job.interrupt.wait()
