"""Map entries as rows for people and programs: addresses as text, reasons and flags by name, names beside numbers.

Pure: entries and a table of names in, rows out. A number without a name is shown as it is; nothing is hidden.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ambient.datapath import values as v
from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import reason_name

Row = dict[str, Any]

LISTENER_KINDS = {
    LAYOUT["LISTENER_OUTBOUND"]: "outbound",
    LAYOUT["LISTENER_INBOUND_PLAINTEXT"]: "plaintext",
    LAYOUT["LISTENER_HBONE"]: "hbone",
}
MODES = {LAYOUT["MODE_CAPTURE"]: "capture", LAYOUT["MODE_BYPASS"]: "bypass"}


@dataclass(frozen=True, slots=True)
class Names:
    """Names of the node-local numbers, as the agent wrote them, and of addresses."""

    workloads: Mapping[int, str] = field(default_factory=dict)
    services: Mapping[int, str] = field(default_factory=dict)
    addresses: Mapping[str, str] = field(default_factory=dict)
    identities: Mapping[int, str] = field(default_factory=dict)
    policies: Mapping[int, str] = field(default_factory=dict)

    def workload(self, number: int) -> str:
        return self.workloads.get(number, "")

    def at(self, address: str) -> str:
        return self.addresses.get(address, "")

    def service_at(self, address: str) -> str:
        """The service whose virtual address it is; empty if it is none's."""
        found = self.at(address)
        return found if found in self.services.values() else ""


def short_workload(uid: str) -> str:
    """``cluster//Pod/namespace/name`` -> ``namespace/name``; other kinds stay as they are."""
    return uid.partition("//Pod/")[2] or uid


def short_service(key: str) -> str:
    """``namespace/name.namespace.svc.domain`` -> ``namespace/name``."""
    namespace, _, hostname = key.partition("/")
    name, separator, _ = hostname.partition(f".{namespace}.svc.")
    return f"{namespace}/{name}" if separator else key


ACCELERATIONS = {
    LAYOUT["ACCELERATION_OFF"]: "off",
    LAYOUT["ACCELERATION_DIRECT"]: "direct",
    LAYOUT["ACCELERATION_REDIRECT"]: "redirect",
}
NOT_FLOW_FLAGS = ("FLOW_NATIVE", "FLOW_REDIRECT", "FLOW_BLOCKING")
"""Constants that begin like the flags of a flow and are states of one end."""


def flag_names(prefix: str, flags: int, without: Container[str] = ()) -> tuple[str, ...]:
    """Names of the set bits of ``PREFIX_*``, lower case; unknown bits as a number."""
    names = {
        value: name.removeprefix(prefix).lower()
        for name, value in LAYOUT.constants.items()
        if name.startswith(prefix)
        and name not in without
        and not name.endswith("_MAX")
        and value
        and not value & (value - 1)
    }
    known = tuple(names[bit] for bit in sorted(names) if flags & bit)
    rest = flags & ~sum(names)
    return (*known, hex(rest)) if rest else known


def socket_text(address: str, port: int) -> str:
    """ADDRESS:PORT, or nothing where there is no address."""
    if not address:
        return ""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def enrolled(entries: Iterable[tuple[int, v.EnrolledValue]], names: Names) -> list[Row]:
    return [
        {
            "netns_cookie": cookie,
            "workload": names.workload(e.workload) or e.workload,
            "address4": e.address4,
            "address6": e.address6,
            "flows": e.flows,
            "flows_max": e.flows_max,
            "refused": e.refused,
            "identity": names.identities.get(e.identity) or e.identity,
            "flags": flag_names("ENROLLED_", e.flags),
        }
        for cookie, e in sorted(entries)
    ]


def workloads(entries: Iterable[tuple[str, v.WorkloadValue]], names: Names) -> list[Row]:
    return [
        {
            "address": address,
            "workload": names.workload(e.workload) or e.workload,
            "flags": flag_names("WORKLOAD_", e.flags),
            "generation": e.generation,
        }
        for address, e in sorted(entries)
    ]


