"""The control plane's gRPC server: delta discovery, the CA, and AwaitAcknowledged, on one TLS port.

Every call is authenticated (`ambient.io.authentication`). Discovery and AwaitAcknowledged are for node
accounts only: the World says who talks to whom in the whole cluster, and a stranger's stream that never
acknowledged would hold up every enrolment. A certificate may be asked for by anyone, and
`ambient.control.certificates` decides. Every method is served as a stream, which looks the same on the wire: so a
request is taken in only after its sender was authenticated, and strangers cannot fill our memory with them.

Per client there is one task that reads and one that writes; a write waits for the client's flow control, and
meanwhile that client's changes pile up in the World alone (`ambient.xds.session`), so a slow client costs one
response of memory and blocks nobody.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn, TypeVar

from google.protobuf.message import DecodeError

from ambient.control.certificates import Caller, PodsOnNode, Refused, Rules, authorize, renew_at
from ambient.errors import AmbientError, PeerFault
from ambient.io.authentication import Authenticator, Review, Unauthenticated
from ambient.io.ca import Authority, ServerCertificate, read_csr
from ambient.io.control_channel import ACCEPTED
from ambient.io.quiet_grpc import grpc
from ambient.proto import ca_pb2, discovery_pb2, mesh_pb2
from ambient.settings import ControlSettings
from ambient.xds.server import Server

RECEIVE_BYTES_MAX = 16 * 1024 * 1024
"""Largest request: initial_resource_versions of a client that knows a very large mesh (200,000 resources)."""
REQUEST_TIMEOUT_S = 10.0
CERTIFICATES_OF_CALLER_MAX = 16
"""Calls of one pod for certificates at the same time; a node asks for eight."""
POLL_S = 2.0
STOP_GRACE_S = 0.5
ACKNOWLEDGE_WAITERS_MAX = 4096

Context = grpc.aio.ServicerContext[Any, Any]
_Request = TypeVar("_Request")
_log = logging.getLogger(__name__)

_OPTIONS = (
    ("grpc.max_receive_message_length", RECEIVE_BYTES_MAX),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.max_concurrent_streams", 128),
    ("grpc.so_reuseport", 0),  # a second control plane on this port must fail, not share it
)


class ControlServer:
    """Make, `start`, `stop`. Everything runs in the event loop of `start`; only `_Credentials` is read by gRPC's
    own threads."""

    def __init__(
        self,
        settings: ControlSettings,
        discovery: Server,
        authority: Authority,
        review: Review,
        pods_on_node: PodsOnNode,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.ports: tuple[int, ...] = ()
        self.counters: Counter[str] = Counter()
        self._settings = settings
        self._discovery = discovery
        self._authority = authority
        self._pods_on_node = pods_on_node
        self._clock = clock
        self._rules = Rules(settings.trust_domain, settings.node_accounts)
        self._authenticator = Authenticator(review)
        self._credentials: _Credentials | None = None
        self._server: grpc.aio.Server | None = None
        self._waiters = 0
        self._asking: Counter[str] = Counter()

    async def start(self) -> None:
        """Listen on every address of ``settings.listen``. Raises AmbientError if one cannot be had."""
        credentials = self._credentials = _Credentials(self._new_certificate())
        server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers(self._handlers())
        ports = []
        for address in self._settings.listen:
            try:
                port = server.add_secure_port(address, credentials.for_a_port())
            except RuntimeError as error:
                raise PeerFault(f"listen: {address}: {str(error)[:300]}") from None
            if port == 0:
                raise PeerFault(f"listen: {address}: cannot be bound")
            ports.append(port)
        await server.start()
        self._server = server
        self.ports = tuple(ports)

    async def maintain(self) -> None:
        """Watch the CA's files and renew our own certificate, until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                self.tick()
            except Exception:  # a full disk, say: what is in memory serves on, and the next look may succeed
                _log.exception("the CA's files could not be looked after")

    def tick(self) -> None:
        """One look at the CA's files and at the age of our certificate."""
        credentials = self._credentials
        if credentials is None:
            return
        changed = self._authority.poll(self._clock())
        if changed or self._clock() >= renew_at(credentials.certificate.life):
            try:
                credentials.replace(self._new_certificate())
            except AmbientError as error:
                _log.error("the server certificate is not renewed: %s", error)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
            self._server = None

    def _new_certificate(self) -> ServerCertificate:
        return self._authority.issue_server(self._settings.server_names, self._clock())

    def _handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        return (
            grpc.method_handlers_generic_handler(
                "envoy.service.discovery.v3.AggregatedDiscoveryService",
                {
                    "DeltaAggregatedResources": grpc.stream_stream_rpc_method_handler(
                        self._discover, request_deserializer=discovery_pb2.DeltaDiscoveryRequest.FromString
                    )
                },
            ),
            grpc.method_handlers_generic_handler(
                "istio.v1.auth.IstioCertificateService",
                {
                    "CreateCertificate": grpc.stream_unary_rpc_method_handler(
                        self._create_certificate,
                        request_deserializer=ca_pb2.IstioCertificateRequest.FromString,
                        response_serializer=ca_pb2.IstioCertificateResponse.SerializeToString,
                    )
                },
            ),
            grpc.method_handlers_generic_handler(
                "ambient.v1.Mesh",
                {
                    "AwaitAcknowledged": grpc.stream_unary_rpc_method_handler(
                        self._await_acknowledged,
                        request_deserializer=mesh_pb2.AwaitAcknowledgedRequest.FromString,
                        response_serializer=mesh_pb2.AwaitAcknowledgedResponse.SerializeToString,
                    )
                },
            ),
        )

    # ---- calls ----

    async def _authenticate(self, context: Context, *, node_only: bool) -> Caller:
        try:
            peer = context.peer().rpartition(":")[0]  # without the port
            caller = await self._authenticator.authenticate(tuple(context.invocation_metadata() or ()), peer)
        except Unauthenticated as error:
            self.counters["unauthenticated"] += 1
            _log.warning("call from %s refused: %s", context.peer(), error)
            await self._abort(context, grpc.StatusCode.UNAUTHENTICATED, str(error))
        except AmbientError as error:
            self.counters["review_failed"] += 1
            await self._abort(context, grpc.StatusCode.UNAVAILABLE, f"token not reviewed: {error}")
        if node_only and caller.account not in self._rules.node_accounts:
            self.counters["not_a_node_account"] += 1
            message = f"{caller.account} is none of node_accounts: {', '.join(self._rules.node_accounts)}"
            await self._abort(context, grpc.StatusCode.PERMISSION_DENIED, message)
        return caller

    async def _abort(self, context: Context, code: grpc.StatusCode, message: str) -> NoReturn:
        await context.abort(code, message[:2000])
        raise AssertionError("abort returned")

    async def _discover(self, requests: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest], context: Context) -> None:
        caller = await self._authenticate(context, node_only=True)
        try:
            session = self._discovery.open(caller.node_name)
        except PeerFault as error:
            await self._abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        await context.send_initial_metadata(((ACCEPTED, "1"),))
        wake = asyncio.Event()

        async def read() -> None:
            try:
                async for request in requests:
                    nack = session.receive(request)
                    if nack is not None:
                        self.counters["nacks"] += 1
                        _log.error(
                            "%s on node %s refused %s: %s",
                            session.role or session.id,
                            session.node,
                            ", ".join(nack.names[:10]) or "a response",
                            nack.message[:1000],
                        )
                    wake.set()
            finally:
                wake.set()

        self.counters["streams"] += 1
        self._discovery.store.listen(wake.set)
        reader = asyncio.create_task(read())
        try:
            while not reader.done():
                wake.clear()
                while not reader.done() and (response := session.next()) is not None:
                    self.counters["responses"] += 1
                    self.counters["resources"] += response.resources
                    await context.write(response.payload)
                if not reader.done():
                    await wake.wait()
            failure = reader.exception()
            if isinstance(failure, PeerFault | DecodeError):
                await self._abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(failure))
            if failure is not None:
                raise failure
        finally:
            self._discovery.store.forget(wake.set)
            self._discovery.close(session)
            asyncio.get_running_loop().call_later(self._settings.acknowledge_timeout_s, self._discovery.bury, session)
            reader.cancel()

    async def _one(self, requests: AsyncIterator[_Request], context: Context) -> _Request:
        """The one request of a call that is not a stream."""
        code, why = grpc.StatusCode.INVALID_ARGUMENT, "no request"
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                async for request in requests:
                    return request
        except TimeoutError:
            code, why = grpc.StatusCode.DEADLINE_EXCEEDED, f"no request in {REQUEST_TIMEOUT_S:.0f} s"
        except DecodeError as error:
            why = f"the request is not readable: {error}"
        return await self._abort(context, code, why)

    async def _create_certificate(
        self, requests: AsyncIterator[ca_pb2.IstioCertificateRequest], context: Context
    ) -> ca_pb2.IstioCertificateResponse:
        caller = await self._authenticate(context, node_only=False)
        who = caller.pod_uid or caller.account
        if self._asking[who] >= CERTIFICATES_OF_CALLER_MAX:
            self.counters["certificate_refused_too_many"] += 1
            message = f"{caller.account} asks for more than {CERTIFICATES_OF_CALLER_MAX} certificates at once"
            await self._abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        self._asking[who] += 1
        try:
            return await self._certificate(caller, await self._one(requests, context), context)
        finally:
            self._asking[who] -= 1
            if not self._asking[who]:
                del self._asking[who]

    async def _certificate(
        self, caller: Caller, request: ca_pb2.IstioCertificateRequest, context: Context
    ) -> ca_pb2.IstioCertificateResponse:
        fields = request.metadata.fields
        wanted = fields["ImpersonatedIdentity"].string_value if "ImpersonatedIdentity" in fields else ""
        decision = authorize(caller, wanted, self._pods_on_node, self._rules)
        if isinstance(decision, Refused):
            self.counters[f"certificate_refused_{decision.reason}"] += 1
            _log.warning("certificate refused to %s on node %s: %s", caller.account, caller.node_name, decision.message)
            await self._abort(context, grpc.StatusCode.PERMISSION_DENIED, f"{decision.reason}: {decision.message}")
        try:
            key = read_csr(request.csr)
        except PeerFault as error:
            self.counters["certificate_refused_bad_csr"] += 1
            await self._abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        try:
            issued = self._authority.issue(key, decision.identity, request.validity_duration, self._clock())
        except AmbientError as error:
            self.counters["certificate_failed"] += 1
            _log.error("certificate of %s: %s", decision.identity, error)
            await self._abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
        self.counters["certificates_issued"] += 1
        _log.info(
            "certificate of %s for node %s, serial %x, until %d",
            decision.identity,
            caller.node_name,
            issued.serial,
            issued.life.not_after,
        )
        return ca_pb2.IstioCertificateResponse(cert_chain=issued.chain)

    async def _await_acknowledged(
        self, requests: AsyncIterator[mesh_pb2.AwaitAcknowledgedRequest], context: Context
    ) -> mesh_pb2.AwaitAcknowledgedResponse:
        await self._authenticate(context, node_only=True)
        request = await self._one(requests, context)
        if self._waiters >= ACKNOWLEDGE_WAITERS_MAX:
            await self._abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls wait for acknowledgements")
        limit_s = min(request.timeout_ms / 1000, self._settings.acknowledge_timeout_s)
        changed = asyncio.Event()
        self._waiters += 1
        self._discovery.listen(changed.set)
        try:
            async with asyncio.timeout(limit_s):
                while waiting := self._discovery.acknowledged(request.workload_uid, request.hbone):
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            pass  # the answer says who had not acknowledged
        finally:
            self._waiters -= 1
            self._discovery.forget(changed.set)
        if waiting:
            self.counters["acknowledge_timeouts"] += 1
            _log.warning(
                "%s as %s: not acknowledged within %.1f s by %s",
                request.workload_uid,
                "HBONE" if request.hbone else "TCP",
                limit_s,
                ", ".join(waiting[:20]),
            )
        return mesh_pb2.AwaitAcknowledgedResponse(acknowledged=not waiting, waiting_for=waiting)


