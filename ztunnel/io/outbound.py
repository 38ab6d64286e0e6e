"""Connections a pod makes: from the capture listener to a tunnel, to plain TCP, or to a refusal."""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING

from ambient.errors import PlatformFault
from ztunnel.core import capture, hbone
from ztunnel.core.frames import Code
from ztunnel.core.headers import Header
from ztunnel.core.messages import Hop, Route
from ztunnel.core.pool import STREAMS_MAX, PoolKey
from ztunnel.core.streams import DISCARD
from ztunnel.io import sockets
from ztunnel.io.client_tunnel import ClientTunnel
from ztunnel.io.ledger import Account
from ztunnel.io.plain_relay import PlainRelay
from ztunnel.io.relay import StreamRelay
from ztunnel.io.sockets import Connecting, Socket, address_text
from ztunnel.io.tls import Credential

if TYPE_CHECKING:
    from ztunnel.io.pods import PodState
    from ztunnel.io.worker import Worker

_RETRIES = 3
ANSWER_S = 30.0
"""For the answer to a CONNECT: the peer has 12 s for its decision and 10 s for the application's."""


def accept(worker: Worker, pod: PodState, sock: Socket, peer: tuple[str, int]) -> None:
    """A connection on 15001 of the pod's namespace."""
    record = worker.kernel.redirect_of(sockets.cookie(sock))
    captured = capture.outbound(
        (record.original, record.original_port) if record is not None else None,
        (record.endpoint, record.endpoint_port) if record is not None else ("", 0),
        (record.client, record.client_port) if record is not None else peer,
        pod.pod.addresses,
    )
    if isinstance(captured, capture.Closed):
        worker.count(f"outbound_{captured.reason}")
        worker.log("debug", f"{pod.pod.name}: outbound connection closed: {captured.reason}")
        sockets.reset(sock)
        return
    OutboundRelay(worker, pod, sock, captured).begin()


def choose(route: Route, endpoint: str) -> Hop | None:
    """The hook's endpoint if it is among the hops, else one at random by weight."""
    hops = route.hops
    if endpoint:
        for hop in hops:
            if hop.endpoint == endpoint:
                return hop
    if len(hops) == 1:
        return hops[0]
    total = sum(max(0, hop.weight) for hop in hops)
    if not total:
        return hops[0] if hops else None
    at = random.random() * total
    for hop in hops:
        at -= max(0, hop.weight)
        if at < 0:
            return hop
    return hops[-1]


