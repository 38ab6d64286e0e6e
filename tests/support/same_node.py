"""Connections inside one node as the tests of the kernel path make them: identities, verdicts, what was captured."""

from __future__ import annotations

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import VerdictKey, VerdictValue, WorkloadValue

DIRECT = {"flags": LAYOUT["ENROLLED_DIRECT"], "workload_flags": LAYOUT["WORKLOAD_DIRECT"]}
ME = 501
"""Number of the client's identity."""


def allow(node, pod, port: int = 0, *, allow: int = 1, generation: int = 1, policy: int = 9) -> None:
    node.maps.verdicts[VerdictKey(ME, pod.workload, port)] = VerdictValue(generation, allow, policy)


def change(node, pod, flags: int = 0, generation: int = 1, without: int = 0) -> None:
    for address in pod.addresses:
        entry = node.maps.workloads[address]
        node.maps.workloads[address] = WorkloadValue(entry.workload, (entry.flags | flags) & ~without, generation)


def captured(node, pod, listener: str = "outbound4"):
    """What ztunnel was given: (original, endpoint)."""
    sock, cookie = pod.ztunnel_accept(listener)
    record = node.maps.take_redirect(cookie)
    sock.close()
    assert record is not None
    return (record.original, record.original_port), (record.endpoint, record.endpoint_port)
