"""A tunnel this node opens for a pod, to be shared by the pod's connections to the same peer."""

from __future__ import annotations

import errno
import ssl
from typing import TYPE_CHECKING, Protocol

from ambient.model.identity import Identity
from ztunnel.core.headers import Header
from ztunnel.core.http2 import Role
from ztunnel.core.pool import PoolKey, Slot
from ztunnel.core.streams import Stream
from ztunnel.io.sockets import Connecting, address_text, stream_socket
from ztunnel.io.tls import Credential, check_server
from ztunnel.io.tunnel import Tunnel

if TYPE_CHECKING:
    from ztunnel.io.pods import PodState
    from ztunnel.io.worker import Worker


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

    def outlived(self) -> None:
        self._retire()

    def _retire(self) -> None:
        self.worker.pool.retire(self.slot)
        connection = self.connection
        if connection is not None and not connection.streams and not self.closed:
            self.worker.soon(self._shut_idle)

    def _shut_idle(self) -> None:
        if self.connection is not None and not self.connection.streams:
            self.shut("the peer is going away, or its certificate has expired")

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
