"""What the command line asks of the agent on agent.sock, beyond looking at its status."""

from __future__ import annotations

from typing import Any

import msgspec

from ambient.errors import PlatformFault
from ambient.node import drift
from ambient.node.kernel import Kernel
from ambient.node.pods import Pods
from ambient.node.servers import Operation

Query = dict[str, str]


def operations(pods: Pods) -> dict[tuple[str, str], Operation]:
    """By method and path: /bypass (GET; POST with ``on`` 0 or 1 and perhaps ``namespace``), /diff, POST /repair."""

    def kernel() -> Kernel:
        if pods.kernel is None or not pods.operating.is_set():
            raise PlatformFault("the kernel programs are still being loaded")
        return pods.kernel

    async def show_bypass(_: Query) -> dict[str, Any]:
        bypass = pods.wishes.bypass()
        held = pods.kernel.maps.settings if pods.kernel is not None else None
        return {
            **msgspec.to_builtins(bypass),
            "applied": held is not None and bool(held.mode) == bypass.node,
            "pods": sorted(m.title for m in pods.members.values() if m.record.bypass and m.state == "enrolled"),
        }

    async def set_bypass(query: Query) -> dict[str, Any]:
        if query.get("on") not in ("0", "1"):
            raise ValueError("on: 0 or 1")
        namespace = query.get("namespace", "")
        if namespace and query["on"] == "1" and namespace not in pods.wishes.namespaces:
            raise ValueError(f"namespace {namespace!r} does not exist, as far as this node knows")
        await pods.set_bypass(query["on"] == "1", namespace)
        return await show_bypass(query)

    async def show_diff(_: Query) -> dict[str, Any]:
        return {"drift": drift.compare(kernel(), pods)}

    async def repair(_: Query) -> dict[str, Any]:
        before, after = await drift.repair(kernel(), pods)
        return {"drift": before, "left": after}

    return {
        ("GET", "/bypass"): show_bypass,
        ("POST", "/bypass"): set_bypass,
        ("GET", "/diff"): show_diff,
        ("POST", "/repair"): repair,
    }
