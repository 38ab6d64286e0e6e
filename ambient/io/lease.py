"""Leader election by a Lease of coordination.k8s.io, as client-go does it.

Other holders' clocks are not believed: a lease is over when *we* have seen no change of it for its duration.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Callable
from typing import Any

from ambient.errors import AmbientError
from ambient.io.kube import KubeClient
from ambient.io.kube_answers import ApiStatus
from ambient.manifest.kinds import LEASE
from ambient.manifest.objects import Lease

log = logging.getLogger(__name__)

DURATION_S = 15.0
RETRY_S = 2.0
RENEW_DEADLINE_S = 10.0  # without a renewal for so long the holder stops leading, before others start


class Election:
    """``acquire`` returns once we lead; ``hold`` returns once we no longer do."""

    def __init__(
        self,
        client: KubeClient,
        namespace: str,
        name: str,
        identity: str,
        *,
        duration_s: float = DURATION_S,
        retry_s: float = RETRY_S,
        renew_deadline_s: float = RENEW_DEADLINE_S,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.client = client
        self.namespace = namespace
        self.name = name
        self.identity = identity
        self.leading = False
        self.holder = ""
        self._duration_s = duration_s
        self._retry_s = retry_s
        self._renew_deadline_s = renew_deadline_s
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._seen: tuple[str, str] = ("", "")
        self._seen_at = 0.0
        self._renewed = 0.0

    async def acquire(self) -> None:
        while True:
            if await self._try():
                break
            await asyncio.sleep(self._retry_s)
        self.leading = True
        log.info("leading as %s (lease %s/%s)", self.identity, self.namespace, self.name)

    async def hold(self) -> None:
        # the deadline counts from before the request that renewed: others count from when they see what it wrote
        while (left_s := self._renewed + self._renew_deadline_s - self._clock()) > 0:
            try:
                async with asyncio.timeout(left_s):
                    await asyncio.sleep(self._retry_s)
                    if not await self._try() and self.holder not in ("", self.identity):
                        break
            except TimeoutError:
                pass
        self.leading = False
        log.error("lost the lease %s/%s to %s", self.namespace, self.name, self.holder or "nobody: not renewed in time")

    async def release(self) -> None:
        """Give the lease back, so that a successor need not wait."""
        if not self.leading:
            return
        self.leading = False
        try:
            lease = await self.client.get(LEASE, self.name, self.namespace)
            if lease.spec.holder_identity == self.identity:
                await self._write(lease, holder="", duration_s=1)
        except AmbientError as error:
            log.warning("lease not released: %s", error)

    async def _try(self) -> bool:
        """Take or renew the lease if it is ours to take."""
        started = self._clock()
        if not await self._take():
            return False
        self._renewed = started
        return True

    async def _take(self) -> bool:
        try:
            try:
                lease = await self.client.get(LEASE, self.name, self.namespace)
            except ApiStatus as status:
                if status.code != 404:
                    raise
                await self.client.create(LEASE, self._body(None, self.identity, self._duration_s), self.namespace)
                self.holder = self.identity
                return True
            self.holder = lease.spec.holder_identity or ""
            seen = (self.holder, lease.spec.renew_time or "")
            if seen != self._seen:
                self._seen, self._seen_at = seen, self._clock()
            theirs = self.holder not in ("", self.identity)
            if theirs and self._clock() - self._seen_at < (lease.spec.lease_duration_seconds or self._duration_s):
                return False
            await self._write(lease, holder=self.identity, duration_s=self._duration_s)
            self.holder = self.identity
            return True
        except ApiStatus as status:
            if status.code != 409:  # 409: somebody was faster
                log.warning("lease %s/%s: %s", self.namespace, self.name, status)
            return False
        except AmbientError as error:
            log.warning("lease %s/%s: %s", self.namespace, self.name, error)
            return False

    async def _write(self, lease: Lease, *, holder: str, duration_s: float) -> None:
        await self.client.update(LEASE, self._body(lease, holder, duration_s), self.name, self.namespace)

    def _body(self, lease: Lease | None, holder: str, duration_s: float) -> dict[str, Any]:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        metadata = {"name": self.name, "namespace": self.namespace}
        acquired, transitions = now, 0
        if lease is not None:
            metadata["resourceVersion"] = lease.metadata.resource_version
            transitions = lease.spec.lease_transitions or 0
            if lease.spec.holder_identity == holder:
                acquired = lease.spec.acquire_time or now
            else:
                transitions += 1
        return {
            "metadata": metadata,
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": max(1, int(duration_s)),
                "acquireTime": acquired,
                "renewTime": now,
                "leaseTransitions": transitions,
            },
        }
