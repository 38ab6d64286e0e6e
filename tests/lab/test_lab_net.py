"""A whole lab without the mesh: what a cluster's users expect of pods, services, DNS and probes, on two nodes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambient.io import cgroup
from ambient.lab import record
from ambient.lab.driver import CommandFailed, Driver, eventually
from tests.support.require import require

ROOT = Path(__file__).parents[2]
SHOP = ROOT / "examples" / "shop.yaml"
GET = str(ROOT / "examples" / "shop" / "get.py")
pytestmark = [pytest.mark.net, pytest.mark.lab]


@pytest.fixture(scope="module")
def lab() -> Iterator[Driver]:
    require("net", "nft", "kubectl")
    driver = Driver(f"net-{os.getpid()}")
    try:
        driver.up([SHOP], "--no-mesh")
        driver.kubectl("apply", "-f", str(Path(__file__).with_name("pods.yaml")))
        eventually(lambda: runs(driver, "t", "gated"), 10, "the pod gated to start")
        yield driver
    finally:
        driver.down()


def record_of(driver: Driver, namespace: str, name: str) -> record.PodRecord:
    return record.find_pod(record.read(driver.lab.name), namespace, name)


def runs(driver: Driver, namespace: str, name: str) -> record.PodRecord | None:
    here = record.pods(record.read(driver.lab.name))
    return next((found for found in here if (found.namespace, found.name) == (namespace, name)), None)


def get(driver: Driver, url: str, namespace: str = "shop", pod: str = "client") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(driver.exec(namespace, pod, "python3", GET, url, check=False))
    return found


def get_from(netns: str, url: str) -> dict[str, Any]:
    """From a namespace that is no pod."""
    argv = ["nsenter", f"--net=/run/netns/{netns}", "python3", GET, url]
    found: dict[str, Any] = json.loads(subprocess.run(argv, capture_output=True, timeout=20).stdout)
    return found


def pod(driver: Driver, namespace: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = driver.get("pod", "-n", namespace, name)
    return found


def is_ready(item: dict[str, Any]) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in item["status"].get("conditions", ()))


def test_a_request_goes_through_all_services_of_both_nodes(lab: Driver) -> None:
    answer = get(lab, "http://frontend/buy?item=cups")
    assert answer["status"] == 200
    pods = lab.pods("shop")
    order = answer["answer"]
    assert order["price"] == 12 and order["client"] == pods["client"]["status"]["podIP"]
    catalog, cart = order["via"]
    assert catalog["client"] == cart["client"] == pods["frontend"]["status"]["podIP"]
    assert cart["via"][0]["client"] == pods["cart"]["status"]["podIP"]
    assert {pods[app]["spec"]["nodeName"] for app in ("catalog", "payments")} == {"node2"}
    assert {pods[app]["spec"]["nodeName"] for app in ("frontend", "cart", "client")} == {"node1"}


def test_names_that_do_not_exist_are_refused_at_once(lab: Driver) -> None:
    assert "gaierror" in get(lab, "http://nobody/")["error"]


@pytest.mark.parametrize("name", ["catalog", "catalog.shop", "catalog.shop.svc", "catalog.shop.svc.cluster.local"])
def test_a_service_has_its_usual_names(lab: Driver, name: str) -> None:
    assert get(lab, f"http://{name}/items")["status"] == 200


def test_a_port_that_nobody_serves_is_refused(lab: Driver) -> None:
    service = lab.get("service", "-n", "shop", "catalog")["spec"]["clusterIP"]
    lab.kubectl("create", "service", "clusterip", "empty", "-n", "shop", "--tcp=80:80")
    try:
        empty = lab.get("service", "-n", "shop", "empty")["spec"]["clusterIP"]
        eventually(lambda: "Refused" in get(lab, f"http://{empty}/")["error"], 5, "a refusal")
        assert get(lab, f"http://{service}/items")["status"] == 200
    finally:
        lab.kubectl("delete", "service", "-n", "shop", "empty")


@pytest.mark.parametrize("index", [1, 2])
def test_a_node_port_shows_the_nodes_address_as_client(lab: Driver, index: int) -> None:
    node = lab.lab.node(index)
    for source in (lab.lab.underlay_netns, lab.lab.node(1).netns):
        answer = get_from(source, f"http://{node.address4}:30080/whoami")
        assert answer["status"] == 200
        assert answer["answer"]["client"] == node.address4
    inside = get(lab, f"http://{node.address4}:30080/whoami")
    assert inside["answer"]["client"] == node.address4


def test_a_pod_that_calls_itself_through_its_service_gets_an_answer(lab: Driver) -> None:
    answer = get(lab, "http://catalog/whoami", pod="deploy/catalog")
    assert answer["answer"]["service"] == "catalog"


def test_readiness_follows_the_probe_and_the_service_follows_readiness(lab: Driver) -> None:
    address = pod(lab, "t", "gated")["status"]["podIP"]
    assert not is_ready(pod(lab, "t", "gated"))
    assert "Refused" in get(lab, "http://gated.t/")["error"]
    directory = os.readlink(f"/proc/{container_pid(lab, 't', 'gated')}/cwd")
    (Path(directory) / "ready").touch()
    eventually(lambda: is_ready(pod(lab, "t", "gated")), 10, "the pod to be ready")
    eventually(lambda: get(lab, "http://gated.t/")["status"] == 200, 5, "the service to have an endpoint")
    headless = lab.exec("shop", "client", "getent", "ahostsv4", "gated-headless.t.svc.cluster.local")
    assert address in headless
    log = lab.ambient("lab", "logs", "--name", lab.lab.name, "-n", "t", "gated")
    assert f"{lab.lab.node(2).address4} - - " in log and '"GET /ready HTTP/1.1" 404' in log


def container_pid(driver: Driver, namespace: str, name: str) -> int:
    status = pod(driver, namespace, name)["status"]["containerStatuses"][0]
    return int(status["containerID"].removeprefix("lab://"))


def test_probes_are_made_by_a_process_in_the_kubelets_cgroup_and_the_nodes_namespace(lab: Driver) -> None:
    for node in lab.lab.plans():
        pids = cgroup.processes(cgroup.mount_point() / node.kubelet_cgroup)
        assert len(pids) == 1
        assert os.stat(f"/proc/{pids.pop()}/ns/net").st_ino == os.stat(f"/run/netns/{node.netns}").st_ino


def test_a_pods_processes_are_in_its_cgroup_and_namespaces(lab: Driver) -> None:
    found = record_of(lab, "shop", "client")
    pid = container_pid(lab, "shop", "client")
    assert cgroup.of_pid(pid) == Path(found.cgroup) / "client"
    assert Path(found.cgroup).name == f"pod{found.uid}" and Path(found.cgroup).parent.name == "kubepods"
    assert os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat(found.netns).st_ino
    own = os.stat("/proc/self/ns/mnt").st_ino
    assert os.stat(f"/proc/{pid}/ns/mnt").st_ino not in (own, 0)
    assert lab.exec("shop", "client", "cat", "/etc/hostname").strip() == "client"
    assert "options ndots:5" in lab.exec("shop", "client", "cat", "/etc/resolv.conf")
    assert lab.exec("shop", "client", "cat", "/proc/sys/net/ipv4/ip_forward").strip() == "0"


def test_ipv6_reaches_pods_and_services(lab: Driver) -> None:
    directory = os.readlink(f"/proc/{container_pid(lab, 't', 'gated')}/cwd")
    (Path(directory) / "ready").touch()
    eventually(lambda: is_ready(pod(lab, "t", "gated")), 10, "the pod to be ready")
    six = next(item["ip"] for item in pod(lab, "t", "gated")["status"]["podIPs"] if ":" in item["ip"])
    mine = next(item["ip"] for item in pod(lab, "shop", "client")["status"]["podIPs"] if ":" in item["ip"])
    direct = get(lab, f"http://[{six}]:8000/")
    assert direct["status"] == 200 and direct["local"] == mine
    service = next(a for a in lab.get("service", "-n", "t", "gated")["spec"]["clusterIPs"] if ":" in a)
    eventually(lambda: get(lab, f"http://[{service}]/")["status"] == 200, 5, "the service to have an endpoint")


def test_a_pod_on_the_hosts_network_is_in_the_nodes_namespace(lab: Driver) -> None:
    host = eventually(lambda: runs(lab, "t", "host"), 5, "the pod to run")
    assert os.stat(host.netns).st_ino == os.stat(f"/run/netns/{lab.lab.node(1).netns}").st_ino
    eventually(lambda: is_ready(pod(lab, "t", "host")), 5, "the pod to be ready")
    assert pod(lab, "t", "host")["status"]["podIP"] == lab.lab.node(1).address4


def test_a_pod_that_never_restarts_ends_with_its_exit_code_and_keeps_its_log(lab: Driver) -> None:
    item = eventually(
        lambda: (p := pod(lab, "t", "once"))["status"]["phase"] == "Failed" and p, 10, "the pod to have ended"
    )
    assert item["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 3
    address = item["status"]["podIP"]
    log = next((record.read(lab.lab.name).directory / "nodes").glob(f"*/pods/{item['metadata']['uid']}/main.log"))
    assert log.read_text() == f"I am once on node1 at {address}\n"


def test_exec_passes_the_exit_code_and_an_unknown_pod_is_refused(lab: Driver) -> None:
    argv = ["lab", "exec", "--name", lab.lab.name, "-n", "shop", "client", "--", "sh", "-c", "exit 7"]
    with pytest.raises(CommandFailed, match="exit code 7"):
        lab.ambient(*argv)
    with pytest.raises(CommandFailed, match="does not run here"):
        lab.exec("shop", "nobody", "true")


def test_a_container_that_ends_is_started_again_and_counted(lab: Driver) -> None:
    before = container_pid(lab, "shop", "client")
    os.kill(before, 9)
    item = eventually(
        lambda: (
            (p := pod(lab, "shop", "client"))["status"]["containerStatuses"][0]["restartCount"] == 1
            and is_ready(p)
            and p
        ),
        10,
        "the container to be started again",
    )
    assert container_pid(lab, "shop", "client") != before
    ended = item["status"]["containerStatuses"][0]["lastState"]["terminated"]
    assert ended["exitCode"] == 137


def test_labels_change_no_process(lab: Driver) -> None:
    before = {app: container_pid(lab, "shop", p["metadata"]["name"]) for app, p in lab.pods("shop").items()}
    lab.kubectl("label", "namespace", "shop", "istio.io/dataplane-mode=ambient")
    lab.kubectl("label", "namespace", "shop", "istio.io/dataplane-mode-")
    after = {app: container_pid(lab, "shop", p["metadata"]["name"]) for app, p in lab.pods("shop").items()}
    assert before == after


def test_a_deployment_scales_up_and_down_and_nothing_of_its_pods_is_left(lab: Driver) -> None:
    def namespaces() -> set[str]:
        return {name for name in os.listdir("/run/netns") if lab.lab.owns_netns(name)}

    before = namespaces()
    addresses = record.read(lab.lab.name).directory / "nodes" / "node2" / "cni" / "addresses"
    reserved = set(os.listdir(addresses))
    lab.kubectl("scale", "deployment", "-n", "shop", "catalog", "--replicas=3")
    lab.kubectl("rollout", "status", "deployment", "-n", "shop", "catalog", "--timeout=20s")
    answers = lab.exec("shop", "client", "python3", GET, "--count", "40", "http://catalog/whoami").splitlines()
    assert len({json.loads(line)["answer"]["pod"] for line in answers}) == 3
    lab.kubectl("scale", "deployment", "-n", "shop", "catalog", "--replicas=1")
    eventually(lambda: namespaces() <= before, 15, "the namespaces of the pods to go")
    eventually(lambda: set(os.listdir(addresses)) == reserved, 5, "their addresses to be given back")
    assert get(lab, "http://catalog/items")["status"] == 200


def test_deleting_a_pod_calls_every_plugin_in_reverse_order_before_the_object_goes(lab: Driver) -> None:
    files = record.read(lab.lab.name).directory / "nodes" / "node1" / "cni"
    calls = files / "calls"
    wrapper = files / "bin" / "second"
    # a chained plugin that passes the result on and writes down what it is asked
    wrapper.write_text(
        "#!/usr/bin/python3 -IS\nimport json, os, sys\n"
        f"open({str(calls)!r}, 'a').write(os.environ['CNI_COMMAND'] + ' ' + "
        "str(os.path.exists('/proc/sys/net/ipv4/conf/v' + os.environ['CNI_CONTAINERID'])) + '\\n')\n"
        "if os.environ['CNI_COMMAND'] == 'ADD': print(json.dumps(json.load(sys.stdin)['prevResult']))\n"
    )
    wrapper.chmod(0o755)
    conflist = files / "net.d" / "10-lab.conflist"
    original = conflist.read_text()
    config = json.loads(original)
    config["plugins"].append({"type": "second"})
    conflist.write_text(json.dumps(config))
    try:
        run_pod(lab, "brief")
        eventually(lambda: is_ready(pod(lab, "t", "brief")), 10, "the pod to be ready")
        lab.kubectl("delete", "pod", "-n", "t", "brief", "--timeout=10s")
        # the bridge's link is there in both: it was first in ADD and last in DEL
        assert calls.read_text() == "ADD True\nDEL True\n"
    finally:
        conflist.write_text(original)


def run_pod(driver: Driver, name: str, node: str = "node1") -> None:
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "t"},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 2,
            "containers": [{"name": "main", "image": "none", "command": ["sleep", "infinity"]}],
        },
    }
    driver.kubectl("apply", "-f", "-", stdin=json.dumps(body))


def test_a_pod_waits_while_a_plugin_is_missing_and_says_why(lab: Driver) -> None:
    plugin = record.read(lab.lab.name).directory / "nodes" / "node2" / "cni" / "bin" / "lab-bridge"
    aside = plugin.with_name("aside")
    plugin.rename(aside)
    try:
        run_pod(lab, "late", "node2")

        def waiting() -> str:
            state = pod(lab, "t", "late")["status"]["containerStatuses"][0]["state"]
            return str(state["waiting"]["message"])

        assert "failed to find plugin 'lab-bridge'" in eventually(waiting, 10, "the reason to show")
        assert not is_ready(pod(lab, "t", "late"))
        assert "FailedCreatePodSandBox" in lab.kubectl("get", "events", "-n", "t")
    finally:
        aside.rename(plugin)
    eventually(lambda: is_ready(pod(lab, "t", "late")), 15, "the pod to start once the plugin is back")


def test_status_and_list_show_what_runs(lab: Driver) -> None:
    rows = json.loads(lab.ambient("lab", "status", "--name", lab.lab.name, "-o", "json"))
    kinds = {row["kind"] for row in rows}
    assert kinds == {"supervisor", "node", "pod"}
    assert all(row["state"] in ("ready", "running") for row in rows)
    labs = json.loads(lab.ambient("lab", "list", "-o", "json"))
    assert {"name": lab.lab.name, "nodes": 2, "mesh": False, "state": "ready", "kubeconfig": lab.kubeconfig} in labs
