"""The demo, as a user runs it: every step checks itself, so its exit code is the verdict."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ambient.lab.topology import Lab
from tests.support.require import require

pytestmark = [pytest.mark.lab, pytest.mark.net]


def test_every_step_of_the_demo_is_as_said_and_both_ways_within_a_node_are_shown() -> None:
    require("lab", "kubectl", "tcpdump")
    name = f"d{os.getpid()}"
    argv = [sys.executable, "-m", "ambient", "demo", "--name", name]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "All as said" in done.stdout and not Path(Lab(name).directory).exists()
    # NODE PATH DIRECTION SOURCE DESTINATION ... REDIRECTED AGE, where a direction may be missing
    rows = [line.split() for line in done.stdout.splitlines() if " shop/client " in line]
    paths = {
        destination.partition("-")[0]: (row[1], int(row[-2]))
        for row in rows
        for source, destination in itertools.pairwise(row)
        if source == "shop/client" and destination.startswith("shop/")
    }
    if "redirection is off on this kernel" not in done.stdout:
        assert paths["shop/cart"][0] == "redirect" and paths["shop/cart"][1] > 0
    assert paths["shop/catalog"] == ("ztunnel", 0)
    assert "shop/frontend" in paths
