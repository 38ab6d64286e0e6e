"""The pods of this node as a worker sees them: their namespaces, listeners and open connections."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from ambient.errors import AmbientError
from ambient.model.address import parse_ip
from ambient.model.identity import Identity
from ambient.node.messages import NETNS, Pod
from ztunnel.core.drain import Drain, Phase
from ztunnel.io import inbound, outbound, sockets
from ztunnel.io.client_tunnel import ClientTunnel
from ztunnel.io.relay import Relay
from ztunnel.io.server_tunnel import ServerTunnel
from ztunnel.io.sockets import Socket
from ztunnel.io.time_wait import Lingering

if TYPE_CHECKING:
    from ztunnel.io.worker import Worker

Accept = Callable[["Worker", "PodState", Socket, tuple[str, int]], None]

_ACCEPT: Final[dict[str, Accept]] = {
    "outbound4": outbound.accept,
    "outbound6": outbound.accept,
    "plaintext4": inbound.accept_plaintext,
    "plaintext6": inbound.accept_plaintext,
    "hbone4": inbound.accept_tunnel,
    "hbone6": inbound.accept_tunnel,
}
_PER_TURN: Final = 64
_FULL_PAUSE_S: Final = 0.2
_NO_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_TRANSIENT: Final = (
    errno.ECONNABORTED,
    errno.EINTR,
    errno.EPERM,
    errno.EPROTO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENONET,
    errno.ENOPROTOOPT,
    errno.EOPNOTSUPP,
)
"""accept(2): errors of the connection that was to be accepted, not of the listener."""


class Listener:
    """One listening socket, shared with the holder and other workers: closing our copy closes nobody else's."""

    __slots__ = ("_accept", "_active", "_fd", "_pod", "_sock", "_worker", "name")

    def __init__(self, worker: Worker, pod: PodState, name: str, fd: int) -> None:
        self.name = name
        self._worker = worker
        self._pod = pod
        self._fd = fd
        self._sock = Socket(fileno=fd)
        self._sock.setblocking(False)
        self._accept = _ACCEPT[name]
        if self._accept is outbound.accept:
            sockets.tune_local(self._sock)
        else:
            sockets.tune(self._sock)
        self._active = False

    def start(self) -> None:
        if not self._active and self._fd >= 0:
            self._active = True
            self._worker.add_reader(self._fd, self._readable)

    def stop(self) -> None:
        if self._active:
            self._active = False
            self._worker.remove_reader(self._fd)

    def close(self) -> None:
        self.stop()
        if self._fd >= 0:
            self._fd = -1
            self._sock.close()

    def _readable(self) -> None:
        for _ in range(_PER_TURN):
            try:
                fd, address = self._sock._accept()  # type: ignore[attr-defined]
            except BlockingIOError:
                return
            except OSError as error:
                self._refused(error)
                return
            sock = Socket(self._sock.family, socket.SOCK_STREAM, 0, fd)
            sock.setblocking(False)
            if self._pod.full():
                sockets.reset(sock)
                continue
            try:
                self._accept(self._worker, self._pod, sock, sockets.plain_address(address))
            except OSError as error:  # the peer was faster than we: ENOTCONN and the like
                self._worker.count("accept_failed")
                self._worker.log("debug", f"{self._pod.pod.name} {self.name}: {error}")
                sock.close()
            if not self._active:
                return

    def _refused(self, error: OSError) -> None:
        if error.errno in _TRANSIENT:
            return
        if error.errno in _NO_ROOM:
            self._worker.count("accept_no_room")
            self._worker.log("error", f"{self._pod.pod.name} {self.name}: accept: {error}: raise the limit of files")
            self.stop()
            self._worker.later(_FULL_PAUSE_S, self.start)
            return
        # EINVAL after shutdown(): the agent took the listener away. EBADF, ENOTSOCK: not a listener at all.
        self._worker.count("listeners_lost")
        self._worker.log("warn", f"{self._pod.pod.name} {self.name}: accept: {error}: listener dropped")
        self.close()


