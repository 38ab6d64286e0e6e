"""Who can get which identity from the running control plane: a node those of pods on it, a pod at most its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ambient.lab.mesh import files_of
from tests.support.mesh import Mesh, pod

pytestmark = [pytest.mark.lab, pytest.mark.net]

# Asks the CA with the settings of a node and prints the identity it got, or the refusal.
ASK = """
import asyncio, json, sys
from pathlib import Path
from ambient.errors import AmbientError
from ambient.io.ca_client import create_certificate, make_csr, make_key
from ambient.settings import NodeSettings, read_settings
import msgspec
settings = read_settings(NodeSettings, Path(sys.argv[1]).read_text(), sys.argv[1])
if sys.argv[3]:
    settings = msgspec.structs.replace(settings, token_file=sys.argv[3])
try:
    chain = asyncio.run(create_certificate(settings, sys.argv[2], make_csr(make_key(), sys.argv[2]), 3600))
    print(json.dumps({"certificates": len(chain)}))
except AmbientError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture(scope="module")
def pods(mesh: Mesh) -> Iterator[str]:
    with mesh.namespace(pod("one", "node1"), pod("two", "node2")) as name:
        yield name


def ask(mesh: Mesh, node: str, identity: str, token: Path | str = "") -> dict[str, object]:
    plan = mesh.plan(node)
    config = str(files_of(plan).settings)
    argv = ["ip", "netns", "exec", plan.netns, sys.executable, "-c", ASK, config, identity, str(token)]
    found: dict[str, object] = json.loads(mesh.run(argv))
    return found


def test_a_node_gets_the_identity_of_a_pod_that_runs_on_it(mesh: Mesh, pods: str) -> None:
    assert "certificates" in ask(mesh, "node1", f"spiffe://cluster.local/ns/{pods}/sa/one")
    assert "certificates" in ask(mesh, "node2", f"spiffe://cluster.local/ns/{pods}/sa/two")


@pytest.mark.parametrize(
    ("node", "account"), [("node1", "two"), ("node2", "one"), ("node1", "nobody")], ids=["other", "other-way", "nobody"]
)
def test_a_node_never_gets_the_identity_of_a_pod_elsewhere(mesh: Mesh, pods: str, node: str, account: str) -> None:
    refused = str(ask(mesh, node, f"spiffe://cluster.local/ns/{pods}/sa/{account}").get("error"))
    assert account in refused, refused
    assert node in refused, refused


def test_a_foreign_trust_domain_is_refused(mesh: Mesh, pods: str) -> None:
    assert "error" in ask(mesh, "node1", f"spiffe://elsewhere.example/ns/{pods}/sa/one")


def token_of(mesh: Mesh, namespace: str, account: str, pod_uid: str = "") -> str:
    """By TokenRequest, as the kubelet asks; bound to the pod named like the account if its UID is given."""
    spec: dict[str, object] = {"audiences": ["istio-ca"]}
    if pod_uid:
        spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", "name": account, "uid": pod_uid}
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
    answer = mesh.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(body))
    return str(json.loads(answer)["status"]["token"])


def test_a_token_that_is_bound_to_no_pod_gets_no_identity_not_even_its_own(
    mesh: Mesh, pods: str, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.write_text(token_of(mesh, pods, "one"))
    for account in ("one", "two"):
        refused = ask(mesh, "node1", f"spiffe://cluster.local/ns/{pods}/sa/{account}", path)
        assert "error" in refused, refused


def test_a_pods_bound_token_gets_its_own_identity_and_never_another(mesh: Mesh, pods: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    uid = mesh.get("pod", "one", "-n", pods)["metadata"]["uid"]
    path.write_text(token_of(mesh, pods, "one", uid))
    assert "certificates" in ask(mesh, "node1", f"spiffe://cluster.local/ns/{pods}/sa/one", path)
    assert "error" in ask(mesh, "node1", f"spiffe://cluster.local/ns/{pods}/sa/two", path)


@pytest.mark.parametrize(
    "token", ["", "garbage", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0."], ids=["none", "garbage", "alg-none"]
)
def test_without_a_valid_token_there_is_no_certificate(mesh: Mesh, pods: str, tmp_path: Path, token: str) -> None:
    path = tmp_path / "token"
    path.write_text(token)
    assert "error" in ask(mesh, "node1", f"spiffe://cluster.local/ns/{pods}/sa/one", path)
