"""A lab with the whole mesh for the proof tests: one lab for the session, a namespace of its own for each test.

A test describes its pods with `Mesh.namespace`; they run the small servers and clients of tests/proof/apps as
host processes. Nothing is faked: the control plane, agents, ztunnels, CNI plugin and programs are the product's.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ambient.io.admin_client import ask_json
from ambient.lab.driver import Driver, eventually
from ambient.lab.mesh import files_of
from ambient.settings import NodeSettings, read_settings

APPS = Path(__file__).resolve().parents[1] / "proof" / "apps"
ECHO = ["python3", str(APPS / "echo.py")]
IDLE = ["sleep", "infinity"]
PORT = 8080
LABEL = "istio.io/dataplane-mode"
REDIRECTION = "ambient.istio.io/redirection"

_numbers = itertools.count(1)


def pod(
    name: str,
    node: str = "node1",
    account: str | None = None,
    command: Sequence[str] = ECHO,
    probe: Mapping[str, Any] | None = None,
    **metadata: Any,
) -> dict[str, Any]:
    """A pod with a service account of its own name; an echo server on 8080 unless told otherwise."""
    container: dict[str, Any] = {"name": "main", "image": "none", "command": list(command)}
    if probe is not None:
        container["readinessProbe"] = dict(probe)
    elif list(command) == ECHO:
        container["readinessProbe"] = {"tcpSocket": {"port": PORT}, "periodSeconds": 1, "failureThreshold": 1}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}, **metadata},
        "spec": {
            "nodeName": node,
            "serviceAccountName": account or name,
            "terminationGracePeriodSeconds": 0,
            "containers": [container],
        },
    }


def service(name: str, app: str | None = None, port: int = 80, **spec: Any) -> dict[str, Any]:
    """A dual-stack service in front of the pods labelled ``app``."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "ipFamilyPolicy": "PreferDualStack",
            "selector": {"app": app or name},
            "ports": [{"name": "main", "port": port, "targetPort": PORT}],
            **spec,
        },
    }


def authorization(name: str, action: str, app: str | None, *principals: str) -> dict[str, Any]:
    """An AuthorizationPolicy on source principals, selecting one app or the whole namespace."""
    spec: dict[str, Any] = {"action": action, "rules": [{"from": [{"source": {"principals": list(principals)}}]}]}
    if app is not None:
        spec["selector"] = {"matchLabels": {"app": app}}
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": name},
        "spec": spec,
    }


STRICT = {
    "apiVersion": "security.istio.io/v1",
    "kind": "PeerAuthentication",
    "metadata": {"name": "strict"},
    "spec": {"mtls": {"mode": "STRICT"}},
}


class Mesh(Driver):
    """The driver of the session's lab, with what tests say often."""

    def up(self, files: Sequence[str | Path], *options: str, echo: bool = False) -> None:
        """Ready when every agent is: on a busy machine that takes longer than the lab's own patience."""
        super().up(files, *options, echo=echo)
        for node in self.lab.plans():
            eventually(lambda n=node.name: self.agent(n)["ready"], 120, f"the agent of {node.name}")

    @contextmanager
    def namespace(self, *objects: Mapping[str, Any], enrolled: bool = True) -> Iterator[str]:
        """Create the objects in a fresh namespace, wait until its pods are ready (and enrolled), remove it after."""
        name = f"t{next(_numbers)}"
        labels = {LABEL: "ambient"} if enrolled else {}
        accounts = {o["spec"]["serviceAccountName"] for o in objects if o["kind"] == "Pod"}
        head = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}]
        head += [
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": a, "namespace": name}}
            for a in sorted(accounts)
        ]
        try:
            self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(head))
            self.apply(name, *objects)
            wanted = {o["metadata"]["name"] for o in objects if o["kind"] == "Pod"}
            if wanted:
                self.await_ready(name, wanted, enrolled)
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--wait=false", check=False)

    def await_ready(self, namespace: str, names: set[str], enrolled: bool) -> None:
        def ready() -> bool:
            found = {p["metadata"]["name"]: p for p in self.get("pods", "-n", namespace)["items"]}
            return all(n in found and is_ready(found[n]) and (not enrolled or is_enrolled(found[n])) for n in names)

        eventually(ready, 40, f"pods {sorted(names)} of {namespace} to be ready{' and enrolled' if enrolled else ''}")

    def apply(self, namespace: str, *objects: Mapping[str, Any]) -> None:
        documents = [{**o, "metadata": {**o["metadata"], "namespace": namespace}} for o in objects]
        if documents:
            self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(documents))

    def remove(self, namespace: str, kind: str, name: str) -> None:
        self.kubectl("delete", kind, name, "-n", namespace)

    def label(self, namespace: str, enrolled: bool) -> None:
        self.kubectl("label", "namespace", namespace, f"{LABEL}=ambient" if enrolled else f"{LABEL}-", "--overwrite")

    def address(self, namespace: str, name: str, family: int = 4) -> str:
        """A pod's IPv4 or IPv6 address."""
        ips = [entry["ip"] for entry in self.get("pod", name, "-n", namespace)["status"]["podIPs"]]
        return next(ip for ip in ips if (":" in ip) is (family == 6))

    def vip(self, namespace: str, name: str, family: int = 4) -> str:
        ips: list[str] = self.get("service", name, "-n", namespace)["spec"]["clusterIPs"]
        return next(ip for ip in ips if (":" in ip) is (family == 6))

    def call(self, namespace: str, client: str, host: str, port: int = 80, *options: str) -> dict[str, Any]:
        """Open a connection to the echo server and report both ends: {local, peer, seen, echoed} or {error}."""
        command = ["python3", str(APPS / "call.py"), *options, host, str(port)]
        text = self.exec(namespace, client, *command, check=False).strip()
        found: dict[str, Any] = json.loads(text.splitlines()[-1]) if text else {"error": "no answer"}
        return found

    def node_dir(self, node: str) -> Path:
        return Path(files_of(self.plan(node)).run_dir)

    def plan(self, node: str) -> Any:
        return next(p for p in self.lab.plans() if p.name == node)

    def dump(self, node: str) -> dict[str, Any]:
        """ztunnel's configuration dump."""
        found: dict[str, Any] = ask_json(self.node_dir(node) / "ztunnel.sock", "/config_dump")
        return found

    def agent(self, node: str) -> dict[str, Any]:
        """The agent's status: pods, programs, whether it is ready."""
        found: dict[str, Any] = ask_json(self.node_dir(node) / "agent.sock", "/status")
        return found

    def settings(self, node: str) -> NodeSettings:
        path = files_of(self.plan(node)).settings
        return read_settings(NodeSettings, path.read_text(), str(path))

    def log(self, process: str) -> str:
        """What a node (agent, ztunnel, holder) or the control plane wrote."""
        return self.ambient("lab", "logs", "--name", self.lab.name, process)

    def await_policy(self, node: str, key: str, there: bool = True) -> None:
        """Wait until a node's ztunnel knows a policy, or no longer does."""

        def known() -> bool:
            return any(f"{p['namespace']}/{p['name']}" == key for p in self.dump(node)["policies"]) is there

        eventually(known, 15, f"policy {key} to {'arrive at' if there else 'leave'} {node}")


def is_ready(found: Mapping[str, Any]) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in found["status"].get("conditions", []))


def is_enrolled(found: Mapping[str, Any]) -> bool:
    return bool(found["metadata"].get("annotations", {}).get(REDIRECTION) == "enabled")
