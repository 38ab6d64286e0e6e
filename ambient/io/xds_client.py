"""Subscribe a node process to the control plane's World, for ever."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Awaitable, Callable
from typing import Any

from ambient.errors import AmbientError, OurFault, PeerFault
from ambient.io.control_channel import ACCEPTED, bearer, describe, open_channel
from ambient.io.quiet_grpc import grpc
from ambient.model.world import Diff, World
from ambient.proto import discovery_pb2
from ambient.settings import NodeSettings
from ambient.xds.client import Backoff, Client, describe_node, summarize

METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"

STATUS_TIMEOUT_S = 5.0
HEADERS_TIMEOUT_S = 0.5

_Call = grpc.aio.StreamStreamCall[Any, Any]
OnChange = Callable[[World, Diff], Awaitable[None]]
OnState = Callable[[bool, str], None]

_log = logging.getLogger(__name__)


async def subscribe(
    settings: NodeSettings,
    role: str,
    on_change: OnChange,
    *,
    on_state: OnState | None = None,
    backoff: Backoff | None = None,
) -> None:
    """Keep a World up to date until cancelled.

    ``on_change(world, diff)`` is awaited for the first complete World (also an empty one) and for every
    change after it, one at a time; a change is acknowledged to the control plane when it has returned. If
    it raises, the fault is logged, the connection is given up, and the change comes again on the next one.
    ``on_state(connected, reason)`` is told of every change of the connection, for status and metrics.
    ``role`` is agent or ztunnel.
    """
    pod = {name: os.environ.get(name, "") for name in ("INSTANCE_IP", "POD_NAME", "POD_NAMESPACE")}
    client = Client(describe_node(role, settings.node_name, *pod.values()))
    waits = backoff or Backoff()
    tell = on_state or (lambda connected, reason: None)
    while True:
        try:
            await _run(settings, client, on_change, tell, waits)
            reason = "the control plane closed the stream"
        except AmbientError as error:
            reason = str(error)
        except grpc.aio.AioRpcError as error:
            reason = describe(error)
        except Exception as error:  # whatever arrived, this process lives on with the World it has
            reason = f"{type(error).__name__}: {error}"[:500]
        delay = waits.next(random.random())
        tell(False, reason)
        _log.warning("discovery (%s) from %s: %s; again in %.2f s", role, settings.control_address, reason, delay)
        await asyncio.sleep(delay)


async def _run(settings: NodeSettings, client: Client, on_change: OnChange, tell: OnState, waits: Backoff) -> None:
    """One connection, until it ends."""
    async with open_channel(settings) as channel:
        call = channel.stream_stream(
            METHOD,
            request_serializer=discovery_pb2.DeltaDiscoveryRequest.SerializeToString,
            response_deserializer=discovery_pb2.DeltaDiscoveryResponse.FromString,
        )(metadata=bearer(settings))
        try:
            await _accepted(call)
            for request in client.connect():
                await _send(call, request)
            connected = False
            while True:
                response = await call.read()
                if response is grpc.aio.EOF:
                    raise await _ended(call)
                if not isinstance(response, discovery_pb2.DeltaDiscoveryResponse):
                    raise PeerFault("a discovery response that is no such message")  # the library gives None
                if not connected:
                    connected = True
                    tell(True, "")
                change = client.receive(response)
                if change is None:
                    continue
                if change.rejected:
                    _log.error("discovery: %d resources refused: %s", len(change.rejected), summarize(change.rejected))
                if change.diff or change.first:
                    await _act(on_change, change.world, change.diff)
                acknowledgements = client.commit(change)
                waits.reset()  # not before: what cannot be put into effect comes again with every connection
                for ack in acknowledgements:
                    await _send(call, ack)
        finally:
            call.cancel()


async def _send(call: _Call, request: discovery_pb2.DeltaDiscoveryRequest) -> None:
    try:
        await call.write(request)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        # a write on a stream that the server ended says nothing useful; the stream's status does
        raise await _ended(call) from None


async def _accepted(call: _Call) -> None:
    """Wait until the server has taken the call or refused it. Raises PeerFault with the status if refused.

    A write into a stream that is being refused would put the library's own INTERNAL in place of the reason. Our
    server says `ACCEPTED` in its headers at once; one that does not is given `HEADERS_TIMEOUT_S` to refuse.
    """
    headers, status = asyncio.ensure_future(call.initial_metadata()), asyncio.ensure_future(call.code())
    for task in (headers, status):  # left to end by themselves: cancelling one would cancel the call
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.wait({headers, status}, timeout=HEADERS_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
    if headers.done() and not headers.exception() and any(key == ACCEPTED for key, _ in headers.result() or ()):
        return
    await asyncio.wait({status}, timeout=HEADERS_TIMEOUT_S)
    if status.done():
        raise await _ended(call)


async def _ended(call: _Call) -> PeerFault:
    """Why the server ended the stream."""
    try:
        async with asyncio.timeout(STATUS_TIMEOUT_S):
            code, details = await call.code(), await call.details()
    except TimeoutError:
        return PeerFault("the stream broke and has no status")
    return PeerFault(f"{code.name}: {(details or '')[:500]}")


async def _act(on_change: OnChange, world: World, diff: Diff) -> None:
    try:
        await on_change(world, diff)
    except Exception as error:
        # whatever went wrong in the user's code, the state machine stays at what was committed
        _log.exception("discovery: a change could not be put into effect")
        raise OurFault(f"a change could not be put into effect: {type(error).__name__}: {error}") from error
