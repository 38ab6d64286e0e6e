"""kube-proxy's stand-in for one node: renders the rules when services change and replaces them at once."""

from __future__ import annotations

import asyncio
import logging

from ambient.errors import PlatformFault
from ambient.lab import commands
from ambient.lab.cluster import Cluster
from ambient.lab.service_rules import render
from ambient.lab.topology import NodePlan

log = logging.getLogger(__name__)
_SETTLE_S = 0.02  # changes come in bursts: a service and its slices
_RETRY_S = 1.0


class KubeProxy:
    """``await run()`` ends only by cancellation."""

    def __init__(self, node: NodePlan, cluster: Cluster, ignored: frozenset[str]) -> None:
        self._node = node
        self._cluster = cluster
        self._ignored = ignored
        self._loaded = ""
        self.synced = asyncio.Event()
        """Set once the first complete set of rules is in force."""

    async def run(self) -> None:
        await self._cluster.synced()
        version = -1
        while True:
            version = await self._cluster.changed(version)
            await asyncio.sleep(_SETTLE_S)
            try:
                await self._load()
            except PlatformFault as fault:
                log.error("%s: services: %s", self._node.name, fault)
                version = -1
                await asyncio.sleep(_RETRY_S)

    async def _load(self) -> None:
        text = render(self._node, self._cluster.services, self._cluster.slices.values(), self._ignored)
        if text != self._loaded:
            answer = await commands.run_async(commands.in_netns(self._node.netns, "nft", "-f", "-"), text.encode())
            if answer.code:
                raise PlatformFault(f"nft: {answer.talk()}")
            self._loaded = text
        self.synced.set()
