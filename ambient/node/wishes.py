"""What is asked of this node's pods: by their labels and annotations, by their namespaces' and by the operator.

Nothing is done here: `ambient.node.pods` compares these wishes with what is and acts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Final

from ambient.manifest import mesh as words
from ambient.manifest.acceleration import ACCELERATION, parse
from ambient.manifest.objects import Namespace, Pod
from ambient.manifest.pods import Enrol, Leave, NotEnrolled, enrolment
from ambient.node.kernel import Kernel
from ambient.node.member import Member
from ambient.node.records import Bypass, Records

ON_FAILURE: Final = "ambient.mesh/on-failure"
"""Annotation of a namespace: open or closed (the default)."""
ISTIO_CNI: Final = ("k8s-app", "istio-cni-node")

Verdict = Enrol | Leave | NotEnrolled
log = logging.getLogger(__name__)


class Wishes:
    """Of the pods in ``members``, by their UID. ``kernel`` gives None until it is there."""

    def __init__(self, records: Records, members: Mapping[str, Member], kernel: Callable[[], Kernel | None]) -> None:
        self._records = records
        self._members = members
        self._kernel = kernel
        self.namespaces: dict[str, Namespace] = {}
        self.synced = False
        """Whether the API has told of all pods and namespaces once."""

    def take_namespace(self, name: str, new: Namespace | None) -> bool:
        """Note what the API says of a namespace. True if something else may be asked of its pods now."""
        old = self.namespaces.get(name)
        if new is None:
            self.namespaces.pop(name, None)
        else:
            self.namespaces[name] = new
        return old is None or _asks(old) != _asks(new)

    def verdict(self, member: Member) -> Verdict | None:
        """None: not known (yet), leave everything as it is."""
        if member.api is None:
            return Leave() if self.synced and member.state != "enrolled" else None
        namespace = self.namespaces.get(member.record.namespace)
        if namespace is None and not self.synced:
            return None
        return self.judge(member.api, namespace)

    def judge(self, pod: Pod, namespace: Namespace | None) -> Verdict:
        verdict = enrolment(pod, namespace)
        if isinstance(verdict, Enrol) and self._istio_cni_here():
            return NotEnrolled("istio_cni", "istio-cni runs on this node and owns the label; remove one of the two")
        return verdict

    def _istio_cni_here(self) -> bool:
        key, value = ISTIO_CNI
        return any(
            x.api is not None and x.api.labels.get(key) == value and x.api.status.phase == "Running"
            for x in self._members.values()
        )

    # --- how an enrolled pod is to be treated

    def take_all(self, member: Member, namespace: Namespace | None = None) -> bool:
        """Note everything that is asked for an enrolled pod. True if any of it is something else than before.
        ``namespace`` is the pod's where the API's watch has not told of it yet."""
        return self._take_on_failure(member) | self.take_bypass(member) | self._take_acceleration(member, namespace)

    def _take_on_failure(self, member: Member) -> bool:
        """What the pod's namespace asks for when the agent fails."""
        namespace = self.namespaces.get(member.record.namespace)
        if namespace is None:
            return False
        wanted = namespace.annotations.get(ON_FAILURE) == "open"
        changed, member.record.open_on_failure = wanted != member.record.open_on_failure, wanted
        return changed

    def _take_acceleration(self, member: Member, namespace: Namespace | None) -> bool:
        """What pod and namespace ask for within the node."""
        namespace = self.namespaces.get(member.record.namespace, namespace)
        before = member.acceleration
        if member.api is not None and namespace is not None:
            wanted, problem = parse(member.api.annotations, namespace.annotations)
            if problem and problem != member.acceleration_problem:
                log.warning("pod %s: %s", member.title, problem)
            member.record.acceleration, member.acceleration_problem = wanted.value, problem
        kernel = self._kernel()
        member.auto_redirect = kernel is not None and kernel.auto_redirect
        return member.acceleration is not before

    def take_bypass(self, member: Member) -> bool:
        """Note whether the pod's namespace is bypassed. True if that is something else than before."""
        wanted = member.record.namespace in self.bypass().namespaces
        changed, member.record.bypass = wanted != member.record.bypass, wanted
        return changed

    def bypass(self) -> Bypass:
        """What an operator switched off; where nobody ever said anything, what the kernel holds."""
        known = self._records.bypass
        if known is None:
            kernel = self._kernel()
            return Bypass(node=kernel is not None and kernel.bypassed)
        return known


def _asks(namespace: Namespace | None) -> tuple[str, ...]:
    """What of a namespace matters here."""
    if namespace is None:
        return ()
    asked = (namespace.annotations.get(name, "") for name in (ON_FAILURE, ACCELERATION))
    return (namespace.labels.get(words.DATAPLANE_MODE, ""), *asked)
