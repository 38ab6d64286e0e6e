"""Connections into a pod that stand in no flow and whose right is gone.

Every connection that the kernel authorized has an entry in `flows` as long as the sockets that made it live. A client
that makes its own packets can go on without the socket, and what an older layout let in is in an older map. So when a
destination takes rights away its sockets are looked at as well: a connection from another pod of this node, known by
its address, that was allowed before and is not now. What never was allowed is left alone: it stood before the pod was
in the mesh.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from ambient.datapath.entries import Rights
from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import TupleKey
from ambient.io import sock_diag
from ambient.model.address import parse_ip
from ambient.model.identity import Identity
from ambient.model.policy import Connection, Denied, evaluate

ENROLLED: Final = LAYOUT["WORKLOAD_ENROLLED"]
WAYPOINT: Final = LAYOUT["WORKLOAD_WAYPOINT"]
BYPASS: Final = LAYOUT["WORKLOAD_BYPASS"]
SYN_RECV: Final = 3


@dataclass(frozen=True, slots=True)
class Stray:
    """The server's end of a connection, by its addresses and SO_COOKIE."""

    key: TupleKey
    cookie: int
    reason: str


def why_lost(rights: Rights | None, source: Identity | None, key: TupleKey) -> str:
    """Why such a connection has no right; empty if it has. A pod that left the mesh keeps what stands."""
    if rights is None or not rights.flags & ENROLLED or rights.policies is None:
        return ""
    if rights.flags & WAYPOINT:
        return "its destination has a waypoint now"
    connection = Connection(source, parse_ip(key.remote), parse_ip(key.local), key.local_port)
    decided = evaluate(connection, rights.policies)
    if isinstance(decided, Denied):
        return f"policy {decided.policy}" if decided.policy else "no policy allows it"
    return ""


def find(
    diag: socket.socket | None,
    own: Collection[str],
    sources: Mapping[str, Identity | None],
    before: Rights,
    now: Rights,
    exempt_cgroups: Collection[int],
) -> Iterator[Stray]:
    """In the namespace of ``diag``, whose pod has the addresses ``own`` and listens on the port; ``sources`` are those
    of this node's other pods.

    ``exempt_cgroups`` are those of ztunnel and agent, which have their own ways. Raises OSError, PlatformFault.
    """
    if diag is None or now.flags & BYPASS or before.policies is None:
        return
    if (before.policies, before.flags & WAYPOINT) == (now.policies, now.flags & WAYPOINT):
        return
    ports = sock_diag.listening(diag)
    for found in sock_diag.dump(diag):
        if found.local_port not in ports or found.local not in own or found.remote not in sources:
            continue
        # A connection that is only being set up belongs to no cgroup yet.
        if found.cgroup in exempt_cgroups or not (found.cgroup or found.state == SYN_RECV):
            continue
        key = TupleKey(found.local, found.remote, found.local_port, found.remote_port)
        source = sources[found.remote]
        if (reason := why_lost(now, source, key)) and not why_lost(before, source, key):
            yield Stray(key, found.cookie, reason)
