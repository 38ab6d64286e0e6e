"""Connections into a pod: tunnel streams and captured plaintext, judged and delivered.

Delivery is a connection made inside the pod's namespace from (pod address, any port) to the application. The
kernel is told beforehand that this exact 4-tuple is ours and whose address the application shall see; if it
cannot be told, nothing is delivered.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from ambient.datapath.values import Admission
from ambient.errors import AmbientError
from ztunnel.core import capture, hbone
from ztunnel.core.decisions import Decision
from ztunnel.core.frames import Code
from ztunnel.core.headers import Header
from ztunnel.core.streams import DISCARD, Stream
from ztunnel.io import sockets
from ztunnel.io.ledger import Account
from ztunnel.io.plain_relay import Half, PlainRelay
from ztunnel.io.relay import StreamRelay
from ztunnel.io.server_tunnel import ServerTunnel
from ztunnel.io.sockets import Connecting, Socket, address_text
from ztunnel.io.tls import Credential

if TYPE_CHECKING:
    from ztunnel.io.pods import PodState
    from ztunnel.io.worker import Worker

PORTS_TRIED_MAX = 16
"""Of one delivery, before it is refused."""


class Delivery:
    """One connection into a pod. ``done(error)`` is called once; then ``sock`` is connected or closed."""

    __slots__ = (
        "_admission",
        "_connecting",
        "_cookie",
        "_done",
        "_ip",
        "_local_port",
        "_pod",
        "_port",
        "_worker",
        "sock",
    )

    def __init__(self, worker: Worker, pod: PodState, ip: str, port: int, done: _Done) -> None:
        self._worker = worker
        self._pod = pod
        self._ip = ip
        self._port = port
        self._local_port = 0
        self._admission: Admission | None = None
        self._cookie = 0
        self._done = done
        self._connecting: Connecting | None = None
        self.sock: Socket | None = None

    def begin(self, client_ip: str, client_port: int) -> None:
        worker = self._worker
        taken: list[Socket] = []
        try:
            worker.namespaces.enter(self._pod.netns)
            while not self._take_port(client_ip, client_port, last=len(taken) == PORTS_TRIED_MAX - 1):
                if self.sock is not None:
                    taken.append(self.sock)  # stays bound, so that the next port is another one
                    self.sock = None
        except (OSError, AmbientError, ValueError) as fault:
            worker.count("delivery_refused")
            self._fail(f"delivery to {self._pod.pod.name}: {fault}")
            return
        finally:
            for sock in taken:
                sock.close()
        assert self.sock is not None
        error = sockets.connect(self.sock, self._ip, self._port)
        if error == errno.EINPROGRESS:
            self._connecting = Connecting(worker, self.sock, self._connected)
            self._connecting.wait()
        else:
            self._connected(error)

    def _take_port(self, client_ip: str, client_port: int, *, last: bool) -> bool:
        """False if the application still has a connection with the port that was found: its entry is not ours to
        replace, or that connection would be shown another client."""
        worker = self._worker
        self.sock = sockets.local_socket(self._ip)
        self.sock.bind((self._ip, 0))
        self._local_port = self.sock.getsockname()[1]
        pod = self._pod.pod
        ends = self._ip, self._port, self._ip, self._local_port
        self._admission = Admission(*ends, pod.workload, 0, client_ip, client_port, pod.netns_cookie)
        try:
            worker.kernel.authorize_delivery(self._admission)
        except AmbientError as error:
            if last or getattr(error, "errno", 0) != errno.EEXIST:
                raise
            worker.count("delivery_port_taken")
            return False
        worker.delivering.add((self._ip, self._local_port))
        return True

    def _connected(self, error: int) -> None:
        self._connecting = None
        if not error:
            self._done("")
            return
        self._withdraw()
        self._fail(f"connect to {address_text(self._ip, self._port)}: {errno.errorcode.get(error, error)}")

    def ends_first(self) -> None:
        """Our FIN goes out before the application's: the connection will linger at our end."""
        if self.sock is not None:
            self._cookie = sockets.cookie(self.sock)

    def ended(self) -> None:
        """The connection is over."""
        self._worker.delivering.discard((self._ip, self._local_port))
        if self._cookie:
            self._pod.lingers(self._ip, self._local_port, self._port, self._cookie)
            self._cookie = 0

    def _fail(self, error: str) -> None:
        self.ended()
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        self._done(error)

    def _withdraw(self) -> None:
        try:
            if self._admission is not None:
                self._worker.kernel.withdraw_delivery(self._admission)
        except AmbientError as error:
            self._worker.log("error", f"withdraw a delivery: {error}")

    def cancel(self) -> None:
        """The connection is not wanted any more; ``done`` is not called."""
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
            self._withdraw()
            if self.sock is not None:
                self.sock.close()
                self.sock = None
        self.ended()


