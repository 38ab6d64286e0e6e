"""The scheduler's choice of a node as a table, and what it makes of pods on a store."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.lab.apiserver.schema import NODE, POD
from ambient.lab.apiserver.store import Store
from ambient.lab.controllers.scheduler import Unschedulable, choose_node
from tests.lab_api.objects import lawful, node, pod, settle

NODES = [node("n1"), node("n2"), node("n3")]


@pytest.mark.parametrize(
    ("spec", "nodes", "chosen"),
    [
        ({}, NODES, "n1"),
        ({"nodeSelector": {"kubernetes.io/hostname": "n2"}}, NODES, "n2"),
        ({"nodeSelector": {"disk": "ssd"}}, NODES, "didn't match Pod's node affinity/selector"),
        ({}, [node("n1", unschedulable=True)], "were unschedulable"),
        ({}, [node("n1", taints=[{"key": "a", "effect": "NoSchedule"}]), node("n2")], "n2"),
        (
            {"tolerations": [{"key": "a", "operator": "Exists"}]},
            [node("n1", taints=[{"key": "a", "effect": "NoSchedule"}])],
            "n1",
        ),
        ({}, [node("n1", taints=[{"key": "a", "effect": "NoExecute"}])], "had untolerated taint {a: }"),
        ({}, [], "no nodes"),
        ({}, [{**node("n1"), "status": {}}], "were not ready"),
        (
            {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["n3"]}]}
            ]}}}},
            NODES,
            "n3",
        ),
        (
            {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                {"matchExpressions": [{"key": "x", "operator": "Gt", "values": ["1"]}]}
            ]}}}},
            NODES,
            "didn't match",
        ),
        (
            {"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{}]}}},
            NODES,
            "podAntiAffinity is not supported",
        ),
    ],
)  # fmt: skip
def test_a_node_is_chosen_or_the_reason_is_told(spec: Any, nodes: Any, chosen: str) -> None:
    found = choose_node(pod(**spec), nodes, [])
    if isinstance(found, Unschedulable):
        assert chosen in found.why
    else:
        assert found == chosen


@lawful
@given(st.integers(1, 4), st.integers(0, 12))
def test_pods_of_one_owner_are_spread_evenly(nodes: int, pods: int) -> None:
    names = [node(f"n{number}") for number in range(nodes)]
    placed: list[Any] = []
    for number in range(pods):
        one = pod(f"p{number}")
        one["metadata"]["ownerReferences"] = [{"uid": "owner"}]
        chosen = choose_node(one, names, placed)
        assert isinstance(chosen, str)
        one["spec"]["nodeName"] = chosen
        placed.append(one)
    counts = [sum(p["spec"]["nodeName"] == n["metadata"]["name"] for p in placed) for n in names]
    assert max(counts) - min(counts) <= 1


def test_a_pod_that_names_its_node_is_left_alone_and_one_that_fits_nowhere_says_so(two_nodes: Store) -> None:
    two_nodes.create(POD, "default", pod("named", nodeName="n2"))
    two_nodes.create(POD, "default", pod("homeless", nodeSelector={"disk": "ssd"}))
    settle(two_nodes)
    assert two_nodes.get(POD, "default", "named")["spec"]["nodeName"] == "n2"
    condition = two_nodes.get(POD, "default", "homeless")["status"]["conditions"][0]
    assert (condition["reason"], condition["status"]) == ("Unschedulable", "False")
    two_nodes.modify(NODE, "", "n1", lambda o: o["metadata"]["labels"].update(disk="ssd"))
    settle(two_nodes)
    assert two_nodes.get(POD, "default", "homeless")["spec"]["nodeName"] == "n1"
