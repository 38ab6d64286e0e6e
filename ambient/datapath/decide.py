"""The hooks' decisions in Python, for `ambient why`: twins of bpf/include/decide.h, which a test proves equal.

Names, order and results are those of the header; a change there without one here fails the test.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import Range, SettingsValue, WorkloadValue, address_bytes

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


def inbound_bypassed(local: WorkloadValue | None, settings: SettingsValue, now_ns: int) -> bool:
    """Whether plaintext to a local pod is left alone instead of being steered to ztunnel."""
    if settings.mode == LAYOUT["MODE_BYPASS"]:
        return True
    if local is None:
        return False
    if local.flags & LAYOUT["WORKLOAD_BYPASS"]:
        return True
    return bool(local.flags & LAYOUT["WORKLOAD_OPEN"]) and heartbeat_stopped(settings, now_ns)
