"""A tunnel: one TCP connection with TLS in memory and HTTP/2 inside, shared by many streams.

Per turn of the loop one receive, one run of OpenSSL over whatever came, one pass of the codec; and at the
turn's end one TLS write for all streams that had something, emptied with one send. A tunnel whose peer does not
read keeps at most `BACKLOG_BYTES_MAX` of ciphertext and then takes nothing more from its streams.
"""

from __future__ import annotations

import errno
import ssl
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from ambient.model.identity import Identity
from ztunnel.core.floods import Shares
from ztunnel.core.frames import Code
from ztunnel.core.headers import Header
from ztunnel.core.http2 import CLIENT_LIMITS, SERVER_LIMITS, Connection, Role
from ztunnel.core.output import Output
from ztunnel.core.pool import PoolKey, Slot
from ztunnel.core.streams import Stream
from ztunnel.io.sockets import Connecting, Socket, address_text, stream_socket
from ztunnel.io.tls import Credential, TlsRefused, check_client, check_server

if TYPE_CHECKING:
    from ztunnel.io.pods import PodState
    from ztunnel.io.worker import Worker

HANDSHAKE_TIMEOUT_S: Final = 10.0
HANDSHAKES_MAX: Final = 1024
HANDSHAKES_OF_POD: Final = 512
HANDSHAKES_OF_PEER: Final = 128
TUNNELS_MAX: Final = 8192
TUNNELS_OF_PEER: Final = 1024
"""Of a peer's address: with 100 streams each far more than a pod has ports."""
BACKLOG_BYTES_MAX: Final = 256 * 1024
_RECORD_BYTES: Final = 16 * 1024


class Paused(Protocol):
    """A relay that waits until the tunnel takes bytes again."""

    def resume(self) -> None: ...