def services(entries: Iterable[tuple[v.ServiceKey, v.ServiceValue]], names: Names) -> list[Row]:
    rows = [
        {
            "vip": key.vip,
            "port": key.port,
            "service": names.services.get(e.service, "") or e.service,
            "endpoints": e.endpoints,
            "flags": flag_names("WORKLOAD_", e.flags),
        }
        for key, e in entries
    ]
    return sorted(rows, key=lambda row: (str(row["vip"]), int(str(row["port"]))))


def endpoints(entries: Iterable[tuple[v.EndpointKey, v.EndpointValue]], names: Names) -> list[Row]:
    rows = [
        {
            "service": names.services.get(key.service, "") or key.service,
            "port": key.port,
            "slot": key.slot,
            "endpoint4": socket_text(e.address4, e.port),
            "endpoint6": socket_text(e.address6, e.port),
            "workload": names.workload(e.workload) or e.workload,
        }
        for key, e in entries
    ]
    return sorted(rows, key=lambda row: (str(row["service"]), row["port"], row["slot"]))


def verdicts(
    entries: Iterable[tuple[v.VerdictKey, v.VerdictValue]], names: Names, current: Mapping[int, int]
) -> list[Row]:
    """``port`` is * for every port without a row of its own; ``counts`` is whether the destination still has the
    generation of the entry. ``current`` holds generations by the workload's number."""
    rows = [
        {
            "source": names.identities.get(key.identity) or key.identity,
            "destination": names.workload(key.workload) or key.workload,
            "port": key.port or "*",
            "verdict": "allow" if e.allow else "deny",
            "policy": names.policies.get(e.policy) or e.policy or "",
            "counts": current.get(key.workload) == e.generation,
            "generation": e.generation,
        }
        for key, e in entries
    ]
    return sorted(rows, key=lambda row: (str(row["destination"]), str(row["source"]), str(row["port"])))


def flows(entries: Iterable[tuple[v.TupleKey, v.FlowValue]], names: Names, now_ns: int) -> list[Row]:
    """Native bytes are known to the map when an end has closed (None before); of a live flow the sockets have to be
    asked."""
    rows = [
        {
            "source": names.workload(e.source) or e.source,
            "destination": names.workload(e.destination) or e.destination,
            "client": socket_text(key.remote, key.remote_port),
            "server": socket_text(key.local, key.local_port),
            "original": socket_text(e.original, e.original_port),
            "service": names.service_at(e.original),
            "identity": names.identities.get(e.identity) or e.identity,
            "policy": names.policies.get(e.policy) or e.policy or "",
            "acceleration": ACCELERATIONS.get(e.acceleration, str(e.acceleration)),
            "sent_native": e.client.native_bytes if _counted(e) else None,
            "sent_redirected": e.client.redirect_bytes,
            "received_native": e.server.native_bytes if _counted(e) else None,
            "received_redirected": e.server.redirect_bytes,
            "switches": e.client.switches + e.server.switches,
            "state": _flow_state(e),
            "flags": flag_names("FLOW_", e.flags, NOT_FLOW_FLAGS),
            "generation": e.generation,
            "age_s": round((now_ns - e.created_ns) / 1e9, 1),
        }
        for key, e in entries
    ]
    return sorted(rows, key=lambda row: float(str(row["age_s"])))


def _counted(flow: v.FlowValue) -> bool:
    return bool((flow.client.flags | flow.server.flags) & LAYOUT["END_CLOSED"])


def _flow_state(flow: v.FlowValue) -> str:
    closed = LAYOUT["END_CLOSED"]
    if flow.client.flags & closed:
        return "closed" if flow.server.flags & closed or not flow.server.cookie else "client closed"
    if not flow.server.cookie:
        return "handshake"
    return "server closed" if flow.server.flags & closed else "open"


def sockets(entries: Iterable[tuple[v.TupleKey, int]], names: Names) -> list[Row]:
    rows = [{**_tuple(key, names), "socket_cookie": cookie} for key, cookie in entries]
    return sorted(rows, key=lambda row: (str(row["local"]), str(row["remote"])))