class _Credentials:
    """Our certificate as gRPC wants it. gRPC asks `fetch` at every new connection, from a thread of its own."""

    def __init__(self, certificate: ServerCertificate) -> None:
        self.certificate = certificate

    def replace(self, certificate: ServerCertificate) -> None:
        self.certificate = certificate

    def for_a_port(self) -> grpc.ServerCredentials:
        used = self.certificate

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal used
            now = self.certificate
            if now is used:
                return None  # no change
            used = now
            return _configuration(now)

        return grpc.dynamic_ssl_server_credentials(_configuration(used), fetch)  # type: ignore[arg-type]  # None is allowed


def _configuration(certificate: ServerCertificate) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(certificate.key_pem, certificate.chain_pem)])


async def serve(
    settings: ControlSettings,
    discovery: Server,
    authority: Authority,
    review: Review,
    pods_on_node: PodsOnNode,
    *,
    started: Callable[[ControlServer], None] | None = None,
) -> None:
    """Serve until cancelled. ``started`` is called once the ports are open (`ControlServer.ports`, ``counters``).

    The caller owns ``discovery`` and calls its `set_world`, from this event loop. Raises AmbientError if the
    server cannot listen.
    """
    server = ControlServer(settings, discovery, authority, review, pods_on_node)
    await server.start()
    try:
        if started is not None:
            started(server)
        await server.maintain()
    finally:
        await server.stop()
