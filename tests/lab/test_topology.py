"""Names and addresses of labs: unique where the kernel shares them, the same where it does not."""

from __future__ import annotations

import ipaddress
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.errors import ConfigFault
from ambient.lab.topology import Lab, pod_link, sandbox_id

names = st.from_regex(r"[a-z]([a-z0-9-]{0,18}[a-z0-9])?", fullmatch=True)


@pytest.mark.parametrize("name", ["", "A", "1a", "a_b", "-a", "a-", "a.b", "../x", "a" * 21, "a/b"])
def test_a_name_that_could_be_another_path_or_namespace_is_refused(name: str) -> None:
    with pytest.raises(ConfigFault):
        Lab(name)


@pytest.mark.parametrize("nodes", [0, -1, 17])
def test_a_lab_has_one_to_sixteen_nodes(nodes: int) -> None:
    with pytest.raises(ConfigFault):
        Lab("a", nodes)


def namespaces(lab: Lab) -> set[str]:
    return {lab.underlay_netns, *(node.netns for node in lab.plans()), lab.pod_netns(sandbox_id("u", 1))}


@given(names, names)
def test_a_lab_owns_its_own_namespaces_and_never_those_of_another(one: str, other: str) -> None:
    mine, theirs = Lab(one, 2), Lab(other, 2)
    assert all(mine.owns_netns(name) for name in namespaces(mine))
    if one != other:
        assert not any(mine.owns_netns(name) for name in namespaces(theirs))
        assert mine.directory != theirs.directory and mine.cgroup != theirs.cgroup


@pytest.mark.parametrize(("one", "other"), [("a", "a-b"), ("a", "a-node1"), ("a", "a-underlay"), ("node1", "node")])
def test_labs_whose_names_begin_alike_do_not_claim_each_others_namespaces(one: str, other: str) -> None:
    assert not any(Lab(one).owns_netns(name) for name in namespaces(Lab(other)))
    assert not any(Lab(other).owns_netns(name) for name in namespaces(Lab(one)))


def test_what_a_smaller_lab_finds_of_an_earlier_larger_one_is_its_own() -> None:
    assert Lab("a", 1).owns_netns(Lab("a", 16).node(16).netns)


def test_nodes_share_no_address_and_no_range() -> None:
    lab = Lab("a", 16)
    nodes = lab.plans()
    assert len({address for node in nodes for address in node.addresses}) == 32
    ranges = [ipaddress.ip_network(cidr) for node in nodes for cidr in node.pod_cidrs]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(ranges, 2) if a.version == b.version)
    for node in nodes:
        assert ipaddress.ip_address(node.gateway4) in ipaddress.ip_network(node.pods4)
        assert ipaddress.ip_address(node.gateway6) in ipaddress.ip_network(node.pods6)
        assert all(
            any(
                ipaddress.ip_network(cidr).subnet_of(ipaddress.ip_network(wide))  # type: ignore[arg-type]
                for wide in lab.cluster_ranges
                if (":" in wide) == (":" in cidr)
            )
            for cidr in node.pod_cidrs
        )


def test_an_ipv4_lab_has_no_ipv6_anywhere() -> None:
    lab = Lab("a", 2, ipv6=False)
    assert not any(":" in text for text in (*lab.cluster_ranges, *lab.dns_addresses, lab.control6))
    for node in lab.plans():
        assert not any(":" in text for text in (*node.addresses, *node.pod_cidrs, node.gateway6))


def test_interface_names_fit_the_kernel() -> None:
    assert len(pod_link(sandbox_id("a-very-long-uid" * 10, 999))) <= 15
    assert all(len(node.underlay_port) <= 15 for node in Lab("a" * 20, 16).plans())


def test_each_attempt_at_a_pod_has_its_own_sandbox() -> None:
    assert len({sandbox_id("uid", attempt) for attempt in range(100)} | {sandbox_id("uid2", 0)}) == 101
