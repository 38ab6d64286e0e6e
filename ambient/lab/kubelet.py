"""A kubelet's stand-in: runs the pods bound to its node as processes in namespaces. It knows nothing of the mesh."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from ambient.io.kube import KubeClient
from ambient.io.reflector import Reflector
from ambient.lab.cni import Chain
from ambient.lab.objects import MIRROR, POD, KubeletPod
from ambient.lab.pod_worker import PodWorker
from ambient.lab.probes import Prober
from ambient.lab.topology import Lab, NodePlan
from ambient.manifest.kinds import Changed

log = logging.getLogger(__name__)


class Kubelet:
    """``await run()`` ends only by cancellation; pods are left as they are then."""

    def __init__(self, lab: Lab, node: NodePlan, client: KubeClient, chain: Chain, images: Mapping[str, str]) -> None:
        self._lab = lab
        self._node = node
        self._client = client
        self._chain = chain
        self._images = images
        self._prober = Prober(node)
        self._workers: dict[str, PodWorker] = {}
        self._events: asyncio.Queue[Changed[KubeletPod]] = asyncio.Queue()
        self._pods: Reflector[KubeletPod] = Reflector(
            client, POD, self._events.put_nowait, field_selector=f"spec.nodeName={node.name}"
        )

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._prober.run(), name="prober")
            group.create_task(self._pods.run(), name="pods")
            while True:
                self._handle(await self._events.get(), group)

    def _handle(self, change: Changed[KubeletPod], group: asyncio.TaskGroup) -> None:
        old, new = change.old, change.new
        gone = old if old is not None and (new is None or new.metadata.uid != old.metadata.uid) else None
        if gone is not None and gone.metadata.uid in self._workers:
            self._workers[gone.metadata.uid].forget()
        if new is None or MIRROR in new.annotations:
            return
        worker = self._workers.get(new.metadata.uid)
        if worker is not None:
            worker.update(new)
        elif new.status.phase not in ("Succeeded", "Failed") or new.metadata.deletion_timestamp:
            worker = PodWorker(self._lab, self._node, self._client, self._chain, self._prober, self._images, new)
            self._workers[worker.uid] = worker
            group.create_task(self._work(worker), name=f"pod {new.key}")

    async def _work(self, worker: PodWorker) -> None:
        try:
            await worker.run()
        except Exception:  # one pod's bug must not end its neighbours
            log.exception("%s: pod worker ended", self._node.name)
        finally:
            self._workers.pop(worker.uid, None)
