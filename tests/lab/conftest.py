"""One lab with the whole mesh and the shop enrolled, for all tests that leave it as they found it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lab.meshed import SHOP, MeshedLab
from tests.support.require import require


@pytest.fixture(scope="session")
def shared_mesh() -> Iterator[MeshedLab]:
    require("lab", "kubectl", "tcpdump")
    lab = MeshedLab(f"mesh-{os.getpid()}")
    try:
        lab.driver.up([SHOP])
        lab.enrol("shop")
        yield lab
    finally:
        lab.driver.down()


@pytest.fixture
def mesh(shared_mesh: MeshedLab) -> Iterator[MeshedLab]:
    yield shared_mesh
    shared_mesh.restore()