if TYPE_CHECKING:
    from collections.abc import Callable

    _Done = Callable[[str], None]


def accept_tunnel(worker: Worker, pod: PodState, sock: Socket, peer: tuple[str, int]) -> None:
    """A connection on 15008 of the pod's namespace."""
    local = sockets.plain_address(sock.getsockname())
    if local[0] not in pod.pod.addresses:
        worker.count("hbone_not_local")
        sockets.reset(sock)
        return
    place = worker.places.take(pod.pod.uid, peer[0])
    if place is None:
        worker.count("tunnels_refused")
        sockets.reset(sock)
        return

    def with_credential(credential: Credential | None) -> None:
        if credential is None or pod.gone:
            place.give_back()
            worker.count("no_certificate")
            sockets.reset(sock)
            return
        tunnel = ServerTunnel(worker, pod, sock, credential, accept_stream, place)
        tunnel.local, tunnel.remote = local, peer
        tunnel.begin()

    worker.link.credential(pod.identity, with_credential)


def accept_stream(tunnel: ServerTunnel, stream: Stream, fields: list[Header]) -> None:
    """A request on a tunnel."""
    worker, pod = tunnel.worker, tunnel.pod
    request = hbone.read_connect(fields, tunnel.local[0], worker.authorities)
    if isinstance(request, hbone.Refused):
        worker.count(f"answered_{request.status}")
        worker.log("info", f"{tunnel.peer} -> {pod.pod.name}: {request.status}: {request.reason}")
        answer(tunnel, stream, request.status)
        return
    if pod.full():
        answer(tunnel, stream, hbone.UNAVAILABLE)
        return
    InboundRelay(worker, tunnel, stream, request).begin()


def answer(tunnel: ServerTunnel, stream: Stream, status: int) -> None:
    """A refusal: the status, the end, and no more of the peer's bytes."""
    connection = tunnel.connection
    if connection is None or stream.dead:
        return
    connection.respond(stream, hbone.response(status), end_stream=True)
    stream.owner = DISCARD
    connection.reset(stream, Code.NO_ERROR)
    tunnel.schedule()


class InboundRelay(StreamRelay):
    """A stream on its way to an application, and then its relay."""

    __slots__ = ("_client", "_delivery", "_key", "_request", "_source_ip")

    def __init__(self, worker: Worker, tunnel: ServerTunnel, stream: Stream, request: hbone.Connect) -> None:
        pod = tunnel.pod
        # The port is only shown to the application; the address is the tunnel's own and never the peer's claim.
        port = request.client_port if request.client_ip == tunnel.remote[0] else tunnel.remote[1]
        self._client = (tunnel.remote[0], port)
        account = Account(
            "destination",
            pod.pod.uid,
            address_text(*self._client),
            address_text(request.ip, request.port),
            worker.now(),
        )
        account.protocol = "hbone"
        account.source_identity = tunnel.peer_text
        account.destination_identity = pod.identity
        account.hbone_address = tunnel.local_text
        super().__init__(worker, pod, account, outward=False)
        self._request = request
        self._source_ip = tunnel.remote[0]
        self._key = (pod.pod.uid, request.ip, request.port, account.source_identity)
        self._delivery: Delivery | None = None
        self.set_stream(tunnel, stream)
        stream.owner = self

    def begin(self) -> None:
        self.worker.link.verdict(self._key, self._source_ip, self._judged)

    def _judged(self, decision: Decision | None) -> None:
        if self.done:
            return
        if decision is None:
            self._answer(hbone.UNAVAILABLE, "failed", "not_synced: the control process did not answer")
            return
        verdict = decision.verdict
        if not verdict.allow:
            self.worker.count(f"denied_{verdict.reason or 'policy'}")
            self._answer(hbone.DENIED, "denied", verdict.reason or "policy", policy=verdict.policy, flags="DENY")
            return
        if not self.worker.link.decisions.hold(self._key, self._source_ip, self):
            self._answer(hbone.UNAVAILABLE, "failed", "not_synced: the decision could not be kept")
            return
        self._delivery = Delivery(self.worker, self.pod, self._request.ip, self._request.port, self._delivered)
        self._delivery.begin(*self._client)

    def _shut_socket(self) -> None:
        if self._delivery is not None and not self._sock_eof:
            self._delivery.ends_first()
        super()._shut_socket()

    def _delivered(self, error: str) -> None:
        delivery = self._delivery
        if error or delivery is None or delivery.sock is None:
            self._answer(hbone.UNAVAILABLE, "failed", error, flags="CONNECT")
            return
        self.set_socket(delivery.sock)
        if self._connection is not None and self.stream is not None and self.tunnel is not None:
            self._connection.respond(self.stream, hbone.response(hbone.OK))
            self.tunnel.schedule()
        self.start()

    def _answer(self, status: int, event: str, error: str, *, policy: str = "", flags: str = "-") -> None:
        stream, tunnel = self.stream, self.tunnel
        if stream is not None and isinstance(tunnel, ServerTunnel):
            self.worker.count(f"answered_{status}")
            answer(tunnel, stream, status)
        self.abort(error, flags=flags, policy=policy, event=event)

    def released(self) -> None:
        self.worker.link.decisions.release(self._key, self._source_ip, self)
        if self._delivery is not None:
            self._delivery.cancel()