class Tunnel(ABC):
    """What client and server tunnels share. Subclasses implement `request` and `opened` and `ended`."""

    __slots__ = (
        "_backlog",
        "_incoming",
        "_outgoing",
        "_reading",
        "_tls",
        "_writing",
        "backlog_bytes",
        "closed",
        "connection",
        "fd",
        "local",
        "local_text",
        "peer",
        "peer_text",
        "pod",
        "remote",
        "scheduled",
        "sock",
        "waiting",
        "worker",
    )
    role: Role

    def __init__(self, worker: Worker, pod: PodState, sock: Socket) -> None:
        self.worker = worker
        self.pod = pod
        self.sock = sock
        self.fd = sock.fileno()
        self.connection: Connection | None = None
        self.peer: Identity | None = None
        self.local: tuple[str, int] = ("", 0)
        self.local_text = self.peer_text = ""
        """As the access log has them, of an open tunnel."""
        self.remote: tuple[str, int] = ("", 0)
        self.waiting: deque[Paused] = deque()
        """Relays that found the tunnel congested."""
        self.scheduled = False
        self.closed = False
        self._backlog: deque[memoryview] = deque()
        self.backlog_bytes = 0
        self._reading = False
        self._writing = False
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None

    # --- to be implemented ---------------------------------------------------------------------------------

    @abstractmethod
    def check_peer(self, tls: ssl.SSLObject) -> Identity:
        """Raises TlsRefused."""

    @abstractmethod
    def opened(self) -> None:
        """The handshake is done and ``connection`` exists."""

    @abstractmethod
    def ended(self, error: str, flags: str) -> None:
        """The tunnel is closed; its streams were told already."""

    @abstractmethod
    def request(self, stream: Stream, fields: list[Header]) -> None:
        """A server's request; see `ConnectionOwner`."""

    @abstractmethod
    def going_away(self) -> None:
        """The peer takes no new streams."""

    # --- handshake -----------------------------------------------------------------------------------------

    def handshake(self, context: ssl.SSLContext) -> None:
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=self.role is Role.SERVER)
        self.worker.expire(self, HANDSHAKE_TIMEOUT_S)
        self._reading = True
        self.worker.add_reader(self.fd, self._readable)
        self._step()

    def expired(self) -> None:
        self.close("the TLS handshake took too long", "TLS_FAILURE")

    def _step(self) -> None:
        assert self._tls is not None
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._send_ciphertext()
            return
        except (ssl.SSLError, OSError) as error:
            self._send_ciphertext()  # the alert
            self.close(f"TLS handshake: {_reason(error)}", "TLS_FAILURE")
            return
        try:
            self.peer = self.check_peer(self._tls)
        except TlsRefused as refused:
            self.worker.count("tls_refused")
            self.close(f"TLS: {refused}", "TLS_FAILURE")
            return
        self.local_text, self.peer_text = address_text(*self.local), str(self.peer)
        self.worker.keep(self)
        limits = SERVER_LIMITS if self.role is Role.SERVER else CLIENT_LIMITS
        self.connection = Connection(self.role, self, Output(self.worker.buffers), limits, self.worker.now())
        self.opened()
        self.schedule()
        if self._incoming.pending and not self.closed:
            self._decrypt()

    # --- receiving -----------------------------------------------------------------------------------------

    def _readable(self) -> None:
        scratch = self.worker.ciphertext
        try:
            count = self.sock.recv_into(scratch)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(f"tunnel: {_reason(error)}", "-")
            return
        if not count:
            self.close("the peer closed the tunnel", "-")
            return
        self._incoming.write(scratch[:count])
        if self.connection is None:
            self._step()
        else:
            self._decrypt()

    def _decrypt(self) -> None:
        tls, connection = self._tls, self.connection
        assert tls is not None and connection is not None
        incoming = self._incoming
        read: Callable[[int, memoryview], int] = tls.read  # type: ignore[assignment] # with a buffer: a count
        plain = self.worker.plaintext
        limit = len(plain) - _RECORD_BYTES
        now = self.worker.now()
        at = 0
        error = ""
        try:
            while incoming.pending:
                at += read(_RECORD_BYTES, plain[at:])
                if at > limit:
                    connection.receive(plain[:at], now)
                    at = 0
                    if self.closed:
                        return
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            error = "the peer closed the tunnel"
        except (ssl.SSLError, OSError) as fault:
            error = f"TLS: {_reason(fault)}"
        if at:
            connection.receive(plain[:at], now)
        if self.closed:
            return
        if connection.closed:
            self._end_of_connection()
        elif error:
            self.close(error, "TLS_FAILURE" if error.startswith("TLS") else "-")
        elif not self.scheduled and (connection.output.end or self._outgoing.pending):
            self.schedule()

    def _end_of_connection(self) -> None:
        """The codec put out its GOAWAY: say it and hang up."""
        assert self.connection is not None
        fault = self.connection.fault
        self.flush()
        if fault is not None:
            self.worker.count(f"http2_{fault[0].name.lower()}")
        self.close(f"HTTP/2: {fault[1]}" if fault else "closed", "-")

    # --- sending -------------------------------------------------------------------------------------------

    def schedule(self) -> None:
        """Flush at the end of this turn."""
        if not self.scheduled and not self.closed:
            self.scheduled = True
            self.worker.flush_later(self)

    def flush(self) -> None:
        """Encrypt what the streams have put out, and send it with one call."""
        self.scheduled = False
        connection = self.connection
        if self.closed or connection is None or self._tls is None:
            return
        output = connection.output
        try:
            while output.end and self.backlog_bytes < BACKLOG_BYTES_MAX:
                assert output.view is not None
                self._tls.write(output.view[: output.end])
                output.written()
        except (ssl.SSLError, OSError) as error:
            self.close(f"TLS: {_reason(error)}", "TLS_FAILURE")
            return
        self._send_ciphertext()

    def _send_ciphertext(self) -> None:
        if not self._outgoing.pending:
            return
        data = self._outgoing.read()
        if self._backlog:
            self._backlog.append(memoryview(data))
            self.backlog_bytes += len(data)
            return
        try:
            sent = self.sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self.close(f"tunnel: {_reason(error)}", "-")
            return
        if sent < len(data):
            self._backlog.append(memoryview(data)[sent:])
            self.backlog_bytes = len(data) - sent
            self._writing = True
            self.worker.add_writer(self.fd, self._writable)

    def _writable(self) -> None:
        backlog = self._backlog
        try:
            while backlog:
                sent = self.sock.send(backlog[0])
                self.backlog_bytes -= sent
                if sent < len(backlog[0]):
                    backlog[0] = backlog[0][sent:]
                    return
                backlog.popleft()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(f"tunnel: {_reason(error)}", "-")
            return
        self._writing = False
        self.worker.remove_writer(self.fd)
        self.flush()
        if not self.backlog_bytes:
            for _ in range(len(self.waiting)):
                self.waiting.popleft().resume()

    @property
    def congested(self) -> bool:
        """The peer does not read fast enough: take nothing from the streams."""
        return self.backlog_bytes > 0

    # --- the end -------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        connection = self.connection
        if connection is None or self.closed:
            return
        connection.tick(now)
        if connection.closed:
            self._end_of_connection()
        elif connection.output.end:
            self.schedule()

    def drain(self) -> None:
        """Say GOAWAY; open streams go on."""
        if self.connection is not None and not self.closed:
            self.connection.drain(self.worker.now())
            self.schedule()

    def shut(self, error: str) -> None:
        """Close in good order: GOAWAY, close_notify, FIN."""
        if self.connection is not None and not self.closed and not self.connection.closed:
            self.connection.close(Code.NO_ERROR, error)
            self.flush()
        if self._tls is not None and self.connection is not None and not self.closed:
            try:
                self._tls.unwrap()
            except (ssl.SSLError, OSError):
                pass  # it wrote close_notify and wants the peer's, which nobody waits for
            self._send_ciphertext()
        self.close(error, "-")

    def close(self, error: str, flags: str) -> None:
        """Close now; every stream's owner is told."""
        if self.closed:
            return
        self.closed = True
        self.worker.keep(self)
        self.worker.forget(self.fd)
        self.sock.close()
        self._backlog.clear()
        self.backlog_bytes = 0
        self.waiting.clear()
        if self.connection is not None:
            self.connection.abandon(Code.CANCEL)
            self.connection.output.late.clear()
            self.connection.output.written()
        self.ended(error, flags)


