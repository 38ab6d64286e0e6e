"""An HBONE client by other means: OpenSSL through Python's ssl, HTTP/2 by the h2 library. For what is not nice."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl

import h2.config
import h2.connection
import h2.events

from ztunnel.core.messages import Certificate


def client_context(certificate: Certificate | None, roots: bytes, alpn: tuple[str, ...] = ("h2",)) -> ssl.SSLContext:
    """TLS as a peer would have it; without a certificate if None."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=roots.decode())
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if certificate is not None:
        load(context, certificate)
    return context


def load(context: ssl.SSLContext, certificate: Certificate) -> None:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    try:
        os.write(fd, certificate.chain_pem + certificate.key_pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


class HboneClient:
    """A blocking client of one tunnel."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        sock.settimeout(10)
        self.tls = context.wrap_socket(sock)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.statuses: dict[int, int] = {}
        self.data: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.resets: dict[int, int] = {}
        self.goaway: int | None = None
        self.eof = False
        self.flush()

    def flush(self) -> None:
        data = self.h2.data_to_send()
        if data:
            self.tls.sendall(data)

    def connect(self, authority: str, *more: tuple[str, str], method: str = "CONNECT") -> int:
        stream = self.h2.get_next_available_stream_id()
        fields = [(":method", method), (":authority", authority), *more]
        if method != "CONNECT":
            fields[2:2] = [(":scheme", "https"), (":path", "/")]
        self.h2.send_headers(stream, fields)
        self.flush()
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        self.h2.send_data(stream, data, end_stream=end)
        self.flush()

    def read(self) -> bool:
        """Handle what comes next; False at the end of the connection."""
        try:
            data = self.tls.recv(1 << 16)
        except (ConnectionError, ssl.SSLError):
            data = b""
        if not data:
            self.eof = True
            return False
        for event in self.h2.receive_data(data):
            match event:
                case h2.events.ResponseReceived(stream_id=stream, headers=fields):
                    self.statuses[stream] = int(dict(fields)[":status"])
                case h2.events.DataReceived(stream_id=stream, data=part, flow_controlled_length=count):
                    self.data[stream] = self.data.get(stream, b"") + part
                    self.h2.acknowledge_received_data(count, stream)
                case h2.events.StreamEnded(stream_id=stream):
                    self.ended.add(stream)
                case h2.events.StreamReset(stream_id=stream, error_code=code):
                    self.resets[stream] = int(code)
                case h2.events.ConnectionTerminated(error_code=code):
                    self.goaway = int(code)
        with contextlib.suppress(OSError):
            self.flush()
        return True

    def status(self, stream: int) -> int:
        """The answer to a CONNECT; 0 if the tunnel ended or the stream was reset without one."""
        while stream not in self.statuses and stream not in self.resets and self.read():
            pass
        return self.statuses.get(stream, 0)

    def receive(self, stream: int, count: int) -> bytes:
        while len(self.data.get(stream, b"")) < count and stream not in self.ended | set(self.resets) and self.read():
            pass
        return self.data.get(stream, b"")

    def until_end(self) -> None:
        while self.read():
            pass

    def close(self) -> None:
        self.tls.close()