def accept_plaintext(worker: Worker, pod: PodState, sock: Socket, peer: tuple[str, int]) -> None:
    """A connection that was steered to 15006 of the pod's namespace."""
    if peer in worker.delivering:  # the kernel did not know our own delivery (any more)
        worker.count("plaintext_loop")
        sockets.reset(sock)
        return
    captured = capture.plaintext(sockets.plain_address(sock.getsockname()), peer, pod.pod.addresses)
    if isinstance(captured, capture.Closed):
        worker.count(f"plaintext_{captured.reason}")
        sockets.reset(sock)
        return
    PlaintextRelay(worker, pod, sock, captured).begin()


class PlaintextRelay(PlainRelay):
    """A connection from outside the mesh into a pod."""

    __slots__ = ("_captured", "_delivery", "_key")

    def __init__(self, worker: Worker, pod: PodState, sock: Socket, captured: capture.Captured) -> None:
        account = Account(
            "destination",
            pod.pod.uid,
            address_text(captured.client_ip, captured.client_port),
            address_text(captured.ip, captured.port),
            worker.now(),
        )
        account.protocol = "tcp"
        account.destination_identity = pod.identity
        super().__init__(worker, pod, account, sock)
        self._captured = captured
        self._key = (pod.pod.uid, captured.ip, captured.port, "")
        self._delivery: Delivery | None = None

    def begin(self) -> None:
        self.worker.link.verdict(self._key, self._captured.client_ip, self._judged)

    def _judged(self, decision: Decision | None) -> None:
        if self.done:
            return
        if decision is None:
            self.abort("not_synced: the control process did not answer", event="failed")
            return
        verdict = decision.verdict
        if not verdict.allow:
            self.worker.count(f"denied_{verdict.reason or 'policy'}")
            self.abort(verdict.reason or "policy", flags="DENY", policy=verdict.policy, event="denied")
            return
        captured = self._captured
        if not self.worker.link.decisions.hold(self._key, captured.client_ip, self):
            self.abort("not_synced: the decision could not be kept", event="failed")
            return
        self._delivery = Delivery(self.worker, self.pod, captured.ip, captured.port, self._delivered)
        self._delivery.begin(captured.client_ip, captured.client_port)

    def _shut(self, half: Half, target: Socket) -> None:
        if self._delivery is not None and target is self.far and not self._backward.eof:
            self._delivery.ends_first()
        super()._shut(half, target)

    def _delivered(self, error: str) -> None:
        delivery = self._delivery
        if error or delivery is None or delivery.sock is None:
            self.abort(error, flags="CONNECT", event="failed")
            return
        self.far = delivery.sock
        self.start()

    def released(self) -> None:
        self.worker.link.decisions.release(self._key, self._captured.client_ip, self)
        if self._delivery is not None:
            self._delivery.cancel()
