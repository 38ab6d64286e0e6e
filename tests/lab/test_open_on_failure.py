"""Agent, holder and ztunnel of a node gone for good: a namespace that is open on failure goes on without the mesh."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.io.bpf_maps import Maps
from ambient.lab.driver import eventually
from ambient.manifest.acceleration import ACCELERATION
from ambient.node.wishes import ON_FAILURE
from tests.support.mesh import Mesh, pod, service
from tests.support.require import require

pytestmark = [pytest.mark.lab, pytest.mark.net]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    require("lab", "kubectl")
    found = Mesh(f"o{os.getpid()}", nodes=1)
    try:
        found.up([])
        yield found
    finally:
        found.down()


@pytest.mark.timeout(180)
def test_an_open_namespace_connects_again_after_the_heartbeat_stopped_and_a_closed_one_does_not(mesh: Mesh) -> None:
    pods = [pod("a"), pod("b"), service("b")]
    with mesh.namespace(*pods) as soft, mesh.namespace(*pods) as hard:
        mesh.kubectl("annotate", "namespace", soft, f"{ON_FAILURE}=open")
        for namespace in (soft, hard):  # within the kernel connections would do without the node's processes
            mesh.kubectl("annotate", "namespace", namespace, f"{ACCELERATION}=off")
        with Maps.open(str(mesh.lab.bpffs / "node1")) as maps:
            flags = lambda: [v.flags & LAYOUT["ENROLLED_OPEN"] for _, v in maps.enrolled.items()]  # noqa: E731
            eventually(lambda: sum(map(bool, flags())) == 2, 10, "the pods of the open namespace to be marked")
            for namespace in (soft, hard):
                assert mesh.call(namespace, "a", "b").get("echoed") == "hello"
            mesh.ambient("lab", "stop", "--name", mesh.lab.name, "node1")
            assert maps.settings is not None and maps.settings.heartbeat_timeout_s == 15
            bypassed = maps.counters().get("bypass", 0)
            soft_vip, hard_vip = mesh.vip(soft, "b"), mesh.vip(hard, "b")
            assert "error" in mesh.call(soft, "a", soft_vip)  # still captured, and nobody is there
            eventually(lambda: mesh.call(soft, "a", soft_vip).get("echoed") == "hello", 30, "the open namespace")
            assert maps.counters()["bypass"] > bypassed
            assert "error" in mesh.call(hard, "a", hard_vip)
            mesh.ambient("lab", "start", "--name", mesh.lab.name, "node1")
            eventually(lambda: mesh.call(hard, "a", hard_vip).get("echoed") == "hello", 60, "the node to serve again")
            eventually(lambda: mesh.call(soft, "a", "b").get("echoed") == "hello", 20, "the open namespace, captured")
            before = maps.counters().get("captured", 0)
            assert mesh.call(soft, "a", "b").get("echoed") == "hello"
            assert maps.counters()["captured"] > before