def redirects(entries: Iterable[tuple[v.RedirectKey, v.RedirectValue]], names: Names, now_ns: int) -> list[Row]:
    """``state`` is handshake until the connection reached ztunnel's listener, then accepted."""
    rows = [
        {
            "source": names.workload(e.source) or e.source,
            "client": socket_text(e.client or key.client, e.client_port or key.client_port),
            "original": socket_text(e.original, e.original_port),
            "destination": names.at(e.original),
            "endpoint": socket_text(e.endpoint, e.endpoint_port),
            "state": "accepted" if key.cookie else "handshake",
            "cookie": key.cookie,
            "age_s": round((now_ns - e.created_ns) / 1e9, 1),
        }
        for key, e in entries
    ]
    return sorted(rows, key=lambda row: float(str(row["age_s"])))


def _tuple(key: v.TupleKey, names: Names) -> Row:
    return {
        "local": socket_text(key.local, key.local_port),
        "pod": names.at(key.local),
        "remote": socket_text(key.remote, key.remote_port),
    }


def authorized(entries: Iterable[tuple[v.TupleKey, v.AuthorizedValue]], names: Names, now_ns: int) -> list[Row]:
    rows = [
        {
            **_tuple(key, names),
            "workload": names.workload(e.workload) or e.workload,
            "reason": reason_name(e.reason),
            "generation": e.generation,
            "age_s": round((now_ns - e.created_ns) / 1e9, 1),
        }
        for key, e in entries
    ]
    return sorted(rows, key=lambda row: float(str(row["age_s"])))


def origins(entries: Iterable[tuple[v.TupleKey, v.OriginValue]], names: Names) -> list[Row]:
    rows = [
        {
            **_tuple(key, names),
            "client": socket_text(e.client, e.client_port),
            "client_name": names.at(e.client),
            "accepted": bool(e.accepted),
        }
        for key, e in entries
    ]
    return sorted(rows, key=lambda row: (str(row["local"]), str(row["remote"])))


def listeners(entries: Iterable[tuple[v.ListenerKey, int]], names: Names) -> list[Row]:
    rows = [
        {
            "pod_address": key.pod,
            "pod": names.at(key.pod),
            "kind": LISTENER_KINDS.get(key.kind, str(key.kind)),
            "socket_cookie": cookie,
        }
        for key, cookie in entries
    ]
    return sorted(rows, key=lambda row: (str(row["pod_address"]), str(row["kind"])))


def counters(counts: Mapping[str, int]) -> list[Row]:
    return [
        {"reason": name, "count": count, "what": LAYOUT.meanings.get(f"REASON_{name.upper()}", "")}
        for name, count in sorted(counts.items())
        if count
    ]


def settings(value: v.SettingsValue | None, now_ns: int) -> list[Row]:
    if value is None:
        return []
    rows: list[Row] = [
        {"setting": "mode", "value": MODES.get(value.mode, str(value.mode))},
        {"setting": "complete", "value": bool(value.complete)},
        {"setting": "generation", "value": value.generation},
        {"setting": "heartbeat_age_s", "value": round((now_ns - value.heartbeat_ns) / 1e9, 1)},
        {"setting": "heartbeat_timeout_s", "value": value.heartbeat_timeout_s},
        {"setting": "acceleration", "value": capability_names(value.acceleration)},
        {"setting": "high_bytes", "value": value.high_bytes},
        {"setting": "exempt_cgroups", "value": value.exempt_cgroups},
        {"setting": "kubelet_cgroups", "value": value.kubelet_cgroups},
        {"setting": "cluster_ranges", "value": tuple(range_text(r) for r in value.cluster_ranges)},
    ]
    return rows


def capability_names(bits: int) -> tuple[str, ...]:
    """What the self-tests found: of settings.acceleration."""
    able = ("CAN_REDIRECT", "AUTO_REDIRECT", "DRAINING", "ULP_ALLOWED")
    names = (*able, "NO_OFFSETS", "NO_CHARGE", "NO_PROGRAMS", "NO_DESTROY", "CROWDED")
    return tuple(name.lower() for name in names if bits & LAYOUT[name])


def range_text(value: v.Range) -> str:
    """CIDR text; an IPv4 range's prefix counts from the 96 bits in front of it."""
    v4 = ":" not in value.base and value.prefix >= 96
    return f"{value.base or '::'}/{value.prefix - 96 if v4 else value.prefix}"
