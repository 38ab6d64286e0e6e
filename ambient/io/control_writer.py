"""Writes what the control plane owes the API: conditions of policies and the trust bundle in every namespace.

Only the leader writes. A write that fails is offered again after a growing pause; a policy or namespace that is
gone is forgotten.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections import Counter
from collections.abc import Callable

from ambient.control.reconcile import Reconciler
from ambient.control.statuses import ROOT_CONFIG_MAP, ROOT_KEY, RootWrite, StatusPatch
from ambient.errors import AmbientError
from ambient.io.kube import KubeClient, backoff_s
from ambient.io.kube_answers import ApiStatus
from ambient.manifest.kinds import AUTHORIZATION_POLICY, CONFIG_MAP

log = logging.getLogger(__name__)

CONCURRENCY = 8
IDLE_S = 30.0  # look again without being woken


class Writer:
    """``run`` in a task; `wake` when there may be something to write."""

    def __init__(self, client: KubeClient, reconciler: Reconciler, bundle: Callable[[], str]) -> None:
        self.writes: Counter[tuple[str, str]] = Counter()
        """(what, ok or failed) -> number."""
        self._client = client
        self._reconciler = reconciler
        self._bundle = bundle
        self._woken = asyncio.Event()

    def wake(self) -> None:
        self._woken.set()

    async def run(self) -> None:
        failures = 0
        while True:
            self._woken.clear()
            if await self.write_all():
                failures = 0
                try:
                    async with asyncio.timeout(IDLE_S):
                        await self._woken.wait()
                except TimeoutError:
                    pass
            else:
                await asyncio.sleep(backoff_s(failures, base_s=0.5))
                failures += 1

    async def write_all(self) -> bool:
        """Write everything outstanding once; whether all of it succeeded."""
        now_text = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        patches = self._reconciler.status_patches(now_text)
        roots = self._reconciler.root_writes(self._bundle())
        gate = asyncio.Semaphore(CONCURRENCY)

        async def gated(write: StatusPatch | RootWrite) -> bool:
            async with gate:
                return await (self._status(write) if isinstance(write, StatusPatch) else self._root(write))

        writes: list[StatusPatch | RootWrite] = [*patches, *roots]
        return all(await asyncio.gather(*(gated(write) for write in writes)))

    async def _status(self, patch: StatusPatch) -> bool:
        body = {"status": {"conditions": list(patch.conditions)}}
        try:
            await self._client.patch(
                AUTHORIZATION_POLICY, patch.name, body, patch.namespace, how="merge", subresource="status"
            )
        except AmbientError as error:
            if _gone(error):
                return True
            self.writes["status", "failed"] += 1
            log.warning("status of AuthorizationPolicy %s/%s: %s", patch.namespace, patch.name, error)
            self._reconciler.retry_status(patch.namespace, patch.name)
            return False
        self.writes["status", "ok"] += 1
        return True

    async def _root(self, write: RootWrite) -> bool:
        body = {
            "metadata": {
                "name": ROOT_CONFIG_MAP,
                "namespace": write.namespace,
                "labels": {"istio.io/config": "true"},
            },
            "data": {ROOT_KEY: write.bundle},
        }
        try:
            if write.create:
                await self._client.create(CONFIG_MAP, body, write.namespace)
            else:
                await self._client.patch(CONFIG_MAP, ROOT_CONFIG_MAP, {"data": body["data"]}, write.namespace)
        except AmbientError as error:
            # 409: it exists already, and our copy will say so; 403: the namespace is on its way out
            if _gone(error) or (isinstance(error, ApiStatus) and error.code == 409):
                return True
            self.writes["root", "failed"] += 1
            log.warning("ConfigMap %s/%s: %s", write.namespace, ROOT_CONFIG_MAP, error)
            return False
        self.writes["root", "ok"] += 1
        return True


def _gone(error: AmbientError) -> bool:
    return isinstance(error, ApiStatus) and error.code == 404
