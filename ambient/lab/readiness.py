"""Waiting until the pods of a lab are ready, with the reason at hand if they do not become so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ambient.io.kube import KubeClient
from ambient.io.reflector import Reflector
from ambient.lab.objects import Anything
from ambient.manifest.kinds import Changed, Kind
from ambient.manifest.objects import Slim


class _Waiting(Slim, frozen=True):
    reason: str = ""
    message: str = ""


class _State(Slim, frozen=True):
    waiting: _Waiting | None = None


class _ContainerStatus(Slim, frozen=True):
    name: str = ""
    state: _State = _State()


class _Condition(Slim, frozen=True):
    type: str = ""
    status: str = ""
    message: str = ""


class _PodStatus(Slim, frozen=True):
    phase: str = ""
    conditions: list[_Condition] | None = None
    container_statuses: list[_ContainerStatus] | None = None


class _Pod(Anything, frozen=True):
    status: _PodStatus = _PodStatus()

    @property
    def ready(self) -> bool:
        """Ready, ended well, or on its way out."""
        if self.metadata.deletion_timestamp or self.status.phase == "Succeeded":
            return True
        return any(c.type == "Ready" and c.status == "True" for c in self.status.conditions or ())

    def why_not(self) -> str:
        for container in self.status.container_statuses or ():
            if container.state.waiting is not None:
                return f"{container.state.waiting.reason} {container.state.waiting.message}".strip()
        for condition in self.status.conditions or ():
            if condition.status == "False" and condition.message:
                return condition.message
        return self.status.phase or "not scheduled yet"


class _DeploymentSpec(Slim, frozen=True):
    replicas: int | None = None


class _DeploymentStatus(Slim, frozen=True):
    ready_replicas: int = 0
    observed_generation: int = 0


class _Deployment(Anything, frozen=True):
    spec: _DeploymentSpec = _DeploymentSpec()
    status: _DeploymentStatus = _DeploymentStatus()

    @property
    def ready(self) -> bool:
        wanted = 1 if self.spec.replicas is None else self.spec.replicas
        return self.status.observed_generation >= self.metadata.generation and self.status.ready_replicas >= wanted

    def why_not(self) -> str:
        return f"{self.status.ready_replicas} of {self.spec.replicas} pods ready"


POD = Kind("Pod", "", "v1", "pods", True, _Pod)
DEPLOYMENT = Kind("Deployment", "apps", "v1", "deployments", True, _Deployment)


async def wait_ready(client: KubeClient, timeout_s: float, say: Callable[[str], None]) -> dict[str, str]:
    """Until every pod and Deployment is ready. Returns what is not, with reasons, after ``timeout_s``."""
    changed = asyncio.Event()

    def notice(_: Changed[Any]) -> None:
        changed.set()

    pods: Reflector[_Pod] = Reflector(client, POD, notice)
    deployments: Reflector[_Deployment] = Reflector(client, DEPLOYMENT, notice)
    told: set[str] = set()
    tasks = [asyncio.create_task(reflector.run()) for reflector in (pods, deployments)]
    try:
        async with asyncio.timeout(timeout_s):
            await pods.synced.wait()
            await deployments.synced.wait()
            while True:
                changed.clear()
                for pod in pods.objects.values():
                    if pod.ready and pod.key not in told:
                        told.add(pod.key)
                        say(f"pod {pod.key} is ready")
                if not _lacking(pods, deployments):
                    return {}
                await changed.wait()
    except TimeoutError:
        return _lacking(pods, deployments)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _lacking(pods: Reflector[_Pod], deployments: Reflector[_Deployment]) -> dict[str, str]:
    lacking = {f"pod {pod.key}": pod.why_not() for pod in pods.objects.values() if not pod.ready}
    return lacking | {f"deployment {d.key}": d.why_not() for d in deployments.objects.values() if not d.ready}