def _canonical(pod: Pod) -> Pod:
    """Addresses as sockets tell them. Raises ValueError."""
    return msgspec.structs.replace(pod, addresses=tuple(str(parse_ip(address)) for address in pod.addresses))


class PodState:
    """One enrolled pod. Owns its descriptors."""

    def __init__(self, worker: Worker, pod: Pod, fds: dict[str, int]) -> None:
        self.worker = worker
        self.pod = _canonical(pod)
        self.netns = fds.pop(NETNS, -1)
        self.identity = str(Identity(pod.trust_domain, pod.namespace, pod.service_account))
        self.relays: set[Relay] = set()
        self.server_tunnels: set[ServerTunnel] = set()
        self.client_tunnels: set[ClientTunnel] = set()
        self.drain = Drain()
        self.gone = False
        self.listeners: list[Listener] = []
        self._lingering: Lingering | None = None
        self._listen(fds)

    def _listen(self, fds: dict[str, int]) -> None:
        for name, fd in fds.items():
            if name in _ACCEPT:
                self.listeners.append(Listener(self.worker, self, name, fd))
            else:
                os.close(fd)  # DNS is the control process's

    def renew(self, pod: Pod, fds: dict[str, int]) -> bool:
        """The same pod came again, perhaps with other listeners, perhaps while it drains: its connections go on.
        False, with nothing done, if it is somebody else by the same UID, or in another sandbox: tunnels out of the
        earlier one would go on showing its address."""
        if self.gone or self.identity != str(Identity(pod.trust_domain, pod.namespace, pod.service_account)):
            return False
        if pod.netns_cookie != self.pod.netns_cookie:
            return False
        self.pod = _canonical(pod)
        for listener in self.listeners:
            listener.close()
        self.listeners.clear()
        self._leave_namespace()
        self.netns = fds.pop(NETNS, -1)
        self.drain = Drain()
        self._listen(fds)
        self.start()
        return True

    def start(self) -> None:
        for listener in self.listeners:
            listener.start()

    def begin_drain(self, now: float, grace_s: float) -> None:
        """Accept nothing new; what is open may finish."""
        for listener in self.listeners:
            listener.close()
        self.listeners.clear()
        self.drain.begin(now, grace_s)
        for tunnel in list(self.server_tunnels):
            tunnel.drain()

    def full(self) -> bool:
        """Whether it has its share of this process's descriptors; counted."""
        if len(self.relays) < self.worker.relays_of_pod:
            return False
        self.worker.count("pod_share_exceeded")
        return True

    def tick(self, now: float) -> bool:
        """Whether the pod's drain has ended; then everything of it is closed."""
        if self.drain.phase(now, len(self.relays)) is not Phase.ENDED:
            return False
        self.close("the pod left")
        return True

    def close(self, error: str) -> None:
        if self.gone:
            return
        self.gone = True
        for listener in self.listeners:
            listener.close()
        for relay in list(self.relays):
            relay.abort(error)
        for tunnel in [*self.server_tunnels, *self.client_tunnels]:
            tunnel.shut(error)
        self._leave_namespace()

    def lingers(self, ip: str, local_port: int, port: int, cookie: int) -> None:
        """A delivery of this socket is over and was ended by us first."""
        if self.gone:
            return
        lingering = self._lingering
        if lingering is None:
            try:
                self.worker.namespaces.enter(self.netns)
                lingering = self._lingering = Lingering()
            except (OSError, AmbientError):
                return  # its port comes back by itself, in a minute
        able = not lingering.unable
        lingering.ended(ip, local_port, port, cookie, self.worker.now())
        if able and lingering.unable:
            self.worker.count("ports_not_given_back")
            self.worker.log(
                "warn",
                f"{self.pod.name}: ports of ended connections stay taken for a minute ({lingering.unable}):"
                " CAP_NET_ADMIN and a kernel with INET_DIAG_DESTROY are needed for more than 470 a second",
            )

    def _leave_namespace(self) -> None:
        if self._lingering is not None:
            self._lingering.close()
            self._lingering = None
        self.worker.namespaces.leave(self.netns)
        if self.netns >= 0:
            os.close(self.netns)
            self.netns = -1
