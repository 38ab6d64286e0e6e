"""Ask the control plane whether peers know a workload.

Apart from `ambient.io.ca_client`: the agent asks this and never holds a key, so it needs no cryptography (8 MB).
"""

from __future__ import annotations

import asyncio

from ambient.errors import AmbientError
from ambient.io.control_channel import bearer, open_channel
from ambient.io.quiet_grpc import grpc
from ambient.proto import mesh_pb2
from ambient.settings import NodeSettings

AWAIT_ACKNOWLEDGED = "/ambient.v1.Mesh/AwaitAcknowledged"


async def await_acknowledged(settings: NodeSettings, workload_uid: str, hbone: bool, timeout_s: float) -> bool:
    """Wait until every node knows the workload as HBONE (or as not HBONE), at most ``timeout_s``.

    False when the time ran out, and when the control plane cannot be reached or refuses.
    """
    request = mesh_pb2.AwaitAcknowledgedRequest(
        workload_uid=workload_uid, hbone=hbone, timeout_ms=max(0, round(timeout_s * 1000))
    )
    try:
        async with asyncio.timeout(timeout_s + 1.0), open_channel(settings) as channel:
            call = channel.unary_unary(
                AWAIT_ACKNOWLEDGED,
                request_serializer=mesh_pb2.AwaitAcknowledgedRequest.SerializeToString,
                response_deserializer=mesh_pb2.AwaitAcknowledgedResponse.FromString,
            )
            response = await call(request, metadata=bearer(settings), timeout=timeout_s + 0.5)
    except (grpc.aio.AioRpcError, AmbientError, TimeoutError):
        return False
    return isinstance(response, mesh_pb2.AwaitAcknowledgedResponse) and response.acknowledged
