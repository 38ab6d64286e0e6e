"""One copy of services, endpoint slices and pods for all stand-ins of a lab, and a way to wait for its changes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ambient.io.kube import KubeClient
from ambient.io.reflector import Reflector
from ambient.lab.objects import SERVICE, LabService
from ambient.manifest.kinds import ENDPOINT_SLICE, Changed
from ambient.manifest.objects import EndpointSlice


class Cluster:
    """``await run()`` ends only by cancellation."""

    def __init__(self, client: KubeClient) -> None:
        self._services: Reflector[LabService] = Reflector(client, SERVICE, self._notice)
        self._slices: Reflector[EndpointSlice] = Reflector(client, ENDPOINT_SLICE, self._notice)
        self._version = 0
        self._changed = asyncio.Event()

    @property
    def services(self) -> Mapping[str, LabService]:
        return self._services.objects

    @property
    def slices(self) -> Mapping[str, EndpointSlice]:
        return self._slices.objects

    @property
    def version(self) -> int:
        """Grows with every change."""
        return self._version

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._services.run(), name="services")
            group.create_task(self._slices.run(), name="endpointslices")

    async def synced(self) -> None:
        await self._services.synced.wait()
        await self._slices.synced.wait()

    async def changed(self, version: int) -> int:
        """Return at once if there was a change since ``version``, else wait for one. The new version."""
        while version == self._version:
            await self._changed.wait()
        return self._version

    def _notice(self, _: Changed[Any]) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()
