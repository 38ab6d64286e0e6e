"""Processes that hold private keys leave no core dump."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_PROBE = """
import ctypes, os, resource, sys
def probe(*_):
    pid = os.fork()
    if pid:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    dumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
    os._exit(int(dumpable != 0 or resource.getrlimit(resource.RLIMIT_CORE) != (0, 0)))
"""
_ZTUNNEL = """
from ambient.settings import NodeSettings
from ztunnel.io import run
run.Parent.run = probe
run.run_parent(NodeSettings(node_name="n"))
"""
_CONTROL = """
import pathlib, tempfile
from ambient.io import run_control
run_control._main = lambda settings: None
run_control.asyncio.run = probe
with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
    file.write("data_dir: /tmp\\n")
    file.flush()
    sys.exit(run_control.main(["--config", file.name]) + 3)
"""


@pytest.mark.parametrize("body", [_ZTUNNEL, _CONTROL], ids=["ztunnel", "control"])
def test_a_process_with_keys_and_its_children_leave_no_dumps(body: str, tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", _PROBE + body], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
