"""The networks of a lab: an underlay, nodes on it, a bridge for pods on each node, and routes between them.

Nothing is created in the host's own network namespace: every link is made inside the namespaces it joins, so
labs cannot see each other or the host. Pods have host addresses (/32, /128) and reach everything through their
node, also their neighbours on the bridge: service addresses are translated there, and an answer that went
around the node would not be translated back.
"""

from __future__ import annotations

from collections.abc import Sequence

from ambient.lab import commands
from ambient.lab.topology import NODE_LINK, POD_BRIDGE, PODS4, PODS6, UNDERLAY_BRIDGE, Lab, NodePlan

_ROUTER = {
    "net/ipv4/ip_forward": 1,
    "net/ipv4/conf/all/rp_filter": 0,
    "net/ipv4/conf/default/rp_filter": 0,
    "net/ipv4/conf/all/send_redirects": 0,
    "net/ipv4/conf/default/send_redirects": 0,
    # bridged packets are not the node's business: translation happens where they are routed
    "net/bridge/bridge-nf-call-iptables": 0,
    "net/bridge/bridge-nf-call-ip6tables": 0,
}
_ROUTER6 = {
    "net/ipv6/conf/all/forwarding": 1,
    "net/ipv6/conf/all/accept_dad": 0,
    "net/ipv6/conf/default/accept_dad": 0,
    "net/ipv6/conf/default/accept_ra": 0,
}
_NO_IPV6 = {"net/ipv6/conf/all/disable_ipv6": 1, "net/ipv6/conf/default/disable_ipv6": 1}


def create(lab: Lab) -> None:
    """Build everything but pods. PlatformFault if a part cannot be built; `remove` takes back what was."""
    for netns in (lab.underlay_netns, *(node.netns for node in lab.plans())):
        commands.run(["ip", "netns", "add", netns])
        commands.set_sysctls(netns, _ROUTER | (_ROUTER6 if lab.ipv6 else _NO_IPV6))
    commands.ip_batch(lab.underlay_netns, underlay_lines(lab))
    for node in lab.plans():
        commands.ip_batch(node.netns, node_lines(lab, node))


def underlay_lines(lab: Lab) -> Sequence[str]:
    """`ip` commands for the underlay's namespace; they make the nodes' links, too."""
    lines = [
        "link set lo up",
        f"link add {UNDERLAY_BRIDGE} address {_mac(lab.control4)} type bridge",
        f"link set {UNDERLAY_BRIDGE} up",
        f"addr add {lab.control4}/24 dev {UNDERLAY_BRIDGE}",
    ]
    if lab.ipv6:
        lines.append(f"addr add {lab.control6}/64 dev {UNDERLAY_BRIDGE} nodad")
    for node in lab.plans():
        peer = f"peer name {NODE_LINK} netns {commands.netns_path(node.netns)}"
        lines += [
            f"link add {node.underlay_port} type veth {peer}",
            f"link set {node.underlay_port} master {UNDERLAY_BRIDGE} up",
        ]
    return lines


def node_lines(lab: Lab, node: NodePlan) -> Sequence[str]:
    """`ip` commands for one node: addresses, the pods' bridge, the cluster's DNS address, routes."""
    lines = [
        "link set lo up",
        f"link set {NODE_LINK} up",
        f"addr add {node.address4}/24 dev {NODE_LINK}",
        f"link add {POD_BRIDGE} address {_mac(node.gateway4)} type bridge",
        f"link set {POD_BRIDGE} up",
        f"addr add {node.gateway4}/32 dev {POD_BRIDGE}",
        # the node's own connections to pods (probes) show the address that masqueraded ones show
        f"route add {node.pods4} dev {POD_BRIDGE} src {node.address4}",
        f"route add default via {lab.control4}",
    ]
    lines += [f"addr add {address}/{32 if ':' not in address else 128} dev lo" for address in lab.dns_addresses]
    others = [other for other in lab.plans() if other != node]
    lines += [f"route add {other.pods4} via {other.address4}" for other in others]
    lines.append(f"route add unreachable {PODS4}")
    if lab.ipv6:
        lines += [
            f"addr add {node.address6}/64 dev {NODE_LINK} nodad",
            f"addr add {node.gateway6}/128 dev {POD_BRIDGE} nodad",
            f"route add {node.pods6} dev {POD_BRIDGE} src {node.address6}",
            f"route add default via {lab.control6}",
        ]
        lines += [f"route add {other.pods6} via {other.address6}" for other in others]
        lines.append(f"route add unreachable {PODS6}")
    return lines


def _mac(address4: str) -> str:
    """A fixed address for a bridge: one that is left to itself takes the lowest of its ports', so a new pod could
    change it, and the other pods would send to the old one until their neighbour entries time out."""
    return ":".join(["0a", "58", *(f"{int(part):02x}" for part in address4.split("."))])


def remove(lab: Lab) -> int:
    """Delete every network namespace of the lab that is found by name; links go with them. Returns how many."""
    found = [name for name in commands.netns_names() if lab.owns_netns(name)]
    for name in found:
        commands.run(["ip", "netns", "del", name], check=False)
    return len(found)
