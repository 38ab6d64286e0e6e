"""Fifty thousand short connections within a node leave nothing behind, and each is counted once."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from pathlib import Path

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import FlowValue, TupleKey
from ambient.io import cgroup, netns
from ambient.io.flow_reader import FlowReader
from tests.support.flows import closed, swept
from tests.support.netlab import Pod, until
from tests.support.redirect import CAN, enrol
from tests.support.require import require
from tests.support.storage import Pending

pytestmark = [pytest.mark.net, pytest.mark.bpf]

PORT, PORTS = 9100, 4
ROUNDS = 5
"""Of a message there and back: a connection can be redirected from the fourth on."""
DIRECT, REDIRECTED = 40_000, 10_000
AT_ONCE = {DIRECT: 700, REDIRECTED: 300}
MESSAGE = 64


@pytest.fixture(scope="session")
def many_binary(tmp_path_factory) -> Path:
    require("gcc")
    binary = tmp_path_factory.mktemp("many") / "many"
    source = Path(__file__).parent / "clients/many.c"
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-O1", "-o", binary, source], check=True)
    return binary


@pytest.fixture
def start(many_binary):
    """Call it with a pod and words: that client runs there."""
    running: list[subprocess.Popen[str]] = []

    def begin(pod: Pod, *words: object) -> subprocess.Popen[str]:
        def place() -> None:
            cgroup.move(0, pod.cgroup)
            netns._enter(pod.fd)

        argv = [many_binary, *map(str, words)]
        running.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, preexec_fn=place))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def loaded_node(netlab):
    """A node of its own: sockets that other tests left may hold records for a while."""
    own = netlab.node("leak")
    yield own
    own.close()
    netlab.nodes.remove(own)


@pytest.fixture
def pending(node):
    found = Pending(node.bpffs_dir)
    yield found
    found.close()


def bytes_of(flow: FlowValue, kind: str) -> int:
    return int(getattr(flow.client, f"{kind}_bytes") + getattr(flow.server, f"{kind}_bytes"))


def test_every_connection_is_counted_once_and_no_map_keeps_anything(node, make_pod, start, pending, record_property):
    node.reset(acceleration=CAN)
    client, fast, plain = enrol(make_pod()), enrol(make_pod()), make_pod()
    plain.enrol(
        flags=LAYOUT["ENROLLED_DIRECT"],
        workload_flags=LAYOUT["WORKLOAD_DIRECT"] | LAYOUT["WORKLOAD_ALLOW_ANY"],
    )
    with netns.in_netns(client.fd):
        Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("1024 65535")
    counted = node.counted()
    reader = FlowReader(node.maps)
    closed(reader)
    dialling: list[subprocess.Popen[str]] = []
    serving: list[subprocess.Popen[str]] = []
    began = time.monotonic()
    for pod, connections in ((plain, DIRECT), (fast, REDIRECTED)):
        server = start(pod, "serve", pod.ip4, PORT, PORTS, connections)
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        serving.append(server)
        dialling.append(start(client, "dial", pod.ip4, PORT, PORTS, connections, AT_ONCE[connections], ROUNDS))
    flows: dict[tuple[TupleKey, int], FlowValue] = {}
    reported = 0
    most = 0

    def take(*, over: bool = False) -> None:
        nonlocal reported
        for event in (*closed(reader), *(swept(reader) if over else ())):
            flows[event.key, event.value.created_ns] = event.value
            reported += 1

    while running := [process for process in (*dialling, *serving) if process.poll() is None]:
        with contextlib.suppress(subprocess.TimeoutExpired):
            running[0].wait(0.05)
        node.beat()
        most = max(most, pending.count())
        take()
    said = [json.loads(process.communicate()[0]) for process in dialling]
    until(lambda: take(over=True) or reported >= DIRECT + REDIRECTED, "every flow is reported", 10)
    seconds = time.monotonic() - began
    reader.close()
    redirected, native = (sum(bytes_of(flow, kind) for flow in flows.values()) for kind in ("redirect", "native"))
    share = sum(bytes_of(flow, "redirect") > 0 for flow in flows.values())
    text = (
        f"{reported} flows in {seconds:.1f} s, at most {sum(one['most'] for one in said)} at once and {most} records "
        f"in sockets; {share} redirected; {redirected} bytes redirected, {native} native; "
        f"{counted('flow_unreported')} found the ring buffer full"
    )
    print(text)
    record_property("leak", text)
    assert [(one["over"], one["failed"]) for one in said] == [(DIRECT, 0), (REDIRECTED, 0)]
    assert sum(one["most"] for one in said) <= 1000
    assert reported == len(flows) == DIRECT + REDIRECTED, "each once"
    assert redirected + native == (DIRECT + REDIRECTED) * ROUNDS * MESSAGE * 2, "and every byte of it"
    assert share > REDIRECTED // 10
    assert most > 0, "the counter of records sees them"
    assert (counted("kernel"), counted("captured")) == (2 * (DIRECT + REDIRECTED), 0)
    for pod in (fast, plain):
        # What is steered is at most a late segment of a connection that is over.
        pod.listeners["plaintext4"].settimeout(0)
        with pytest.raises(BlockingIOError):
            pod.listeners["plaintext4"].accept()
    until(lambda: not node.leftovers(), "redirects, authorized, origins and flows are empty")
    until(lambda: not node.maps.sockets.keys(), "sockets is empty")
    # A last FIN that met its connection gone is sent again, ever later.
    until(lambda: pending.count() == 0, "no socket holds a record", 30)
    assert [node.maps.enrolled[pod.cookie].flows for pod in (client, fast, plain)] == [0, 0, 0]
