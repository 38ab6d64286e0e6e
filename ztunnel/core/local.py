"""What the node itself knows: its enrolled pods, as the agent tells them.

The addresses of this node's pods belong to the agent. Where the World says otherwise it is out of date (the
control plane may be away while an address is given to another pod), and a decision that rests on it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ambient.model.address import IPAddress, parse_ip
from ambient.model.identity import Identity
from ambient.model.workload import Workload
from ambient.node.messages import Pod


def identity_of(pod: Pod) -> Identity:
    """Raises ValueError if the fields cannot form a SPIFFE ID."""
    return Identity(pod.trust_domain, pod.namespace, pod.service_account)


def is_same(pod: Pod, workload: Workload) -> bool:
    """Whether the World's workload is this pod, with this pod's identity."""
    return (workload.uid, workload.trust_domain, workload.namespace, workload.service_account) == (
        pod.workload_uid,
        pod.trust_domain,
        pod.namespace,
        pod.service_account,
    )


@dataclass(frozen=True, slots=True)
class Local:
    """Enrolled pods of this node by Kubernetes UID. Build with `Local.of`."""

    node: str
    pods: Mapping[str, Pod] = field(default_factory=dict)
    _owners: Mapping[IPAddress, str] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(node: str, pods: Iterable[Pod] = ()) -> Local:
        """Raises ValueError for an address that is none. A later pod takes an address from an earlier one."""
        by_uid: dict[str, Pod] = {}
        owners: dict[IPAddress, str] = {}
        for pod in pods:
            by_uid[pod.uid] = pod
            for address in pod.addresses:
                owners[parse_ip(address)] = pod.uid
        return Local(node, by_uid, owners)

    def put(self, pod: Pod) -> Local:
        """Raises ValueError for an address that is none."""
        return Local.of(self.node, (*(p for p in self.pods.values() if p.uid != pod.uid), pod))

    def remove(self, uid: str) -> Local:
        return Local.of(self.node, (p for p in self.pods.values() if p.uid != uid))

    def addresses(self) -> frozenset[IPAddress]:
        return frozenset(self._owners)

    def owner(self, address: IPAddress) -> Pod | None:
        """The enrolled pod of this node that has the address now."""
        uid = self._owners.get(address)
        return self.pods[uid] if uid is not None else None

    def contradicts(self, workload: Workload, address: IPAddress) -> bool:
        """Whether this node gave the address to another pod than the World says."""
        pod = self.owner(address)
        return pod is not None and not is_same(pod, workload)
