"""A tunnel a peer opens to one of our pods, and how many of them there may be."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ambient.model.identity import Identity
from ztunnel.core.floods import Shares
from ztunnel.core.headers import Header
from ztunnel.core.http2 import Role
from ztunnel.core.streams import Stream
from ztunnel.io.sockets import Socket, address_text
from ztunnel.io.tls import Credential, check_client
from ztunnel.io.tunnel import Tunnel

if TYPE_CHECKING:
    from ztunnel.io.pods import PodState
    from ztunnel.io.worker import Worker

HANDSHAKES_MAX: Final = 1024
HANDSHAKES_OF_POD: Final = 512
HANDSHAKES_OF_PEER: Final = 128
TUNNELS_MAX: Final = 8192
TUNNELS_OF_PEER: Final = 1024
"""Of a peer's address: with 100 streams each far more than a pod has ports."""


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

    def outlived(self) -> None:
        connection = self.connection
        if connection is None or connection.streams or not connection.draining:
            self.drain()
        else:
            self.shut("the peer's certificate has expired")

    def opened(self) -> None:
        self._place.shaken()

    def ended(self, error: str, flags: str) -> None:
        self._place.give_back()
        if self.connection is None:
            self.worker.count("handshakes_failed")
            self.worker.log("debug", f"{address_text(*self.remote)} -> {self.pod.pod.name}: {error}")
        self.pod.server_tunnels.discard(self)
        self.worker.tunnels.discard(self)
