"""One netlab for all tests of a session: the programs are compiled and loaded once."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import AuthorizedValue, TupleKey
from tests.support.netlab import Lab, Node, Pod, until
from tests.support.redirect import CAN, Held, enrol
from tests.support.require import require


@pytest.fixture(scope="session")
def netlab(tmp_path_factory):
    require("net", "bpf", "gcc")
    netlab = Lab(tmp_path_factory.mktemp("netlab"))
    yield netlab
    netlab.close()


@pytest.fixture(scope="session")
def duplex_binary(tmp_path_factory) -> Path:
    """tests/net/clients/duplex.c"""
    require("gcc")
    binary = tmp_path_factory.mktemp("duplex") / "duplex"
    source = Path(__file__).resolve().parents[1] / "net/clients/duplex.c"
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-O1", "-pthread", "-o", binary, source], check=True)
    return binary


@pytest.fixture(scope="session")
def loaded_node(netlab) -> Node:
    return netlab.node("n1")


@pytest.fixture
def node(loaded_node):
    """A node with default settings. Whatever a test did, no per-flow entry may be left in the kernel after it."""
    loaded_node.reset()
    yield loaded_node
    until(lambda: not loaded_node.leftovers(), f"entries die with their sockets: {loaded_node.leftovers()}")


@pytest.fixture
def make_pod(node):
    pods: list[Pod] = []

    def make(**arguments) -> Pod:
        pods.append(node.pod(**arguments))
        return pods[-1]

    yield make
    for puppet in [puppet for pod in pods for puppet in pod.puppets]:
        puppet.kill()
    # While both ends of a connection still have their interfaces, so that it can end.
    until(lambda: not len(node.maps.flows), f"flows end with their sockets: {node.maps.flows.items()}")
    for pod in pods:
        pod.close()


@pytest.fixture
def a(make_pod) -> Pod:
    """An enrolled pod."""
    pod = make_pod()
    pod.enrol()
    return pod


@pytest.fixture
def b(make_pod) -> Pod:
    """Another one."""
    pod = make_pod()
    pod.enrol()
    return pod


@pytest.fixture
def outside(make_pod):
    """A pod the mesh does not know."""
    return make_pod()


@pytest.fixture
def fill_authorized(node):
    """`authorized` is full for the duration of a test."""
    key, table = TupleKey("192.0.2.1", "192.0.2.2", 81, 1).encode(), node.maps.authorized.table
    value = AuthorizedValue(0, 0, 0, LAYOUT["REASON_ZTUNNEL"]).encode()
    table.update_many([(key[:32] + index.to_bytes(8, "big"), value) for index in range(1, 1 + table.info.max_entries)])
    yield
    node.maps.authorized.clear()


@pytest.fixture
def pods(node, make_pod):
    """Client and server of connections that may be redirected."""
    node.reset(acceleration=CAN)
    return enrol(make_pod()), enrol(make_pod())


@pytest.fixture
def held(node, pods):
    """A connection between them."""
    found = Held(node, *pods)
    yield found
    found.close()
