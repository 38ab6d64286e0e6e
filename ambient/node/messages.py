"""What holder, agent and ztunnel say to each other over the holder's unix socket.

``RUN_DIR/holder.sock`` is SOCK_SEQPACKET; a message is one packet, a msgpack-encoded tagged struct, and
descriptors travel beside it (SCM_RIGHTS) in the order of the message's ``fds`` names. The same messages
go on from ztunnel's parent to its workers and its control process.

    agent   -> holder    Hello, PodPut, PodRemove
    holder  -> agent     PodPut ... SnapshotSent (what it holds, after Hello), Ack, ReturnPods
    ztunnel -> holder    Hello, PodPut (only as the answer to ReturnPods), Ack
    holder  -> ztunnel   PodPut ... SnapshotSent, then PodPut and PodRemove as they come, ReturnPods

Every PodPut and PodRemove is answered by one Ack. A new holder that holds less than a client says it has
(Hello.holds) asks for it with ReturnPods: that is how listeners survive the holder.
"""

from __future__ import annotations

from typing import Final

import msgspec

VERSION: Final = 1
MESSAGE_BYTES_MAX: Final = 16384
FDS_MAX: Final = 16

NETNS: Final = "netns"
LISTENERS: Final = (
    "outbound4",
    "outbound6",
    "plaintext4",
    "plaintext6",
    "hbone4",
    "hbone6",
    "dns_udp4",
    "dns_udp6",
    "dns_tcp4",
    "dns_tcp6",
)
"""Names of listening sockets; the IPv6 ones are absent where the pod's namespace has no IPv6."""


class Pod(msgspec.Struct, frozen=True, kw_only=True):
    """An enrolled pod as its node knows it. ``uid`` is the Kubernetes UID, ``workload_uid`` the WDS one."""

    uid: str
    workload_uid: str
    name: str
    namespace: str
    service_account: str
    trust_domain: str
    addresses: tuple[str, ...]
    netns_cookie: int
    workload: int
    """The node-local number in the kernel maps."""


class Hello(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    role: str
    """agent or ztunnel"""
    version: int = VERSION
    pid: int
    holds: tuple[str, ...] = ()
    """Pod UIDs whose descriptors the client has."""


class PodPut(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    pod: Pod
    fds: tuple[str, ...]
    """`NETNS` first, then names out of `LISTENERS`; one descriptor each, in this order."""


class PodRemove(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    uid: str
    drain_s: float
    """Connections of the pod may finish for so long; 0: the pod is gone, close at once."""


class SnapshotSent(msgspec.Struct, frozen=True, tag=True):
    pass


class ReturnPods(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    uids: tuple[str, ...]


class Ack(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    uid: str
    error: str = ""


Message = Hello | PodPut | PodRemove | SnapshotSent | ReturnPods | Ack
