"""Label flips under steady load: no request fails, in PERMISSIVE and in STRICT with enrolled callers."""

from __future__ import annotations

import pytest

from ambient.lab.driver import eventually
from tests.lab.meshed import LABEL, REDIRECTION, MeshedLab
from tests.lab.test_mesh_strict import STRICT

pytestmark = [pytest.mark.lab]


def test_no_request_fails_while_the_namespace_goes_in_and_out_of_the_mesh(mesh: MeshedLab) -> None:
    before = mesh.pids("shop")
    try:
        with mesh.load("http://catalog/whoami") as far, mesh.load("http://cart/whoami") as near:
            for _ in range(3):
                mesh.unenrol("shop")
                mesh.enrol("shop")
            results = far.result(), near.result()
    finally:
        mesh.enrol("shop")
    for result in results:
        assert result["failures"] == 0, result
        assert result["answered"] > 100
    assert mesh.pids("shop") == before


def test_no_request_of_an_enrolled_caller_fails_while_a_strict_destination_flips(mesh: MeshedLab) -> None:
    mesh.apply(STRICT)
    catalog = mesh.driver.pods("shop")["catalog"]["metadata"]["name"]
    try:
        with mesh.load("http://catalog/whoami") as load:
            for _ in range(3):
                mesh.driver.kubectl(
                    "label", "pod", "-n", "shop", catalog, "istio.io/dataplane-mode=none", "--overwrite"
                )
                await_pod(mesh, catalog, False)
                mesh.driver.kubectl("label", "pod", "-n", "shop", catalog, f"{LABEL}-")
                await_pod(mesh, catalog, True)
            result = load.result()
    finally:
        mesh.driver.kubectl("label", "pod", "-n", "shop", catalog, f"{LABEL}-")
        await_pod(mesh, catalog, True)
    assert result["failures"] == 0, result
    assert result["answered"] > 100


def await_pod(mesh: MeshedLab, name: str, enrolled: bool) -> None:
    def so() -> bool:
        annotations = mesh.driver.get("pod", "-n", "shop", name)["metadata"].get("annotations", {})
        return (annotations.get(REDIRECTION) == "enabled") is enrolled

    eventually(so, 20, f"{name} to be {'in' if enrolled else 'out of'} the mesh")
