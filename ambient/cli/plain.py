"""Connections of enrolled pods that the mesh leaves alone, for `ambient flows`: found by their sockets.

No map has an entry for them, so the kernel is asked for the TCP sockets of each enrolled pod's namespace, and what is
somebody else's is taken away: loopback (which includes what is captured), sockets of ztunnel, flows of the kernel path.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ambient.datapath import decide
from ambient.datapath.explain import SETTINGS_MISSING
from ambient.datapath.render import Names, socket_text
from ambient.datapath.values import EnrolledValue, ServiceKey, reason_name
from ambient.errors import PlatformFault
from ambient.io import cgroup, sock_diag
from ambient.io.bpf_maps import Maps
from ambient.io.sock_diag import TcpSocket

Row = dict[str, Any]
_STATES: Final = {1: "open", 2: "connecting", 3: "handshake"}
_HANDSHAKE: Final = 3
LEFT_ALONE: Final = ("not_mesh", "bypass")


@dataclass(frozen=True, slots=True)
class Pod:
    """An enrolled pod and the ports it listens on."""

    name: str
    enrolled: EnrolledValue
    listening: Collection[int]

    @property
    def addresses(self) -> tuple[str, str]:
        return self.enrolled.address4, self.enrolled.address6


def is_accepted(pod: Pod, found: TcpSocket) -> bool:
    """Whether the connection came in: its port is one somebody listens on."""
    return found.local_port in pod.listening


def is_plain(pod: Pod, found: TcpSocket, flows: Collection[int], of_the_mesh: Callable[[int], bool]) -> bool:
    """Whether the socket is of a connection that neither the kernel path nor ztunnel has. ``flows`` are the cookies of
    the kernel path's sockets, ``of_the_mesh`` says of a cgroup whether ztunnel or the agent is in it."""
    if found.state == _HANDSHAKE or found.cookie in flows or of_the_mesh(found.cgroup):
        return False
    return not ipaddress.ip_address(found.remote).is_loopback and found.remote not in pod.addresses


def plain_row(pod: Pod, found: TcpSocket, names: Names, reason: str) -> Row:
    """As one of all connections: bytes as the client sees them. When it began no socket says."""
    accepted = is_accepted(pod, found)
    ours, theirs = socket_text(found.local, found.local_port), socket_text(found.remote, found.remote_port)
    other = names.at(found.remote)
    out, into = sock_diag.data_bytes(found, accepted=accepted)
    return {
        "path": "plain",
        "source": other if accepted else pod.name,
        "destination": pod.name if accepted else other,
        "client": theirs if accepted else ours,
        "server": ours if accepted else theirs,
        "original": ours if accepted else theirs,
        "service": names.service_at(found.remote),
        "sent": into if accepted else out,
        "received": out if accepted else into,
        "redirected": 0,
        "age_s": None,
        "identity": "",
        "policy": "",
        "direction": "inbound" if accepted else "outbound",
        "protocol": "tcp",
        "state": _STATES.get(found.state, "closing"),
        "acceleration": "",
        "reason": reason,
    }


class Looker:
    """Looks into the namespaces of one node's enrolled pods. ``spaces`` are their descriptors by cookie."""

    def __init__(self, maps: Maps, names: Names, spaces: Mapping[int, int]) -> None:
        self._maps = maps
        self._names = names
        self._spaces = spaces
        self._settings = maps.settings or SETTINGS_MISSING
        self._exempt = [p for ident in self._settings.exempt_cgroups if (p := cgroup.path_of_id(ident)) is not None]
        self._paths: dict[int, bool] = {}
        self.unseen: list[str] = []
        """Pods whose sockets cannot be looked at, and why."""

    def rows(self) -> list[Row]:
        """One for each connection and enrolled end of it. Raises BpfFault."""
        pods: dict[int, tuple[Pod, dict[int, TcpSocket]]] = {}
        for cookie, value in self._maps.enrolled.items():
            name = self._names.workload(value.workload) or str(value.workload)
            if (found := self._look(cookie, name)) is not None:
                pods[cookie] = Pod(name, value, found[0]), found[1]
        # A flow's entry lives longer than its sockets: what was there before and after and is not in it, never was.
        flows = {end.cookie for _, flow in self._maps.flows.items() for end in (flow.client, flow.server)}
        rows: list[Row] = []
        for cookie, (pod, sockets) in pods.items():
            left = {c: s for c, s in sockets.items() if is_plain(pod, s, flows, self._of_the_mesh)}
            again = self._look(cookie, pod.name) if left else None
            rows += [
                plain_row(pod, s, self._names, self._reason(pod, s))
                for c, s in (again[1] if again else {}).items()
                if c in left
            ]
        return rows

    def _look(self, cookie: int, name: str) -> tuple[frozenset[int], dict[int, TcpSocket]] | None:
        """Ports somebody listens on, and connections by their sockets' cookies."""
        fd = self._spaces.get(cookie)
        if fd is None:
            self.unseen.append(f"{name}: its network namespace is gone, or may not be entered: run as root")
            return None
        try:
            with sock_diag.open_diag(fd) as sock:
                return sock_diag.listening(sock), {s.cookie: s for s in sock_diag.dump(sock)}
        except (OSError, PlatformFault) as fault:
            self.unseen.append(f"{name}: {fault}")
            return None

    def _of_the_mesh(self, ident: int) -> bool:
        if ident not in self._paths:
            path = cgroup.path_of_id(ident) if ident else None
            self._paths[ident] = path is not None and any(path.is_relative_to(top) for top in self._exempt)
        return self._paths[ident]

    def _reason(self, pod: Pod, found: TcpSocket) -> str:
        """What the hooks would say of it now; ``earlier`` where they would take it, so it began before they did."""
        now_ns = time.monotonic_ns()
        if is_accepted(pod, found):
            local = self._maps.workloads.get(found.local)
            return "bypass" if decide.inbound_bypassed(local, self._settings, now_ns) else "probe_or_earlier"
        workload = self._maps.workloads.get(found.remote)
        service = self._maps.services.get(ServiceKey(found.remote, found.remote_port))
        out = decide.Outbound(
            target=found.remote,
            port=found.remote_port,
            workload_known=workload is not None,
            service_known=service is not None,
            in_cluster=decide.address_in_cluster(found.remote, self._settings),
            workload_flags=workload.flags if workload else 0,
            enrolled_flags=pod.enrolled.flags,
            now_ns=now_ns,
        )
        reason = reason_name(decide.decide_outbound(out, self._settings))
        return reason if reason in LEFT_ALONE else "earlier"
