"""A lab with the mesh, driven from outside: enrolment, requests from pods, load, processes to kill."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ambient.errors import AmbientError
from ambient.lab import record
from ambient.lab.driver import Driver, eventually
from ambient.lab.topology import NodePlan

ROOT = Path(__file__).parents[2]
SHOP = ROOT / "examples" / "shop.yaml"
GET = ROOT / "examples" / "shop" / "get.py"
LOAD = Path(__file__).with_name("load.py")
LABEL = "istio.io/dataplane-mode"
REDIRECTION = "ambient.istio.io/redirection"
_ENROL_S = 20.0


class Load:
    """Steady load that runs until `result` is asked for."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def result(self) -> dict[str, Any]:
        stdout, stderr = self._process.communicate("", timeout=30)
        assert self._process.returncode == 0, stderr
        found: dict[str, Any] = json.loads(stdout.splitlines()[-1])
        return found


class MeshedLab:
    def __init__(self, name: str) -> None:
        self.driver = Driver(name)
        self._applied: list[str] = []

    @property
    def name(self) -> str:
        return self.driver.lab.name

    def node(self, index: int) -> NodePlan:
        return self.driver.lab.node(index)

    def enrol(self, namespace: str) -> None:
        """Label the namespace and wait until all its pods are in the mesh."""
        self.driver.kubectl("label", "namespace", namespace, f"{LABEL}=ambient", "--overwrite")
        self.await_mode(namespace, True)

    def unenrol(self, namespace: str) -> None:
        self.driver.kubectl("label", "namespace", namespace, f"{LABEL}-")
        self.await_mode(namespace, False)

    def await_mode(self, namespace: str, enrolled: bool) -> None:
        def all_so() -> bool:
            pods = self.driver.get("pods", "-n", namespace)["items"]
            marks = [p["metadata"].get("annotations", {}).get(REDIRECTION) == "enabled" for p in pods]
            return bool(marks) and all(mark is enrolled for mark in marks)

        eventually(all_so, _ENROL_S, f"pods of {namespace} to be {'in' if enrolled else 'out of'} the mesh")

    def apply(self, manifest: str) -> None:
        """Until the end of the test."""
        self.driver.kubectl("apply", "-f", "-", stdin=manifest)
        self._applied.append(manifest)

    def restore(self) -> None:
        while self._applied:
            manifest = self._applied.pop()
            with contextlib.suppress(AmbientError):
                self.driver.kubectl("delete", "--ignore-not-found", "--wait=true", "-f", "-", stdin=manifest)

    def get(self, url: str, pod: str = "client", namespace: str = "shop", timeout_s: float = 10.0) -> dict[str, Any]:
        """One request from a pod: ``status``, ``answer``, ``local``, ``peer``, or ``error``."""
        words = ("python3", str(GET), "--timeout", str(timeout_s), url)
        found: dict[str, Any] = json.loads(self.driver.exec(namespace, pod, *words, check=False) or '{"error": "none"}')
        return found

    def get_from(self, netns: str, url: str, timeout_s: float = 5.0) -> dict[str, Any]:
        """The same from a namespace that is no pod."""
        argv = ["nsenter", f"--net=/run/netns/{netns}", "python3", str(GET), "--timeout", str(timeout_s), url]
        found: dict[str, Any] = json.loads(subprocess.run(argv, capture_output=True, timeout=30).stdout)
        return found

    def address(self, namespace: str, app: str, family: int = 4) -> str:
        addresses = [item["ip"] for item in self.driver.pods(namespace)[app]["status"]["podIPs"]]
        return next(a for a in addresses if (":" in a) == (family == 6))

    def pids(self, namespace: str) -> dict[str, str]:
        """Pod name -> the process of its first container."""
        return {
            pod["metadata"]["name"]: pod["status"]["containerStatuses"][0]["containerID"]
            for pod in self.driver.get("pods", "-n", namespace)["items"]
        }

    @contextlib.contextmanager
    def load(self, url: str, pod: str = "client", namespace: str = "shop") -> Iterator[Load]:
        """Steady load from a pod while the body runs."""
        argv = [sys.executable, "-m", "ambient", "lab", "exec", "--name", self.name, "-n", namespace, pod, "--"]
        process = subprocess.Popen(
            [*argv, "python3", str(LOAD), url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None and process.stdout.readline() == "started\n"
            yield Load(process)
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def pid(self, node: int, role: str) -> int:
        """Of a node's holder, agent or ztunnel; 0 if its file is not there."""
        try:
            return int((self.run_dir(node) / f"{role}.pid").read_text())
        except (OSError, ValueError):
            return 0

    def run_dir(self, node: int) -> Path:
        return Path(self.node(node).directory) / "run"

    def control_pid(self) -> int:
        rows = json.loads(self.driver.ambient("lab", "status", "--name", self.name, "-o", "json", check=False))
        return int(next(row["pid"] for row in rows if row["kind"] == "control") or 0)

    def children(self, pid: int) -> dict[str, int]:
        """Of a ztunnel: the name of each of its processes, and its ID."""
        found = {}
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                found[Path(f"/proc/{child}/comm").read_text().strip()] = int(child)
        return found

    def log(self, name: str) -> str:
        return self.driver.ambient("lab", "logs", "--name", self.name, name)

    def stop(self, process: str) -> None:
        self.driver.ambient("lab", "stop", "--name", self.name, process)

    def start(self, process: str) -> None:
        self.driver.ambient("lab", "start", "--name", self.name, process)

    def pod_record(self, namespace: str, name: str) -> record.PodRecord:
        return record.find_pod(record.read(self.name), namespace, name)

    def maps(self, name: str, node: int) -> list[dict[str, Any]]:
        return self.driver.rows("maps", name, "--node", self.node(node).name)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
