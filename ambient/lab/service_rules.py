"""Services and their endpoints as one nftables script for a node. Pure.

The shape is kube-proxy's: a map from service address to a chain that translates to a random endpoint; node ports
and sessions from a pod to itself are masqueraded; a service without endpoints refuses. `nft -f` replaces the
whole table in one transaction.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ambient.lab.objects import SERVICE_NAME, LabService
from ambient.lab.topology import PODS4, PODS6, SERVICES4, SERVICES6, UNDERLAY4, UNDERLAY6, NodePlan
from ambient.manifest.objects import EndpointSlice, ServicePort, SliceEndpoint

TABLE = "inet kube_proxy"
_MASQUERADE = "0x4000"
_PROTOCOLS = {"TCP": "tcp", "UDP": "udp", "SCTP": "sctp"}


@dataclass(frozen=True, slots=True)
class Backend:
    address: str
    port: int
    node: str


@dataclass(frozen=True, slots=True)
class _Family:
    """One address family's words."""

    digit: str
    word: str
    type: str
    node: str
    pods: str
    inside: tuple[str, ...]


def is_ready(endpoint: SliceEndpoint) -> bool:
    """Whether traffic may go there: an absent condition means ready."""
    return endpoint.conditions.ready is not False


def slices_by_service(slices: Iterable[EndpointSlice]) -> dict[tuple[str, str], list[EndpointSlice]]:
    """(namespace, service) -> its slices, in the order of their names."""
    found: dict[tuple[str, str], list[EndpointSlice]] = {}
    for item in sorted(slices, key=lambda s: s.key):
        if name := item.labels.get(SERVICE_NAME):
            found.setdefault((item.namespace, name), []).append(item)
    return found


def backends(slices: Iterable[EndpointSlice], port: ServicePort, family: int) -> list[Backend]:
    """Ready endpoints of one port in one family, each once, in order of address."""
    found: set[Backend] = set()
    for item in slices:
        if item.address_type != f"IPv{family}":
            continue
        for candidate in item.ports or ():
            if (candidate.name or "") != port.name or not candidate.port:
                continue
            for endpoint in item.endpoints or ():
                if is_ready(endpoint):
                    for address in (endpoint.addresses or ())[:1]:
                        found.add(Backend(address, candidate.port, endpoint.node_name or ""))
    return sorted(found, key=lambda b: (ipaddress.ip_address(b.address), b.port))


def cluster_addresses(service: LabService) -> tuple[str, ...]:
    spec = service.spec
    listed = spec.cluster_ips or ([spec.cluster_ip] if spec.cluster_ip else [])
    return tuple(address for address in listed if address and address != "None")


