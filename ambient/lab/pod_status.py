"""What a kubelet reports of a pod, out of what it knows of its containers. Pure; times come in as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ambient.lab.objects import Condition, Container, KubeletPod, plain

OWN_CONDITIONS = ("PodReadyToStartContainers", "Initialized", "ContainersReady", "Ready")


@dataclass(slots=True)
class ContainerState:
    """One container as it is now. ``pid`` is 0 while no process runs."""

    name: str
    image: str
    pid: int = 0
    started_at: str = ""
    finished_at: str = ""
    exit_code: int | None = None
    """Of the last run; negative numbers are signals."""
    restarts: int = 0
    reason: str = "ContainerCreating"
    message: str = ""
    ready: bool = False
    started: bool = False
    """Running, and its startup probe (if any) has succeeded."""

    @property
    def done(self) -> bool:
        return self.exit_code is not None and not self.pid


@dataclass(slots=True)
class PodState:
    """One pod as it is now."""

    addresses: tuple[str, ...] = ()
    sandbox_ready: bool = False
    message: str = ""
    """Why the sandbox is not ready."""
    init: dict[str, ContainerState] = field(default_factory=dict)
    containers: dict[str, ContainerState] = field(default_factory=dict)
    initialized: bool = False
    start_time: str = ""
    final: str = ""
    """Succeeded or Failed, once no container will run again."""


def new_state(pod: KubeletPod, now: str) -> PodState:
    def states(containers: Iterable[Container] | None) -> dict[str, ContainerState]:
        return {item.name: ContainerState(item.name, item.image) for item in containers or ()}

    init = states(pod.spec.init_containers)
    return PodState(init=init, containers=states(pod.spec.containers), initialized=not init, start_time=now)


def final_phase(pod: KubeletPod, state: PodState) -> str:
    """``Succeeded`` or ``Failed`` if every container has ended for good, else empty."""
    policy = pod.spec.restart_policy
    codes = [container.exit_code for container in state.containers.values() if container.done]
    if policy == "Always" or len(codes) < len(state.containers) or not codes:
        return ""
    failed = any(codes)
    if failed and policy == "OnFailure":
        return ""
    return "Failed" if failed else "Succeeded"


def restarts_again(policy: str, exit_code: int) -> bool:
    return policy == "Always" or (policy == "OnFailure" and exit_code != 0)


def build(pod: KubeletPod, state: PodState, host_addresses: Sequence[str], now: str) -> dict[str, Any]:
    """The status subresource to write: what this kubelet owns, and the conditions others wrote beside it."""
    ready = bool(state.containers) and all(c.ready for c in state.containers.values()) and not state.final
    running = any(c.pid or c.exit_code is not None for c in (*state.init.values(), *state.containers.values()))
    phase = state.final or ("Running" if running and state.initialized else "Pending")
    not_ready = "" if ready else _not_ready(state)
    own = {
        "PodReadyToStartContainers": (state.sandbox_ready, "", state.message),
        "Initialized": (state.initialized, "" if state.initialized else "ContainersNotInitialized", ""),
        "ContainersReady": (ready, "" if ready else "ContainersNotReady", not_ready),
        "Ready": (ready, "" if ready else "ContainersNotReady", not_ready),
    }
    if state.final:
        own = {name: (value, "PodCompleted" if not value else "", "") for name, (value, _, _) in own.items()}
    before = {condition.type: condition for condition in pod.status.conditions or ()}
    conditions = [plain(condition) for condition in before.values() if condition.type not in OWN_CONDITIONS]
    for name, (value, reason, message) in own.items():
        conditions.append(_condition(before.get(name), name, value, reason, message, now))
    return {
        "phase": phase,
        "conditions": conditions,
        "hostIP": host_addresses[0],
        "hostIPs": [{"ip": address} for address in host_addresses],
        "podIP": state.addresses[0] if state.addresses else None,
        "podIPs": [{"ip": address} for address in state.addresses] or None,
        "startTime": state.start_time,
        "initContainerStatuses": [_container(c) for c in state.init.values()] or None,
        "containerStatuses": [_container(c) for c in state.containers.values()],
    }


def _not_ready(state: PodState) -> str:
    names = [name for name, container in state.containers.items() if not container.ready]
    return f"containers with unready status: [{' '.join(names)}]"


def _condition(before: Condition | None, name: str, value: bool, reason: str, message: str, now: str) -> dict[str, str]:
    status = "True" if value else "False"
    since = before.last_transition_time if before is not None and before.status == status else None
    made = {"type": name, "status": status, "lastTransitionTime": since or now}
    return made | {key: text for key, text in (("reason", reason), ("message", message)) if text}


def _container(container: ContainerState) -> dict[str, Any]:
    ended = {}
    if container.exit_code is not None:
        ended = {
            "exitCode": container.exit_code if container.exit_code >= 0 else 128 - container.exit_code,
            "reason": "Completed" if container.exit_code == 0 else "Error",
            "startedAt": container.started_at if not container.pid else None,
            "finishedAt": container.finished_at,
        }
        ended = {key: value for key, value in ended.items() if value is not None}
    last: dict[str, Any] = {}
    now: dict[str, Any]
    if container.pid:
        now = {"running": {"startedAt": container.started_at}}
        last = {"terminated": ended} if ended else {}
    elif container.done and container.reason == "":
        now = {"terminated": ended}
    else:
        now = {"waiting": {"reason": container.reason} | ({"message": container.message} if container.message else {})}
        last = {"terminated": ended} if ended else {}
    return {
        "name": container.name,
        "image": container.image,
        "imageID": "",
        # the process ID is the identity of a container here: the same ID before and after is the same process
        "containerID": f"lab://{container.pid}" if container.pid else "",
        "ready": container.ready,
        "started": container.started,
        "restartCount": container.restarts,
        "state": now,
        "lastState": last,
    }
