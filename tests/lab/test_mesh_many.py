"""1,000 connections at once through both ztunnels, random sizes, either side closing first: every byte arrives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.lab.meshed import MeshedLab

pytestmark = [pytest.mark.lab]

MANY = str(Path(__file__).with_name("many.py"))
COUNT = 1000


@pytest.mark.parametrize(("target", "family"), [("payments", 4), ("cart", 4), ("payments", 6)])
def test_a_thousand_connections_at_once_are_byte_exact(mesh: MeshedLab, target: str, family: int) -> None:
    address = mesh.address("shop", target, family)
    with mesh.driver.background("shop", f"deploy/{target}", "python3", MANY, "serve", "9000") as server:
        server.await_output("serving")
        command = ("python3", MANY, "call", address, "9000", str(COUNT))
        result = json.loads(mesh.driver.exec("shop", "client", *command, timeout_s=90))
    assert result["wrong"] == 0, result
    assert result["right"] == COUNT and result["bytes"] > 10_000_000
