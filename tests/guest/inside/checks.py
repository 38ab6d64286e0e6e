"""What is to hold on Debian's kernel; collected only in the guest, by name (test_debian_kernel.py)."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

from ambient.io import bpf_links, netns
from tests.support.redirect import CAN, Duplex, enrol

FLOWS, BYTES = 16, 20_000_000


def test_the_kernel_is_debians():
    assert platform.release().startswith("6.1.")


def test_every_program_loads_and_redirection_is_possible(node):
    assert node.loader_said.startswith("loaded layout")
    assert "redirection is off" not in node.loader_said


def test_check_says_what_works_here(record_property):
    command = [sys.executable, "-m", "ambient", "check", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = {row["check"]: row for row in json.loads(done.stdout)["checks"]}
    for row in found.values():
        record_property(row["check"], f"{row['status']}: {row['detail']}")
    assert found["kernel is 5.15 or later"]["detail"].startswith("kernel 6.1.")
    for name in ("kernel has BTF", "cgroup2 is mounted", "same-node kernel path", "same-node redirection"):
        assert found[name]["status"] == "ok", found[name]
    # splice() reads redirected bytes out of order here, so they are not for applications that nobody vouches for.
    assert "acceleration auto means direct" in found["same-node redirection"]["detail"]


@pytest.fixture
def duplex(node, make_pod, duplex_binary):
    node.reset(acceleration=CAN)
    found = Duplex(node, enrol(make_pod()), enrol(make_pod()), duplex_binary)
    yield found
    found.close()


@pytest.mark.parametrize("family", [4, 6])
def test_sixteen_flows_of_twenty_megabytes_are_exact(node, duplex, family, record_property):
    """In all 20 MB, half of it each way; every byte is compared by both ends."""
    try:
        done = duplex.run(family=family, flows=FLOWS, total=BYTES // FLOWS // 2, size=16384)
    except subprocess.TimeoutExpired:
        for key, flow in node.maps.flows.items():
            print(key, flow)
        for pod in (duplex.client, duplex.server):
            netns.run_in_netns(pod.fd, lambda: subprocess.run(["ss", "-tinmoe"]))
        raise
    record_property("redirected_bytes", done.redirected)
    record_property("native_bytes", done.native)
    record_property("switches", done.switches)
    assert done.client["received"] + done.server["received"] == BYTES
    assert done.client["enomem"] == done.server["enomem"] == 0
    assert done.redirected > BYTES // 20
    assert done.switches > FLOWS


def test_pods_have_filters_where_the_kernel_has_no_tcx(node, make_pod):
    pod = enrol(make_pod())
    pins = [path.name for path in bpf_links.pod_dir(node.bpffs_dir, pod.name).glob("enrol-*")]
    assert [name.endswith("-filter") for name in pins] == [True]
    assert not (bpf_links.version_dir(node.bpffs_dir) / "links/sk_msg").exists(), "the map keeps the program"