class Rules:
    """Collects one node's rules; `text` is the script."""

    def __init__(self, node: NodePlan, ignored: frozenset[str] = frozenset()) -> None:
        self._node = node.name
        self._ignored = ignored
        self._families = [_Family("4", "ip", "ipv4_addr", node.address4, node.pods4, tuple(map(str, _INSIDE4)))]
        if node.address6:
            inside6 = tuple(map(str, _INSIDE6))
            self._families.append(_Family("6", "ip6", "ipv6_addr", node.address6, node.pods6, inside6))
        self._services: dict[str, list[str]] = {"4": [], "6": []}
        self._node_ports: dict[str, list[str]] = {"4": [], "6": []}
        self._refused: dict[str, list[str]] = {"4": [], "6": []}
        self._refused_ports: dict[str, list[str]] = {"4": [], "6": []}
        self._hairpins: dict[str, set[str]] = {"4": set(), "6": set()}
        self._chains: list[str] = []

    def add(self, service: LabService, slices: Sequence[EndpointSlice]) -> None:
        """All ports of one service. Headless and external ones need no rules."""
        addresses = [a for a in cluster_addresses(service) if a not in self._ignored]
        if service.spec.type == "ExternalName" or not addresses:
            return
        for port in service.spec.ports or ():
            protocol = _PROTOCOLS.get(port.protocol)
            if protocol is None:
                continue
            for family in self._families:
                for address in addresses:
                    if (":" in address) == (family.digit == "6"):
                        self._add_port(service, port, protocol, family, address, slices)

    def _add_port(
        self,
        service: LabService,
        port: ServicePort,
        protocol: str,
        family: _Family,
        address: str,
        slices: Sequence[EndpointSlice],
    ) -> None:
        every = backends(slices, port, int(family.digit))
        mine = [backend for backend in every if backend.node == self._node]
        spec = service.spec
        number = len(self._chains)
        inside = mine if spec.internal_traffic_policy == "Local" else every
        key = f"{address} . {protocol} . {port.port}"
        if inside:
            self._translate(f"s{number}", protocol, family, inside, spec.session_affinity == "ClientIP")
            self._services[family.digit].append(f"{key} : goto s{number}")
            self._hairpins[family.digit].update(f"{b.address} . {b.address}" for b in inside)
        else:
            self._refused[family.digit].append(key)
        if not port.node_port or spec.type not in ("NodePort", "LoadBalancer"):
            return
        local = spec.external_traffic_policy == "Local"
        outside = mine if local else every
        key = f"{protocol} . {port.node_port}"
        if outside:
            before = "" if local else f"meta mark set meta mark or {_MASQUERADE}"
            self._translate(f"n{number}", protocol, family, outside, spec.session_affinity == "ClientIP", before)
            self._node_ports[family.digit].append(f"{key} : goto n{number}")
        else:
            self._refused_ports[family.digit].append(key)

    def _translate(
        self, name: str, protocol: str, family: _Family, to: Sequence[Backend], sticky: bool, before: str = ""
    ) -> None:
        choice = f"jhash {family.word} saddr mod {len(to)}" if sticky else f"numgen random mod {len(to)}"
        slots = ", ".join(f"{slot} : {backend.address} . {backend.port}" for slot, backend in enumerate(to))
        rule = f"meta l4proto {protocol} dnat {family.word} to {choice} map {{ {slots} }}"
        self._chains.append(_block(f"chain {name}", [before, rule] if before else [rule]))

    def text(self) -> str:
        """The script: the old table goes and the new one comes in one transaction."""
        dispatch, forward, local, source = [], [], [], []
        tables: list[str] = []
        for family in self._families:
            digit, word = family.digit, family.word
            service_type = f"type {family.type} . inet_proto . inet_service"
            tables += [
                _block(f"map services{digit}", [f"{service_type} : verdict", *_elements(self._services[digit])]),
                _block(
                    f"map nodeports{digit}",
                    ["type inet_proto . inet_service : verdict", *_elements(self._node_ports[digit])],
                ),
                _block(f"set refused{digit}", [service_type, *_elements(self._refused[digit])]),
                _block(
                    f"set refusedports{digit}",
                    ["type inet_proto . inet_service", *_elements(self._refused_ports[digit])],
                ),
                _block(
                    f"set hairpin{digit}",
                    [f"type {family.type} . {family.type}", *_elements(sorted(self._hairpins[digit]))],
                ),
            ]
            dispatch += [
                f"{word} daddr . meta l4proto . th dport vmap @services{digit}",
                f"{word} daddr {family.node} meta l4proto . th dport vmap @nodeports{digit}",
            ]
            refuse = f"{word} daddr . meta l4proto . th dport @refused{digit} reject"
            forward.append(refuse)
            local += [refuse, f"{word} daddr {family.node} meta l4proto . th dport @refusedports{digit} reject"]
            source += [
                f"meta nfproto ipv{digit} meta mark and {_MASQUERADE} == {_MASQUERADE} snat {word} to {family.node}",
                f"{word} saddr . {word} daddr @hairpin{digit} snat {word} to {family.node}",
                f"{word} saddr {family.pods} {word} daddr != {{ {', '.join(family.inside)} }} "
                f"snat {word} to {family.node}",
            ]
        chains = [
            _block("chain dispatch", dispatch),
            _hook("prerouting", "nat", "prerouting", "dstnat", ["jump dispatch"]),
            _hook("output", "nat", "output", "-100", ["jump dispatch"]),
            _hook("postrouting", "nat", "postrouting", "srcnat", source),
            _hook("forward", "filter", "forward", "filter", forward),
            _hook("input", "filter", "input", "filter", local),
            _hook("refuse_output", "filter", "output", "filter", local),
        ]
        body = "\n".join([*self._chains, *tables, *chains])
        return f"table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n{body}\n}}\n"


_INSIDE4 = (PODS4, SERVICES4, UNDERLAY4)
_INSIDE6 = (PODS6, SERVICES6, UNDERLAY6)


def _block(head: str, lines: Iterable[str]) -> str:
    return "\n".join([f"  {head} {{", *(f"    {line}" for line in lines), "  }"])


def _hook(name: str, kind: str, hook: str, priority: str, lines: Iterable[str]) -> str:
    return _block(f"chain {name}", [f"type {kind} hook {hook} priority {priority}; policy accept;", *lines])


def _elements(items: Sequence[str]) -> list[str]:
    return [f"elements = {{ {', '.join(items)} }}"] if items else []


def render(
    node: NodePlan,
    services: Mapping[str, LabService],
    slices: Iterable[EndpointSlice],
    ignored: frozenset[str] = frozenset(),
) -> str:
    """The whole script of one node. Service addresses in ``ignored`` are served by other means (the DNS server)."""
    rules = Rules(node, ignored)
    grouped = slices_by_service(slices)
    for key in sorted(services):
        service = services[key]
        rules.add(service, grouped.get((service.namespace, service.name), ()))
    return rules.text()
