"""`ambient why`: what would happen to a connection, and why, without making one."""

from __future__ import annotations

import ipaddress
import json
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click

from ambient.cli.maps import read_names
from ambient.cli.output import emit, output_option
from ambient.cli.pods import namespaces, remembered, status_of
from ambient.cli.target import Target, find_nodes, from_each, target_options
from ambient.datapath.decide import Candidate
from ambient.datapath.drift import key_text
from ambient.datapath.explain import SETTINGS_MISSING, Arrival, Facts, Kernel, Outcome, Source, explain, touching
from ambient.datapath.layout import LAYOUT
from ambient.datapath.render import Names, socket_text
from ambient.datapath.values import (
    EndpointKey,
    EnrolledValue,
    ServiceKey,
    ServiceValue,
    VerdictKey,
    address_bytes,
    address_text,
)
from ambient.errors import AmbientError, Misuse, PlatformFault
from ambient.io import sock_diag
from ambient.io.admin_client import ask_json
from ambient.io.bpf_maps import Maps
from ambient.settings import NodeSettings

Row = dict[str, Any]
NAMES_MAX, ENDPOINTS_MAX = 10, 16
ANSWER_S = 4.0
"""How long a process may take to answer; one that does not is looked past."""


def split_destination(text: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[IPv6]:PORT``. Raises Misuse."""
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) <= 65535:
        raise Misuse("DST", text, "is not HOST:PORT, for example catalog.shop:80 or [fd00::1]:80")
    return host, int(port)


def find_source(name: str, statuses: dict[str, Row]) -> Source:
    """The pod ``namespace/name``, the first of a Deployment's, or the pod that has an address, by the agents' words.
    Raises Misuse."""
    everyone = [(node, row) for node, status in statuses.items() for row in status["pods"]]
    namespace, separator, pod = name.partition("/")
    if (address := _address(name)) is not None:
        exact = [(node, row) for node, row in everyone if address in row["addresses"]]
        if not exact:
            raise Misuse("SRC", name, "no pod of the nodes looked at has this address; a source is NAMESPACE/POD")
        begins = []
    elif not separator or not namespace or not pod:
        raise Misuse("SRC", name, "is not NAMESPACE/POD, for example shop/frontend, nor a pod's address")
    else:
        found = [(node, row) for node, row in everyone if row["namespace"] == namespace]
        exact = [(node, row) for node, row in found if row["name"] == pod]
        begins = [(node, row) for node, row in found if row["name"].startswith(f"{pod}-")]
        if not (exact or begins):
            raise Misuse("SRC", name, _unknown(namespace, [row for _, row in found], [row for _, row in everyone]))
    node, row = sorted(exact or begins, key=lambda pair: str(pair[1]["name"]))[0]
    return Source(
        node,
        f"{row['namespace']}/{row['name']}",
        row["uid"],
        row["state"],
        row["reason"],
        row["detail"],
        row["netns_cookie"],
        tuple(row["addresses"]),
    )


def _unknown(namespace: str, found: list[Row], everyone: list[Row]) -> str:
    what = f"pods of namespace {namespace}" if found else "namespaces with pods"
    known = sorted({str(row["name"]) for row in found} or {str(row["namespace"]) for row in everyone})
    more = f" and {len(known) - NAMES_MAX} more" if len(known) > NAMES_MAX else ""
    return f"no agent here knows such a pod; {what} here: {', '.join(known[:NAMES_MAX]) or 'none'}{more}"


def _address(text: str) -> str | None:
    try:
        return address_text(address_bytes(str(ipaddress.ip_address(text))))
    except ValueError:
        return None


def resolve(host: str, port: int, namespace: str, dump: Row, family: int) -> tuple[str, str]:
    """An address for what the user wrote, and what it is: an address, a service's VIP or a pod. Raises Misuse.

    ``name``, ``name.namespace`` and whole host names are services; ``namespace/name`` is a service with this port,
    or else a pod.
    """
    if (literal := _address(host)) is not None:
        if family and (":" in literal) is not (family == 6):
            raise Misuse("DST", host, f"is no IPv{family} address: leave -{family} out")
        return literal, owner(literal, dump)
    space, separator, name = host.partition("/")
    if separator:
        wanted = f"{name}.{space}.svc."
    else:
        parts = host.split(".")
        wanted = host if len(parts) > 3 else f"{parts[0]}.{parts[1] if len(parts) > 1 else namespace}.svc."
    pods = [w for w in dump["workloads"] if separator and (w["namespace"], w["name"]) == (space, name)]
    for service in dump["services"]:
        if pods and str(port) not in service["ports"]:
            continue
        if service["hostname"] == wanted or service["hostname"].startswith(wanted):
            title = f"{service['namespace']}/{service['name']}"
            vips = [vip.rpartition("/")[2] for vip in service["vips"]]
            ends = [e["workloadUid"] for e in service["endpoints"].values()]
            behind = [ip for w in dump["workloads"] if w["uid"] in ends for ip in w["workloadIps"]]
            if address := _of_family(vips or behind, family):
                return (
                    address,
                    f"VIP of service {title}" if vips else f"one of {len(ends)} endpoints of service {title}",
                )
            raise Misuse("DST", host, "the service has neither a VIP nor an endpoint of this family")
    if pods:
        if address := _of_family(pods[0]["workloadIps"], family):
            return address, f"address of pod {space}/{name}"
        raise Misuse("DST", host, "the pod has no address of this family")
    step = "see `ambient services`, or name a pod as NAMESPACE/NAME"
    raise Misuse("DST", host, f"is neither an address nor a service or pod that ztunnel knows: {step}")


def owner(address: str, dump: Row) -> str:
    """Whose address it is, in words."""
    for service in dump["services"]:
        if address in (vip.rpartition("/")[2] for vip in service["vips"]):
            return f"VIP of service {service['namespace']}/{service['name']}"
    for workload in dump["workloads"]:
        if address in workload["workloadIps"]:
            kind = "pod" if "//Pod/" in workload["uid"] else "workload"
            return f"address of {kind} {workload['namespace']}/{workload['name']}"
    return "address"


def behind(address: str, port: int, dump: Row) -> list[tuple[str, int]] | None:
    """The healthy endpoints of the service that has this address and port, as a node without a mesh would choose from;
    None if no service has."""
    for service in dump["services"]:
        if str(port) in service["ports"] and address in (vip.rpartition("/")[2] for vip in service["vips"]):
            ends = {
                e["workloadUid"]: e["port"][str(port)]
                for e in service["endpoints"].values()
                if e["status"] == "Healthy" and str(port) in e["port"]
            }
            found = [(w["workloadIps"], ends[w["uid"]]) for w in dump["workloads"] if w["uid"] in ends]
            of_family = [(next((ip for ip in ips if (":" in ip) is (":" in address)), ""), at) for ips, at in found]
            return [(ip, at) for ip, at in of_family if ip]
    return None


def _of_family(addresses: list[str], family: int) -> str:
    wanted = [a for a in addresses if family == 0 or (":" in a) is (family == 6)]
    return next((a for a in wanted if ":" not in a), wanted[0] if wanted else "")


def _kernel(node: NodeSettings, cookie: int, address: str, port: int) -> Kernel:
    with Maps.open(node.bpffs_dir) as maps:
        enrolled = maps.enrolled.get(cookie) if cookie else None
        service = maps.services.get(ServiceKey(address, port))
        candidates = _candidates(maps, enrolled.identity, service, address, port) if enrolled else ()
        names = read_names(node, maps)
        return Kernel(
            settings=maps.settings or SETTINGS_MISSING,
            now_ns=time.monotonic_ns(),
            enrolled=enrolled,
            workload=maps.workloads.get(address),
            service=service,
            candidates=candidates,
            policies=names.policies,
            services=names.services,
            entries=tuple(_entries(names, enrolled, service, port, candidates)),
        )


def _entries(
    names: Names, enrolled: EnrolledValue | None, service: ServiceValue | None, port: int, ends: tuple[Candidate, ...]
) -> Iterator[tuple[str, str]]:
    """Slots and verdicts the connect hook would look at, as /diff names them."""
    for slot in range(service.endpoints if service is not None else 0):
        assert service is not None
        yield "endpoints", key_text(EndpointKey(service.service, port, slot), names)
    for end in ends:
        yield "workloads", end.address
        if enrolled is not None and end.workload is not None:
            for number in (end.port, 0):
                yield "verdicts", key_text(VerdictKey(enrolled.identity, end.workload.workload, number), names)


def _candidates(
    maps: Maps, identity: int, service: ServiceValue | None, address: str, port: int
) -> tuple[Candidate, ...]:
    """What the connect hook could choose: a slot of the service, or the pod itself."""
    ends = [(address, port, 0)]
    if service is not None:
        if service.flags & LAYOUT["WORKLOAD_WAYPOINT"]:
            return ()
        slots = [maps.endpoints.get(EndpointKey(service.service, port, slot)) for slot in range(service.endpoints)]
        six = ":" in address
        ends = [(s.address6 if six else s.address4, s.port, s.workload) for s in slots if s is not None]
    found = []
    for where, number, wanted in ends:
        workload = maps.workloads.get(where) if where else None
        verdict = None
        if identity and workload is not None:
            verdict = maps.verdicts.get(VerdictKey(identity, workload.workload, number))
            verdict = verdict or maps.verdicts.get(VerdictKey(identity, workload.workload, 0))
        if where:
            found.append(Candidate(where, number, workload, verdict, wanted))
    return tuple(found)


class Ztunnels:
    """The ztunnels of the nodes; one that did not answer is said on stderr, once, and not asked again."""

    def __init__(self) -> None:
        self._silent: dict[str, PlatformFault] = {}

    def first(self, nodes: Iterable[NodeSettings], path: str, **query: Any) -> Row | None:
        """The word of the first that answers."""
        for node in nodes:
            if node.node_name in self._silent:
                continue
            try:
                found: Row = ask_json(Path(node.run_dir) / "ztunnel.sock", f"{path}?{urlencode(query)}", ANSWER_S)
                return found
            except PlatformFault as fault:
                click.echo(f"ambient: {node.node_name}: {fault}", err=True)
                self._silent[node.node_name] = fault
        return None

    def world(self, nodes: Iterable[NodeSettings]) -> Row:
        """What the first that answers knows: it is the same on all. Raises the first fault if none does."""
        found = self.first(nodes, "/config_dump")
        if found is None:
            raise next(iter(self._silent.values()), PlatformFault("no node to ask"))
        return found


def _listening(nodes: dict[str, NodeSettings], answer: Row | None) -> dict[str, bool]:
    """Of the endpoints on nodes of this machine: whether the kernel has their HBONE listener."""
    found: dict[str, bool] = {}
    for verdict in (answer or {}).get("verdicts", ()):
        node = nodes.get(verdict.get("node", ""))
        if node is not None:
            ip = verdict["endpoint"].rpartition(":")[0].strip("[]")
            with Maps.open(node.bpffs_dir) as maps:
                found[ip] = maps.listeners.get(ip, LAYOUT["LISTENER_HBONE"]) is not None
    return found


def _deaf(nodes: dict[str, NodeSettings], ends: Collection[tuple[str, int]]) -> dict[str, str]:
    """Of the endpoints that are enrolled pods of nodes here: those where nobody listens on the port -> node. What
    cannot be looked at is not among them."""
    found: dict[str, str] = {}
    for name, node in nodes.items():
        with suppress(AmbientError, OSError), Maps.open(node.bpffs_dir) as maps, ExitStack() as stack:
            spaces = namespaces(node, stack)
            cookies = {a: c for c, value in maps.enrolled.items() for a in (value.address4, value.address6) if a}
            for address, port in ends:
                fd = spaces.get(cookies.get(address, 0))
                if fd is not None:
                    with sock_diag.open_diag(fd) as sock:
                        if port not in sock_diag.listening(sock):
                            found[socket_text(address, port)] = name
    return found


def _agents(nodes: dict[str, NodeSettings], path: str) -> dict[str, Row]:
    """What each node's agent answers; one that does not is said on stderr."""
    return dict(
        from_each(tuple(nodes.values()), lambda node: ask_json(Path(node.run_dir) / "agent.sock", path, ANSWER_S))[0]
    )


def gather(name: str, destination: str, family: int, nodes: dict[str, NodeSettings]) -> tuple[Facts, str]:
    """Everything that is known about the connection, and what the destination is. Raises Misuse, PlatformFault."""
    host, port = split_destination(destination)
    statuses = _agents(nodes, "/status")
    silent = {where: node for where, node in nodes.items() if where not in statuses}
    for where, node in silent.items():
        statuses[where] = {"pods": [status_of(pod) for pod in remembered(node)]}
    if not any(status["pods"] for status in statuses.values()):
        raise PlatformFault("no agent answers and none has written down its pods: see above, or `ambient status`")
    source = find_source(name, statuses)
    node = nodes[source.node]
    everyone = (node, *(other for other in nodes.values() if other is not node))
    ztunnels = Ztunnels()
    dump = ztunnels.world(everyone)
    address, what = resolve(host, port, source.name.partition("/")[0], dump, family)
    kernel = _kernel(node, source.cookie, address, port)
    answer = ztunnels.first((node,), "/why", source=source.uid, ip=address, port=port) if kernel.enrolled else None
    own = next((a for a in source.addresses if (":" in a) is (":" in address)), "")

    def arrival(ip: str, number: int) -> Arrival:
        said = ztunnels.first(everyone, "/why", ip=ip, port=number, source_ip=own)
        verdict = said["verdicts"][0] if said is not None and said["verdicts"] else None
        at = nodes.get((verdict or {}).get("node", ""))
        return Arrival(socket_text(ip, number), verdict, _kernel(at, 0, ip, number) if at is not None else None)

    route = (answer or {}).get("route") or {}
    hops = [split_destination(h["endpoint"]) for h in route.get("hops", ())]
    served = behind(address, port, dump)
    slots = [(c.address, c.port) for c in kernel.candidates]
    reached = dict.fromkeys([*(slots or hops), *(served or ())] or [(address, port)])
    drift = [
        {"node": where, **row}
        for where, found in _agents({n: s for n, s in nodes.items() if n not in silent}, "/diff").items()
        for row in touching(
            found["drift"],
            source.cookie,
            address,
            port,
            [ip for ip, _ in hops],
            kernel.entries if where == node.node_name else (),
        )
    ]
    facts = Facts(
        source,
        address,
        port,
        kernel,
        answer,
        arrival(address, port),
        drift,
        _listening(nodes, answer),
        None if served is None else [arrival(*end) for end in served[:ENDPOINTS_MAX]],
        _deaf(nodes, reached),
    )
    return facts, what


def rows_of(outcome: Outcome, facts: Facts, host: str, what: str) -> list[Row]:
    """The steps as rows; the first says what the destination was taken for, the last is the path."""
    first = {"step": "resolve", "where": "ztunnel", "result": facts.address, "why": f"{host}: {what}"}
    last = outcome.steps[-1] | {"path": outcome.path, "allowed": outcome.allowed, "detail": outcome.detail}
    return [first, *outcome.steps[:-1], last]


@click.command()
@click.argument("source")
@click.argument("destination")
@click.option("-4", "family", flag_value=4, type=int, help="An IPv4 address of the destination.")
@click.option("-6", "family", flag_value=6, type=int, help="An IPv6 address of the destination.")
@target_options
@output_option
def why(source: str, destination: str, family: int | None, target: Target, output: str) -> None:
    """Explain what would happen to a connection from pod SOURCE to DESTINATION (HOST:PORT), and why.

    Makes no connection. The decisions of the connect hook are made again over what the kernel holds now, those of
    ztunnel by ztunnel itself over what it knows now; where the two differ, the step `drift` says so. SOURCE is
    NAMESPACE/POD (or a Deployment's name) or a pod's address; HOST an address, a service's name as the pod would write
    it, or NAMESPACE/NAME of a service or pod. Exit code 1 if the connection would be refused, 2 if nobody can say.

    \b
    Example:
      ambient why shop/frontend catalog:80
      ambient why shop/frontend 10.244.2.3:8080 -o json
    """
    nodes = {node.node_name: node for node in find_nodes(target)}
    facts, what = gather(source, destination, family or 0, nodes)
    outcome = explain(facts)
    rows = rows_of(outcome, facts, split_destination(destination)[0], what)
    if output == "json":
        click.echo(json.dumps(rows, indent=2))
    else:
        emit(rows, output, ("step", "where", "result", "why"))
    sys.exit((1 if outcome.allowed is False else 0) if outcome.known else 2)
