"""Numbers that entries in the kernel have: none of them may be given to another name.

They are in names.json as well. Where that was lost, and the pins were not, this keeps verdicts, pods and flows from
coming to stand for somebody else.
"""

from __future__ import annotations

from ambient.io.bpf_maps import Maps
from ambient.node.records import Names


def begin_beyond(names: Names, maps: Maps) -> None:
    """Give new names only numbers beyond those in the maps. Raises BpfFault."""
    flows = [flow for _, flow in maps.flows.items()]
    enrolled = [pod for _, pod in maps.enrolled.items()]
    verdicts = maps.verdicts.items()
    names.workloads.begin_beyond(
        number
        for values in (
            (value.workload for _, value in maps.workloads.items()),
            (pod.workload for pod in enrolled),
            (key.workload for key, _ in verdicts),
            (number for flow in flows for number in (flow.source, flow.destination)),
        )
        for number in values
    )
    names.services.begin_beyond(value.service for _, value in maps.services.items())
    names.identities.begin_beyond(pod.identity for pod in enrolled)
    names.identities.begin_beyond(key.identity for key, _ in verdicts)
    names.identities.begin_beyond(flow.identity for flow in flows)
    names.policies.begin_beyond(value.policy for _, value in verdicts)
    names.policies.begin_beyond(flow.policy for flow in flows)
