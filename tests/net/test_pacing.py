"""What an application and ztunnel say to each other stays in one kernel: only that is not paced."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from tests.net.test_delivery import deliver
from tests.support.require import require

pytestmark = [pytest.mark.net, pytest.mark.bpf]


def inside(pod, *command: str) -> str:
    namespace = f"--net=/proc/{os.getpid()}/fd/{pod.fd}"
    return subprocess.run(["nsenter", namespace, *command], check=True, capture_output=True, text=True).stdout


def algorithm(pod, which: str) -> str:
    """Congestion control of the one connection of the pod that matches."""
    (line,) = inside(pod, "ss", "-tiHO", "state", "established", which).splitlines()
    found = re.search(r"\b(reno|bbr|cubic)\b", line)
    assert found is not None, line
    return found[1]


@pytest.fixture
def paced():
    require("bbr")

    def make(pod) -> None:
        inside(pod, "sysctl", "-qw", "net.ipv4.tcp_congestion_control=bbr")

    return make


def test_a_captured_connection_is_not_paced_and_one_that_is_not_captured_is(node, a, b, paced):
    paced(a)
    app = a.puppet()
    app.connect(b.ip4, 80)
    accepted, _ = a.ztunnel_accept()
    assert algorithm(a, "dport = 15001") == "reno"
    app.listen("127.0.0.1", 8080)
    app.connect("127.0.0.1", 8080)
    assert algorithm(a, "dport = 8080") == "bbr"
    accepted.close()


def test_what_ztunnel_delivers_is_not_paced_by_the_application(node, b, paced):
    paced(b)
    app = b.puppet()
    listening = app.listen(b.ip4)
    sock = deliver(node, b)
    slot, _ = app.accept(listening)
    assert algorithm(b, "sport = 80") == "reno"
    sock.close()
    app.close(slot)
