"""Two nodes on one kernel: each has its own programs, maps and pods, and neither touches the other's."""

from __future__ import annotations

import pytest

from ambient.io import bpf_links, cgroup
from tests.support.netlab import until

pytestmark = [pytest.mark.net, pytest.mark.bpf]


@pytest.fixture(scope="module")
def second(netlab):
    node = netlab.node("n2")
    yield node
    node.close()
    netlab.nodes.remove(node)


def test_each_node_captures_its_own_pods_into_its_own_maps(node, a, second):
    pod = second.pod("pod-1")
    try:
        pod.enrol()
        assert pod.cookie != a.cookie
        one, two = node.counted(), second.counted()
        app = pod.puppet()
        app.connect("10.96.0.1", 80)
        assert not node.leftovers()
        assert len(second.maps.redirects) == 1
        assert (one("captured"), two("captured")) == (0, 1)
        sock, cookie = pod.ztunnel_accept()
        assert node.maps.take_redirect(cookie) is None
        record = second.maps.take_redirect(cookie)
        assert record is not None and record.source == pod.workload
        sock.close()
        a.puppet().connect("10.96.0.1", 80)
        assert (one("captured"), two("captured")) == (1, 1)
        sock, cookie = a.ztunnel_accept()
        assert second.maps.take_redirect(cookie) is None
        assert node.maps.take_redirect(cookie) is not None
        sock.close()
    finally:
        pod.close()
    until(lambda: not second.leftovers(), "entries die on the second node too")


def test_the_kubelet_of_one_node_is_a_stranger_to_the_other(node, b, second):
    app = b.puppet()
    app.listen(b.ip4)
    other = node.puppet(node.fd, second.cgroup / "kubelet", second.puppets)
    other.connect(b.ip4, 80)
    b.listeners["plaintext4"].accept()[0].close()


def test_unloading_one_node_leaves_the_other(netlab, node, a):
    third = netlab.node("n3")
    bpf_links.unload(third.bpffs_dir)
    assert not third.bpffs_dir.exists()
    assert all(entry.target is None for entry in bpf_links.attachments(third.bpffs_dir))
    ids = {"node": cgroup.cgroup_id(node.cgroup), "pods": cgroup.cgroup_id(node.cgroup / "kubepods")}
    assert all(entry.target == ids[entry.where] for entry in bpf_links.attachments(node.bpffs_dir))
    a.puppet().connect("10.96.0.1", 80)
    sock, cookie = a.ztunnel_accept()
    assert node.maps.take_redirect(cookie) is not None
    sock.close()
    third.close()
    netlab.nodes.remove(third)