class OutboundRelay(StreamRelay):
    """A captured connection on its way to a stream, and then its relay."""

    __slots__ = ("_captured", "_hop", "_retries", "_route", "_user_of")

    def __init__(self, worker: Worker, pod: PodState, sock: Socket, captured: capture.Captured) -> None:
        account = Account(
            "source",
            pod.pod.uid,
            address_text(captured.client_ip, captured.client_port),
            address_text(captured.ip, captured.port),
            worker.now(),
        )
        account.original = account.destination_address
        super().__init__(worker, pod, account, outward=True)
        self.set_socket(sock)
        self._captured = captured
        self._route: Route | None = None
        self._hop: Hop | None = None
        self._retries = _RETRIES
        self._user_of: ClientTunnel | None = None

    def begin(self) -> None:
        captured = self._captured
        self.worker.link.route(self.pod.pod.uid, captured.ip, captured.port, self._routed)

    def _refuse(self, error: str, flags: str = "-", *, event: str = "failed") -> None:
        self.abort(error, flags=flags, event=event)

    def _routed(self, route: Route | None) -> None:
        if self.done:
            return
        account = self.account
        if route is None:
            self._refuse("not_synced: the control process did not answer")
            return
        account.service = route.service
        account.source_identity = route.identity
        if route.kind not in ("hbone", "tcp"):
            self.worker.count(f"refused_{route.reason or 'unknown'}")
            self._refuse(f"{route.reason}: {route.message}" if route.message else route.reason or "refused")
            return
        hop = choose(route, self._captured.endpoint)
        # A service may have endpoints of both kinds: a hop with an authority is a tunnel and needs to prove who it is.
        plain = hop is not None and not hop.authority and not hop.identities
        if hop is None or not (
            plain or (route.kind == "hbone" and hop.authority and hop.identities and route.identity)
        ):
            self._refuse("no_endpoint")
            return
        self._route, self._hop = route, hop
        account.protocol = "tcp" if plain else "hbone"
        account.destination = hop.destination
        if plain:
            self._go_plain(hop)
            return
        account.destination_address = hop.endpoint or hop.authority
        account.hbone_address = address_text(hop.ip, hop.port)
        account.destination_identity = hop.identities[0] if len(hop.identities) == 1 else ""
        self._checkout()

    # --- plain TCP -----------------------------------------------------------------------------------------

    def _go_plain(self, hop: Hop) -> None:
        assert self.sock is not None
        sock, self.sock = self.sock, None
        self.done = True
        self.pod.relays.discard(self)
        self.account.destination_address = address_text(hop.ip, hop.port)
        OutboundPlain(self.worker, self.pod, self.account, sock).begin(hop.ip, hop.port)

    # --- tunnel --------------------------------------------------------------------------------------------

    def _checkout(self) -> None:
        route, hop = self._route, self._hop
        assert route is not None and hop is not None
        key = PoolKey(route.identity, hop.identities, hop.ip, hop.port, self.pod.pod.uid)
        slot = self.worker.pool.checkout(key)
        if slot is None:
            self.worker.link.credential(route.identity, lambda credential: self._create(key, credential))
        elif slot.connecting:
            self._user_of = slot.handle
            slot.handle.users.append(self)
        else:
            self._user_of = slot.handle
            self.tunnel_ready(slot.handle)

    def _create(self, key: PoolKey, credential: Credential | None) -> None:
        if self.done:
            return
        if credential is None:
            self._refuse(f"no certificate for {key.source}", "IDENTITY_ERROR")
            return
        slot = self.worker.pool.checkout(key)  # somebody else may have created one while we waited
        if slot is not None:
            self._user_of = slot.handle
            if slot.connecting:
                slot.handle.users.append(self)
            else:
                self.tunnel_ready(slot.handle)
            return
        try:
            tunnel = ClientTunnel(self.worker, self.pod, key, credential)
        except (OSError, PlatformFault) as error:
            self._refuse(f"tunnel: {error}", "CONNECT")
            return
        tunnel.slot = self.worker.pool.add(key, tunnel, self.worker.now())
        self._user_of = tunnel
        tunnel.users.append(self)
        tunnel.begin()

    def tunnel_ready(self, tunnel: ClientTunnel) -> None:
        if self.done:
            return
        connection = tunnel.connection
        if (
            connection is None
            or tunnel.closed
            or connection.closed
            or connection.peer_going_away
            or connection.exhausted
        ):
            self.worker.pool.retire(tunnel.slot)
            self.released()
            self._again("the tunnel is going away")
            return
        tunnel.slot.limit = max(1, min(STREAMS_MAX, connection.peer_streams))
        if not connection.can_open or len(connection.streams) >= tunnel.slot.limit:
            self.released()
            if connection.streams:  # others of a burst were before us: that is no failed attempt
                self._checkout()
            else:
                self._again("the tunnel takes no more streams")
            return
        hop, route = self._hop, self._route
        assert hop is not None and route is not None
        block = self.worker.requests.block(
            hop.authority, route.baggage, self.account.source_address, random.getrandbits(192)
        )
        self.account.destination_identity = tunnel.peer_text
        self.set_stream(tunnel, connection.open(self, block))
        self.worker.expire(self, ANSWER_S)
        tunnel.schedule()

    def tunnel_failed(self, error: str, flags: str) -> None:
        self._user_of = None
        if not self.done:
            self._refuse(error, flags)

    def expired(self) -> None:
        """The application may be gone by now, and nobody would notice."""
        self.worker.count("answers_late")
        self._refuse("the peer did not answer in time", "CONNECT")

    def _again(self, error: str) -> None:
        if self._retries:
            self._retries -= 1
            self._checkout()
        else:
            self._refuse(error, "CONNECT")

    def stream_headers(self, fields: list[Header]) -> None:
        self.worker.keep(self)
        status = hbone.read_status(fields)
        if status == hbone.OK:
            self.start()
            return
        self.worker.count(f"connect_{status}")
        self._refuse(f"http status: {status}", "DENY" if status == hbone.DENIED else "CONNECT")

    def stream_reset(self, code: int) -> None:
        if not self.account.number and not self.done:  # no answer yet, so nothing of the application was sent
            assert self.stream is not None
            self.stream.owner = DISCARD
            self.stream = None
            self.released()
            if code == Code.REFUSED_STREAM or (self.tunnel is not None and self.tunnel.closed):
                self._again("the peer refused the stream")
            else:
                self._refuse(f"the peer reset the stream: {code}", "CONNECT")
            return
        super().stream_reset(code)

    def released(self) -> None:
        self.worker.keep(self)
        tunnel, self._user_of = self._user_of, None
        if tunnel is not None:
            if self in tunnel.users:
                tunnel.users.remove(self)
            tunnel.released()


class OutboundPlain(PlainRelay):
    """A captured connection to a destination outside the mesh."""

    __slots__ = ("_connecting",)

    def begin(self, ip: str, port: int) -> None:
        self._connecting: Connecting | None = None
        try:
            self.worker.namespaces.enter(self.pod.netns)
            self.far = sockets.stream_socket(ip)
        except (OSError, PlatformFault) as error:
            self.abort(f"socket: {error}", flags="CONNECT", event="failed")
            return
        self._connecting = Connecting(self.worker, self.far, self._connected)
        self._connecting.begin(ip, port)

    def _connected(self, error: int) -> None:
        self._connecting = None
        if self.done:
            return
        if error:
            self.abort(f"connect: {errno.errorcode.get(error, error)}", flags="CONNECT", event="failed")
        else:
            self.start()

    def released(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
