"""One pod on its node, from its binding to its end: sandbox, containers, status, removal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Mapping
from typing import Any

from ambient.errors import AmbientError
from ambient.io.kube import KubeClient
from ambient.io.kube_answers import ApiStatus
from ambient.lab.cni import Chain
from ambient.lab.container import RunningContainer, Surroundings, now_text
from ambient.lab.objects import EVENT, POD, KubeletPod
from ambient.lab.pod_status import build, final_phase, new_state
from ambient.lab.probes import Prober
from ambient.lab.sandbox import PodSandbox
from ambient.lab.topology import Lab, NodePlan

log = logging.getLogger(__name__)
RETRY_FIRST_S, RETRY_LONGEST_S = 0.3, 5.0
_PUBLISH_RETRY_S = 1.0


class PodWorker:
    """`run` does it all and returns when the pod is gone. `update` and `forget` tell it what the API says."""

    def __init__(
        self,
        lab: Lab,
        node: NodePlan,
        client: KubeClient,
        chain: Chain,
        prober: Prober,
        images: Mapping[str, str],
        pod: KubeletPod,
    ) -> None:
        self._pod = pod
        self._node = node
        self._client = client
        self._sandbox = PodSandbox(lab, node, chain, pod)
        self._around = Surroundings(pod, self._sandbox, node.addresses, prober, images, self._changed)
        self.state = new_state(pod, now_text())
        self._ending = asyncio.Event()
        self._vanished = False
        self._dirty = asyncio.Event()
        self._published: dict[str, Any] = {}
        self._said = ""

    @property
    def uid(self) -> str:
        return self._pod.metadata.uid

    def update(self, pod: KubeletPod) -> None:
        """The object changed. Of a running pod only the end and others' conditions matter."""
        self._pod = pod
        if pod.metadata.deletion_timestamp:
            self._ending.set()

    def forget(self) -> None:
        """The object is gone: there is nothing to report any more, but everything to remove."""
        self._vanished = True
        self._ending.set()

    def _changed(self) -> None:
        self._dirty.set()

    async def run(self) -> None:
        self.update(self._pod)
        publisher = asyncio.create_task(self._publish_for_ever(), name=f"status of {self._pod.key}")
        try:
            if not self._ending.is_set():
                await self._live()
            await self._ending.wait()
            await self._remove_sandbox()
        finally:
            publisher.cancel()
            await asyncio.gather(publisher, return_exceptions=True)
        if not self._vanished:
            await self._delete_object()
        await self._sandbox.forget()

    async def _live(self) -> None:
        """Until the pod is to end, or all its containers have for good."""
        if not await self._make_sandbox():
            return
        spec = self._pod.spec
        for container in spec.init_containers or ():
            policy = "Never" if spec.restart_policy == "Never" else "OnFailure"
            state = self.state.init[container.name]
            await self._run([RunningContainer(self._around, container, state, policy)])
            if self._ending.is_set():
                return
            if state.exit_code:
                self.state.final = "Failed"
                self._changed()
                return
            state.ready = True
        self.state.initialized = True
        self._changed()
        await self._run(
            [
                RunningContainer(self._around, container, self.state.containers[container.name], spec.restart_policy)
                for container in spec.containers or ()
            ]
        )
        if not self._ending.is_set():
            self.state.final = final_phase(self._pod, self.state)
            self.state.sandbox_ready = False
            self._changed()
            await self._remove_sandbox()

    async def _run(self, containers: list[RunningContainer]) -> None:
        """Run them until all have ended; when the pod is to end, stop them."""
        tasks = [asyncio.create_task(container.run()) for container in containers]
        every: asyncio.Future[Any] = asyncio.gather(*tasks)
        ending: asyncio.Future[Any] = asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait([every, ending], return_when=asyncio.FIRST_COMPLETED)
            if not every.done():
                grace_s = self._grace_s()
                await asyncio.gather(*(container.stop(grace_s) for container in containers))
            await every
        finally:
            ending.cancel()
            every.cancel()
            await asyncio.gather(ending, *tasks, return_exceptions=True)

    def _grace_s(self) -> float:
        if self._vanished:
            return 0.0
        seconds = self._pod.metadata.deletion_grace_period_seconds
        return float(self._pod.spec.termination_grace_period_seconds if seconds is None else seconds)

    async def _make_sandbox(self) -> bool:
        """Try until it works or the pod is to end (False)."""
        pause_s = RETRY_FIRST_S
        while not self._ending.is_set():
            try:
                await self._sandbox.make()
            except (AmbientError, OSError) as fault:
                await self._sandbox_failed(fault)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._ending.wait()
                pause_s = min(pause_s * 2, RETRY_LONGEST_S)
            else:
                self.state.addresses, self.state.sandbox_ready, self.state.message = self._sandbox.addresses, True, ""
                self._changed()
                return True
        return False

    async def _sandbox_failed(self, fault: Exception) -> None:
        message = f"failed to create pod sandbox: {fault}"
        log.warning("%s: %s: %s", self._node.name, self._pod.key, message)
        self.state.message = message
        for container in (*self.state.init.values(), *self.state.containers.values()):
            container.message = message
        self._changed()
        await self._event("FailedCreatePodSandBox", message)
        await self._remove_sandbox()

    async def _remove_sandbox(self) -> None:
        """Until the plugins have done their DEL: an address must not be forgotten half."""
        pause_s = RETRY_FIRST_S
        while True:
            try:
                await self._sandbox.remove()
                return
            except (AmbientError, OSError) as fault:
                message = f"failed to stop pod sandbox: {fault}"
                log.warning("%s: %s: %s", self._node.name, self._pod.key, message)
                await self._event("FailedKillPod", message)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, RETRY_LONGEST_S)

    async def _publish_for_ever(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            if self._vanished:
                return
            status = build(self._pod, self.state, self._node.addresses, now_text())
            if _comparable(status) == _comparable(self._published):
                continue
            try:
                await self._client.patch(
                    POD, self._pod.name, {"status": status}, self._pod.namespace, subresource="status"
                )
                self._published = status
            except ApiStatus as refusal:
                if refusal.code == 404:
                    return
                log.warning("%s: status of %s: %s", self._node.name, self._pod.key, refusal)
            except AmbientError as fault:
                log.warning("%s: status of %s: %s", self._node.name, self._pod.key, fault)
                self._dirty.set()
                await asyncio.sleep(_PUBLISH_RETRY_S)

    async def _delete_object(self) -> None:
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}}
        path = POD.path(self._pod.namespace, self._pod.name)
        while not self._vanished:
            try:
                await self._client.request("DELETE", path, body=body)
                return
            except ApiStatus as refusal:
                if refusal.code in (404, 409):
                    return
                log.warning("%s: deleting %s: %s", self._node.name, self._pod.key, refusal)
            except AmbientError as fault:
                log.warning("%s: deleting %s: %s", self._node.name, self._pod.key, fault)
            await asyncio.sleep(_PUBLISH_RETRY_S)

    async def _event(self, reason: str, message: str) -> None:
        """Tell the user once; the same again is not news."""
        if message == self._said or self._vanished:
            return
        self._said = message
        pod, now = self._pod, now_text()
        reference = {"apiVersion": "v1", "kind": "Pod", "name": pod.name, "namespace": pod.namespace, "uid": self.uid}
        body = {
            "metadata": {"generateName": f"{pod.name[:40]}.", "namespace": pod.namespace},
            "involvedObject": reference,
            "reason": reason,
            "message": message[:1024],
            "type": "Warning",
            "source": {"component": "kubelet", "host": self._node.name},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self._client.create(EVENT, body, pod.namespace)
        except AmbientError as fault:
            log.debug("%s: event on %s: %s", self._node.name, pod.key, fault)


def _comparable(status: Mapping[str, Any]) -> str:
    """A status without the times at which it is told."""
    conditions = [{k: v for k, v in c.items() if k != "lastTransitionTime"} for c in status.get("conditions", ())]
    return json.dumps({**status, "conditions": conditions}, sort_keys=True)