class TunnelUser(Protocol):
    """A connection that waits for a client tunnel."""

    def tunnel_ready(self, tunnel: ClientTunnel) -> None: ...

    def tunnel_failed(self, error: str, flags: str) -> None: ...


class ClientTunnel(Tunnel):
    """A tunnel this node opened, from a pod's namespace."""

    __slots__ = ("_connecting", "_credential", "_key", "_retired", "slot", "users")
    role = Role.CLIENT
    slot: Slot[ClientTunnel]

    def __init__(self, worker: Worker, pod: PodState, key: PoolKey, credential: Credential) -> None:
        worker.namespaces.enter(pod.netns)
        super().__init__(worker, pod, stream_socket(key.ip))
        self.remote = (key.ip, key.port)
        self._key = key
        self._credential = credential
        self._retired = False
        self.users: list[TunnelUser] = []
        """Who waits for it to open."""
        self._connecting: Connecting | None = Connecting(worker, self.sock, self._connected)
        pod.client_tunnels.add(self)
        worker.tunnels.add(self)

    def begin(self) -> None:
        if self._connecting is not None:
            self._connecting.begin(self._key.ip, self._key.port)

    def _connected(self, error: int) -> None:
        self._connecting = None
        if error:
            where = address_text(self._key.ip, self._key.port)
            hint = ": does a NetworkPolicy forbid port 15008?" if error == errno.ETIMEDOUT else ""
            self.close(f"connect to {where}: {errno.errorcode.get(error, error)}{hint}", "CONNECT")
            return
        local = self.sock.getsockname()
        self.local = (local[0], local[1])
        self.handshake(self._credential.client)

    def check_peer(self, tls: ssl.SSLObject) -> Identity:
        return check_server(tls, self._key.identities)

    def opened(self) -> None:
        assert self.connection is not None
        self.worker.pool.opened(self.slot, self.connection.peer_streams)
        users, self.users = self.users, []
        for user in users:
            user.tunnel_ready(self)

    def request(self, stream: Stream, fields: list[Header]) -> None:
        """Never: a client's connection refuses streams of the server's."""

    def going_away(self) -> None:
        self._retire()

    def _retire(self) -> None:
        self.worker.pool.retire(self.slot)
        connection = self.connection
        if connection is not None and not connection.streams and not self.closed:
            self.worker.soon(self._shut_idle)

    def _shut_idle(self) -> None:
        if self.connection is not None and not self.connection.streams:
            self.shut("the peer is going away")

    def released(self) -> None:
        """One stream less."""
        self.worker.pool.release(self.slot, self.worker.now())
        if self.slot.retired:
            self._retire()

    def ended(self, error: str, flags: str) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        self.worker.pool.retire(self.slot)
        self.pod.client_tunnels.discard(self)
        self.worker.tunnels.discard(self)
        users, self.users = self.users, []
        for user in users:
            user.tunnel_failed(error, flags)


