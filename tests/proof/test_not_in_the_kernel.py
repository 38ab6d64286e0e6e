"""Where the kernel must not authorize, traffic within a node goes through ztunnel's mutual TLS.

By the mesh's setting strict_means_off, for STRICT destinations; and on a kernel that cannot close established
connections, for all. The agent of node1 is started again for each.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import msgspec
import pytest

from ambient.datapath.layout import LAYOUT
from ambient.io.bpf_maps import Maps
from ambient.lab.driver import eventually
from ambient.lab.mesh import files_of, write_settings
from tests.support.kernel_path import Counted, await_kernel_path
from tests.support.mesh import PORT, STRICT, Mesh, pod
from tests.support.processes import is_back, pid_of

pytestmark = [pytest.mark.lab, pytest.mark.net]


@pytest.fixture(scope="module")
def maps(mesh: Mesh) -> Iterator[Maps]:
    with Maps.open(mesh.settings("node1").bpffs_dir) as found:
        yield found


@pytest.fixture
def trio(mesh: Mesh, maps: Maps) -> Iterator[str]:
    """a talks to b, for which STRICT holds, and to c, all on node1."""
    strict = {**STRICT, "spec": {"selector": {"matchLabels": {"app": "b"}}, "mtls": {"mode": "STRICT"}}}
    with mesh.namespace(pod("a"), pod("b"), pod("c"), strict) as name:
        for server in ("b", "c"):
            await_kernel_path(mesh, maps, name, mesh.address(name, server), PORT)
        yield name


def restart_agent(mesh: Mesh, between: object = None) -> None:
    """Kill it; ``between`` happens while there is none."""
    holder = pid_of(mesh, "node1", "holder")
    os.kill(holder, signal.SIGSTOP)
    try:
        os.kill(pid_of(mesh, "node1", "agent"), signal.SIGKILL)
        if callable(between):
            between()
    finally:
        os.kill(holder, signal.SIGCONT)

    def back() -> bool:
        return is_back(mesh, "node1") and bool(mesh.agent("node1")["complete"])

    eventually(back, 30, "the agent to be back")


def path_of(mesh: Mesh, maps: Maps, namespace: str, server: str) -> str:
    """Which way a new connection took."""
    counted = Counted(maps)
    found = mesh.call(namespace, "a", mesh.address(namespace, server), PORT)
    if found.get("echoed") != "hello":
        return f"failed: {found}"
    took = {reason: counted[reason] for reason in ("kernel", "captured", "hbone", "ztunnel", "acceleration_off")}
    if took["kernel"]:
        return "kernel"
    if not took["captured"] or not took["acceleration_off"]:
        return f"for another reason: {took}"  # rights are being written anew
    line = eventually(lambda: line_of(mesh, found), 10, "the access log")
    ends = (("src", "a"), ("dst", server))
    identities = [f'{end}.identity="spiffe://cluster.local/ns/{namespace}/sa/{name}"' for end, name in ends]
    return "mtls" if "dst.hbone_addr=" in line and all(text in line for text in identities) else line


def line_of(mesh: Mesh, found: dict[str, object]) -> str:
    """What ztunnel says of the connection, from the client's side."""
    local = found["local"]
    assert isinstance(local, list)
    wanted = "connection complete", f"src.addr={local[0]}:{local[1]} ", 'direction="outbound"'
    return next((line for line in mesh.log("node1").splitlines() if all(text in line for text in wanted)), "")


@contextmanager
def strict_means_off(mesh: Mesh) -> Iterator[None]:
    path, before = files_of(mesh.plan("node1")).settings, mesh.settings("node1")
    write_settings(path, msgspec.structs.replace(before, strict_means_off=True))
    try:
        restart_agent(mesh)
        yield
    finally:
        write_settings(path, before)
        restart_agent(mesh)


def test_strict_means_off_takes_what_is_strict_through_mutual_tls(mesh: Mesh, maps: Maps, trio: str) -> None:
    assert path_of(mesh, maps, trio, "b") == "kernel", "by default STRICT is satisfied by the kernel"
    with strict_means_off(mesh):
        eventually(lambda: path_of(mesh, maps, trio, "b") == "mtls", 15, "mutual TLS to b")
        eventually(lambda: path_of(mesh, maps, trio, "c") == "kernel", 15, "the kernel's path to c")
        assert path_of(mesh, maps, trio, "b") == "mtls"
        # STRICT comes and goes
        mesh.remove(trio, "peerauthentication", "strict")
        eventually(lambda: path_of(mesh, maps, trio, "b") == "kernel", 15, "the kernel's path to b")
    eventually(lambda: path_of(mesh, maps, trio, "b") == "kernel", 15, "all to be as before")


@contextmanager
def kernel_that_cannot_close(mesh: Mesh, maps: Maps) -> Iterator[None]:
    """As the loader would have found it; see tests/bpf/test_load.py for how it finds that."""
    bit = LAYOUT["NO_DESTROY"]

    def say(cannot: bool) -> None:
        held = maps.settings
        assert held is not None
        maps.settings = replace(held, acceleration=held.acceleration & ~bit | (bit if cannot else 0))

    restart_agent(mesh, lambda: say(True))
    try:
        yield
    finally:
        restart_agent(mesh, lambda: say(False))


def test_a_kernel_that_cannot_close_connections_leaves_all_to_ztunnel_and_says_so(
    mesh: Mesh, maps: Maps, trio: str
) -> None:
    assert not [x for x in mesh.agent("node1")["problems"] if "SOCK_DESTROY" in x]
    with kernel_that_cannot_close(mesh, maps):
        for server in ("b", "c"):
            eventually(lambda s=server: path_of(mesh, maps, trio, s) == "mtls", 15, f"mutual TLS to {server}")
        assert [x for x in mesh.agent("node1")["problems"] if "SOCK_DESTROY" in x and "ztunnel" in x]
        (row,) = [r for r in mesh.rows("maps", "settings", "--node", "node1") if r["setting"] == "acceleration"]
        assert "no_destroy" in row["value"]
        steps = mesh.ambient("why", f"{trio}/a", f"{mesh.address(trio, 'b')}:{PORT}", "--lab", mesh.lab.name)
        assert "SOCK_DESTROY" in steps
    for server in ("b", "c"):
        eventually(lambda s=server: path_of(mesh, maps, trio, s) == "kernel", 15, f"the kernel's path to {server}")
