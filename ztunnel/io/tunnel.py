"""A tunnel: one TCP connection with TLS in memory and HTTP/2 inside, shared by many streams.

Per turn of the loop one receive, one run of OpenSSL over whatever came, one pass of the codec; and at the
turn's end one TLS write for all streams that had something, emptied with one send. A tunnel whose peer does not
read keeps at most `BACKLOG_BYTES_MAX` of ciphertext and then takes nothing more from its streams.
"""

from __future__ import annotations

import errno
import ssl
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from ambient.model.identity import Identity
from ztunnel.core.frames import Code
from ztunnel.core.headers import Header
from ztunnel.core.http2 import CLIENT_LIMITS, SERVER_LIMITS, Connection, Role
from ztunnel.core.output import Output
from ztunnel.core.streams import Stream
from ztunnel.io.sockets import Socket, address_text
from ztunnel.io.tls import TlsRefused, peer_expiry

if TYPE_CHECKING:
    from ztunnel.io.pods import PodState
    from ztunnel.io.worker import Worker

HANDSHAKE_TIMEOUT_S: Final = 10.0
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
        "expires_at",
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
        self.expires_at = 0.0
        """When the peer's certificate does, in seconds since the epoch."""
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

    @abstractmethod
    def outlived(self) -> None:
        """Told each second: the peer's certificate has expired, so it has no right to a new stream."""

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
            self.peer, self.expires_at = self.check_peer(self._tls), peer_expiry(self._tls)
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
            return
        if time.time() >= self.expires_at:
            self.outlived()
        if connection.output.end:
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


def _reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return error.reason or str(error)
    if isinstance(error, OSError) and error.errno:
        return errno.errorcode.get(error.errno, str(error))
    return str(error)
