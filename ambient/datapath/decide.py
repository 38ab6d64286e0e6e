"""The hooks' decisions in Python, for `ambient why`: twins of bpf/include/decide.h, which a test proves equal.

Names, order and results are those of the header; a change there without one here fails the test.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import EnrolledValue, Range, SettingsValue, VerdictValue, WorkloadValue, address_bytes

ENROLLED: Final = LAYOUT["WORKLOAD_ENROLLED"]
LOCAL: Final = LAYOUT["WORKLOAD_LOCAL"]
WAYPOINT: Final = LAYOUT["WORKLOAD_WAYPOINT"]
_GUARDED = (LAYOUT["PORT_OUTBOUND"], LAYOUT["PORT_INBOUND_PLAINTEXT"], LAYOUT["PORT_HBONE"])
_REASON = LAYOUT.enums["reason"]


@dataclass(frozen=True, slots=True)
class Outbound:
    """struct outbound: what is known about a connect of an enrolled pod. ``target`` is canonical text, never empty."""

    target: str
    port: int
    stream: bool = True
    exempt: bool = False
    workload_known: bool = False
    service_known: bool = False
    in_cluster: bool = False
    workload_flags: int = 0
    enrolled_flags: int = 0
    now_ns: int = 0


def heartbeat_stopped(settings: SettingsValue, now_ns: int) -> bool:
    timeout_ns = settings.heartbeat_timeout_s * 10**9
    return timeout_ns != 0 and now_ns > settings.heartbeat_ns and now_ns - settings.heartbeat_ns > timeout_ns


def agent_is_silent(settings: SettingsValue, now_ns: int) -> bool:
    return now_ns > settings.heartbeat_ns and now_ns - settings.heartbeat_ns > LAYOUT["AGENT_SILENT_S"] * 10**9


def address_in_range(address: str, wanted: Range) -> bool:
    shift = 128 - min(max(wanted.prefix, 0), 128)
    ours, theirs = (int.from_bytes(address_bytes(text), "big") for text in (address, wanted.base))
    return ours >> shift == theirs >> shift


def address_in_cluster(address: str, settings: SettingsValue) -> bool:
    return any(address_in_range(address, entry) for entry in settings.cluster_ranges)


def decide_outbound(out: Outbound, settings: SettingsValue) -> int:
    """enum reason: CAPTURED and NOT_SYNCED capture, DNS goes to the proxy, RECURSION is refused, all others are
    left alone."""
    enrolled = out.workload_known and bool(out.workload_flags & ENROLLED)
    target = ipaddress.ip_address(out.target)
    if out.exempt:
        return _REASON["REASON_EXEMPT"]
    if out.stream and out.port in _GUARDED and (target.is_loopback or enrolled):
        return _REASON["REASON_RECURSION"]
    if target.is_loopback:
        return _REASON["REASON_LOOPBACK"]
    if settings.mode == LAYOUT["MODE_BYPASS"] or out.enrolled_flags & LAYOUT["ENROLLED_BYPASS"]:
        return _REASON["REASON_BYPASS"]
    if out.enrolled_flags & LAYOUT["ENROLLED_OPEN"] and heartbeat_stopped(settings, out.now_ns):
        return _REASON["REASON_BYPASS"]
    if out.port == LAYOUT["PORT_DNS_SERVER"]:
        return _REASON["REASON_DNS"]
    if not out.stream:
        return _REASON["REASON_NONE"]
    if out.service_known or enrolled or (out.workload_known and out.workload_flags & WAYPOINT):
        return _REASON["REASON_CAPTURED"]
    if target.version == 6 and target.is_link_local:
        return _REASON["REASON_NOT_MESH"]
    if not settings.complete:
        return _REASON["REASON_NOT_SYNCED"]
    if not out.workload_known and out.in_cluster:
        return _REASON["REASON_CAPTURED"]
    return _REASON["REASON_NOT_MESH"]


def agreed_acceleration(enrolled_flags: int, workload_flags: int, capabilities: int) -> int:
    """The stricter of what both ends of a connection within the node want: ACCELERATION_*."""
    off, direct, redirect = (LAYOUT[f"ACCELERATION_{word}"] for word in ("OFF", "DIRECT", "REDIRECT"))
    ours = {word: enrolled_flags & LAYOUT[f"ENROLLED_{word}"] for word in ("OFF", "DIRECT", "REDIRECT")}
    theirs = {word: workload_flags & LAYOUT[f"WORKLOAD_{word}"] for word in ("OFF", "DIRECT", "REDIRECT")}
    if ours["OFF"] or theirs["OFF"] or capabilities & (LAYOUT["NO_DESTROY"] | LAYOUT["CROWDED"]):
        return off
    if not (ours["DIRECT"] or ours["REDIRECT"]) or not (theirs["DIRECT"] or theirs["REDIRECT"]):
        return off
    if ours["DIRECT"] or theirs["DIRECT"]:
        return direct
    return redirect if capabilities & LAYOUT["CAN_REDIRECT"] else direct


def is_same_node(workload: WorkloadValue) -> bool:
    """Whether a connection to this workload can be the kernel's to decide at all."""
    return workload.flags & (ENROLLED | LOCAL | WAYPOINT) == ENROLLED | LOCAL


