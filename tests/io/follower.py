"""A process that is subscribed to the control plane, and Workloads to tell it of."""

from __future__ import annotations

import asyncio
import ipaddress

from ambient.io.xds_client import subscribe
from ambient.model.workload import TunnelProtocol, Workload
from ambient.model.world import Diff, World
from ambient.settings import NodeSettings
from ambient.xds.client import Backoff

QUICK = 0.02


def workload(name: str, ip: int = 1, *, hbone: bool = False, text: str = "") -> Workload:
    protocol = TunnelProtocol.HBONE if hbone else TunnelProtocol.NONE
    address = ipaddress.ip_address(f"10.0.{ip >> 8}.{ip & 255}")
    return Workload(f"c//Pod/ns/{name}", name, "ns", (address,), protocol=protocol, workload_name=text)


class Follower:
    """A subscribed process: what it was told, and a gate that holds it up."""

    def __init__(self, settings: NodeSettings, role: str = "ztunnel") -> None:
        self.settings = settings
        self.role = role
        self.world = World()
        self.diffs: list[Diff] = []
        self.states: list[tuple[bool, str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = False
        self.fail = 0
        self.waits = Backoff(limit_s=QUICK)

    async def on_change(self, world: World, diff: Diff) -> None:
        self.waiting = True
        await self.gate.wait()
        self.waiting = False
        if self.fail:
            self.fail -= 1
            raise RuntimeError("cannot write the maps")
        self.world = world
        self.diffs.append(diff)

    async def run(self) -> None:
        await subscribe(
            self.settings,
            self.role,
            self.on_change,
            on_state=lambda up, why: self.states.append((up, why)),
            backoff=self.waits,
        )

    @property
    def connected(self) -> bool:
        return bool(self.states) and self.states[-1][0]
