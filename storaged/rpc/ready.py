"""Tells the host that this guest serves: `vm_tools.StartupListener.VmReady`."""

from __future__ import annotations

import asyncio
import logging
import random

import grpc
import grpc.aio

from storaged.addresses import Address
from storaged.config import NotifyConfig
from storaged.rpc.outward import reach
from storaged.rpc.proto import common_pb2, vm_host_pb2_grpc

log = logging.getLogger(__name__)


async def tell_host(address: Address, config: NotifyConfig | None = None) -> bool:
    """VmReady, again until the host answers or it has been tried for long enough; true when it answered."""
    async with reach(address) as target:
        return await _tell(target, address, config or NotifyConfig())


async def _tell(target: str, address: Address, config: NotifyConfig) -> bool:
    loop = asyncio.get_running_loop()
    until, pause = loop.time() + config.give_up_s, config.first_s
    attempt = 0
    while True:
        attempt += 1
        # A new channel each time: gRPC's own pauses between connections would add to ours.
        async with grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub: vm_host_pb2_grpc.StartupListenerAsyncStub = vm_host_pb2_grpc.StartupListenerStub(channel)
            try:
                await stub.VmReady(common_pb2.EmptyMessage(), timeout=config.call_s)
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            else:
                log.info("the host at %s knows that we serve (attempt %d)", address, attempt)
                return True
        if attempt == 1:
            log.info("the host at %s does not hear us yet (%s); trying again", address, reason)
        wait = pause * random.uniform(0.8, 1.2)  # noqa: S311  # guests that start together should not call together
        if loop.time() + wait >= until:
            log.warning("the host at %s was not told that we serve, after %d attempts: %s", address, attempt, reason)
            return False
        await asyncio.sleep(wait)
        pause = min(pause * 2, config.most_s)