def judge(verdict: VerdictValue | None, generation: int) -> int:
    """What a verdict says of a connection to a workload that policies select: enum reason, KERNEL allows."""
    if verdict is None:
        return _REASON["REASON_NO_VERDICT"]
    if not generation or verdict.generation != generation:
        return _REASON["REASON_STALE_VERDICT"]
    return _REASON["REASON_KERNEL" if verdict.allow else "REASON_VERDICT_DENIES"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """An endpoint the connect hook may choose, and what it finds there. ``workload`` None: no entry for the address;
    ``wanted`` is the workload that `endpoints` names, 0 where the pod itself was dialled."""

    address: str
    port: int
    workload: WorkloadValue | None
    verdict: VerdictValue | None = None
    """The port's, else the one for all ports; None without either or without an identity."""
    wanted: int = 0


def same_node(pod: EnrolledValue, candidate: Candidate, settings: SettingsValue, now_ns: int) -> tuple[int, int]:
    """What bpf/common.c's function of this name makes of one candidate: enum reason and ACCELERATION_*.

    REASON_KERNEL: the connection goes straight there. Any other reason: to ztunnel, REASON_CAPTURED being the one that
    is not counted for itself.
    """
    captured, workload = _REASON["REASON_CAPTURED"], candidate.workload
    if workload is None or not is_same_node(workload) or not settings.complete or candidate.port in _GUARDED:
        return captured, LAYOUT["ACCELERATION_OFF"]
    if agent_is_silent(settings, now_ns):
        return captured, LAYOUT["ACCELERATION_OFF"]
    if candidate.wanted and workload.workload != candidate.wanted:
        return captured, LAYOUT["ACCELERATION_OFF"]
    if not (pod.address6 if ":" in candidate.address else pod.address4):
        return captured, LAYOUT["ACCELERATION_OFF"]
    agreed = agreed_acceleration(pod.flags, workload.flags, settings.acceleration)
    if agreed == LAYOUT["ACCELERATION_OFF"]:
        return _REASON["REASON_ACCELERATION_OFF"], agreed
    if workload.flags & LAYOUT["WORKLOAD_ALLOW_ANY"]:
        return _REASON["REASON_KERNEL"], agreed
    return judge(candidate.verdict, workload.generation), agreed


def inbound_bypassed(local: WorkloadValue | None, settings: SettingsValue, now_ns: int) -> bool:
    """Whether plaintext to a local pod is left alone instead of being steered to ztunnel."""
    if settings.mode == LAYOUT["MODE_BYPASS"]:
        return True
    if local is None:
        return False
    if local.flags & LAYOUT["WORKLOAD_BYPASS"]:
        return True
    return bool(local.flags & LAYOUT["WORKLOAD_OPEN"]) and heartbeat_stopped(settings, now_ns)