class Places:
    """Room for the tunnels peers open, by pod and by peer: neither a peer that opens ever more nor a pod that cannot
    answer (without a certificate, say) takes it from others."""

    def __init__(self) -> None:
        self.of_pods = Shares(HANDSHAKES_MAX, HANDSHAKES_OF_POD)
        self.of_peers = Shares(HANDSHAKES_MAX, HANDSHAKES_OF_PEER)
        self.tunnels = Shares(TUNNELS_MAX, TUNNELS_OF_PEER)

    def take(self, pod: str, peer: str) -> Place | None:
        """A place for one tunnel from its accept to its end; None if there is none."""
        if not self.tunnels.enter(peer):
            return None
        if not self.of_peers.enter(peer):
            self.tunnels.leave(peer)
            return None
        if not self.of_pods.enter(pod):
            self.tunnels.leave(peer)
            self.of_peers.leave(peer)
            return None
        return Place(self, pod, peer)


class Place:
    """One tunnel's. Both calls may be repeated."""

    __slots__ = ("_peer", "_places", "_pod", "_shaking", "_taken")

    def __init__(self, places: Places, pod: str, peer: str) -> None:
        self._places = places
        self._pod = pod
        self._peer = peer
        self._shaking = True
        self._taken = True

    def shaken(self) -> None:
        """The handshake is over."""
        if self._shaking:
            self._shaking = False
            self._places.of_pods.leave(self._pod)
            self._places.of_peers.leave(self._peer)

    def give_back(self) -> None:
        self.shaken()
        if self._taken:
            self._taken = False
            self._places.tunnels.leave(self._peer)


class ServerTunnel(Tunnel):
    """A tunnel a peer opened to one of our pods. ``accept`` is given its requests."""

    __slots__ = ("_accept", "_credential", "_place")
    role = Role.SERVER

    def __init__(
        self,
        worker: Worker,
        pod: PodState,
        sock: Socket,
        credential: Credential,
        accept: Callable[[ServerTunnel, Stream, list[Header]], None],
        place: Place,
    ) -> None:
        super().__init__(worker, pod, sock)
        self._place = place
        self._credential = credential
        self._accept = accept
        pod.server_tunnels.add(self)
        worker.tunnels.add(self)

    def begin(self) -> None:
        self.handshake(self._credential.server)

    def check_peer(self, tls: ssl.SSLObject) -> Identity:
        return check_client(tls, self._credential.identity)

    def request(self, stream: Stream, fields: list[Header]) -> None:
        self._accept(self, stream, fields)

    def going_away(self) -> None:
        """Says nothing of the streams that this end takes."""

    def opened(self) -> None:
        self._place.shaken()

    def ended(self, error: str, flags: str) -> None:
        self._place.give_back()
        if self.connection is None:
            self.worker.count("handshakes_failed")
            self.worker.log("debug", f"{address_text(*self.remote)} -> {self.pod.pod.name}: {error}")
        self.pod.server_tunnels.discard(self)
        self.worker.tunnels.discard(self)


def _reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return error.reason or str(error)
    if isinstance(error, OSError) and error.errno:
        return errno.errorcode.get(error.errno, str(error))
    return str(error)
