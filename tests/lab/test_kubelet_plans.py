"""What the kubelet decides without a kernel: statuses, environments, command lines, probes, files of a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.errors import ConfigFault
from ambient.lab import apply, environment
from ambient.lab.container import image_name
from ambient.lab.objects import POD, Container, KubeletPod, Probe
from ambient.lab.pod_status import PodState, build, final_phase, new_state, restarts_again
from ambient.lab.probes import Tally, request_of
from ambient.lab.readiness import POD as READY_POD
from ambient.lab.sandbox import etc_files

NOW, LATER = "2026-01-01T00:00:00Z", "2026-01-01T00:01:00Z"


def pod(*names: str, **spec: Any) -> KubeletPod:
    containers = [{"name": name, "image": f"{name}:1", "command": ["x"]} for name in names or ("main",)]
    metadata = {"name": "p", "namespace": "shop", "uid": "u", "labels": {"app": "a"}}
    return POD.convert({"metadata": metadata, "spec": {"nodeName": "node1", "containers": containers} | spec})


def conditions(status: dict[str, Any]) -> dict[str, str]:
    return {c["type"]: c["status"] for c in status["conditions"]}


def running(item: KubeletPod) -> PodState:
    state = new_state(item, NOW)
    state.addresses, state.sandbox_ready = ("10.0.0.1", "fd00::1"), True
    for container in state.containers.values():
        container.pid, container.started_at, container.ready, container.started = 7, NOW, True, True
    return state


def test_a_pod_is_ready_when_all_its_containers_are() -> None:
    item = pod("a", "b")
    state = running(item)
    status = build(item, state, ["172.31.0.11"], NOW)
    assert status["phase"] == "Running" and conditions(status)["Ready"] == "True"
    assert status["podIP"] == "10.0.0.1" and [i["ip"] for i in status["podIPs"]] == ["10.0.0.1", "fd00::1"]
    state.containers["b"].ready = False
    status = build(item, state, ["172.31.0.11"], NOW)
    assert conditions(status)["Ready"] == "False"
    assert "unready status: [b]" in next(c["message"] for c in status["conditions"] if c["type"] == "Ready")


def test_a_pod_without_a_sandbox_is_pending_and_says_why() -> None:
    item = pod()
    state = new_state(item, NOW)
    state.message = state.containers["main"].message = "plugin x ADD: no"
    status = build(item, state, ["172.31.0.11"], NOW)
    assert status["phase"] == "Pending" and status["podIP"] is None
    waiting = {"waiting": {"reason": "ContainerCreating", "message": "plugin x ADD: no"}}
    assert status["containerStatuses"][0]["state"] == waiting


def test_conditions_of_others_stay_and_times_change_with_the_status_only() -> None:
    item = pod()
    before = build(item, running(item), ["172.31.0.11"], NOW)
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": NOW}
    known = POD.convert(
        {
            "metadata": {"name": "p", "namespace": "shop"},
            "spec": {"containers": [{"name": "main"}]},
            "status": {"conditions": [scheduled, *before["conditions"]]},
        }
    )
    state = running(item)
    state.containers["main"].ready = False
    after = {c["type"]: c for c in build(known, state, ["172.31.0.11"], LATER)["conditions"]}
    assert after["PodScheduled"]["status"] == "True"
    assert after["Initialized"]["lastTransitionTime"] == NOW and after["Ready"]["lastTransitionTime"] == LATER


@pytest.mark.parametrize(
    ("policy", "codes", "phase"),
    [
        ("Always", (0, 0), ""),
        ("Never", (0, 0), "Succeeded"),
        ("Never", (0, 1), "Failed"),
        ("OnFailure", (0, 0), "Succeeded"),
        ("OnFailure", (0, 1), ""),
        ("Never", (0, None), ""),
        ("Never", (0, -9), "Failed"),
    ],
)
def test_a_pod_ends_when_no_container_will_run_again(policy: str, codes: tuple[int | None, ...], phase: str) -> None:
    item = pod("a", "b", restartPolicy=policy)
    state = new_state(item, NOW)
    for container, code in zip(state.containers.values(), codes, strict=True):
        container.exit_code = code
    assert final_phase(item, state) == phase


@pytest.mark.parametrize(
    ("policy", "zero", "one"), [("Always", True, True), ("OnFailure", False, True), ("Never", False, False)]
)
def test_restart_policies(policy: str, zero: bool, one: bool) -> None:
    assert (restarts_again(policy, 0), restarts_again(policy, 1)) == (zero, one)


def test_a_killed_container_shows_kubernetes_exit_code() -> None:
    item = pod(restartPolicy="Never")
    state = running(item)
    main = state.containers["main"]
    main.pid, main.exit_code, main.finished_at, main.reason = 0, -9, LATER, ""
    shown = build(item, state, ["172.31.0.11"], NOW)["containerStatuses"][0]
    assert shown["state"]["terminated"]["exitCode"] == 137 and shown["containerID"] == ""


def with_env(*env: dict[str, Any], **more: Any) -> Container:
    raw = {"name": "main", "command": ["run", "$(A)", "$$(A)", "$(NONE)"], "env": list(env)} | more
    item = POD.convert({"metadata": {"name": "p"}, "spec": {"containers": [raw]}})
    assert item.spec.containers is not None
    return item.spec.containers[0]


def test_environments_resolve_fields_and_references_in_order() -> None:
    item = pod(serviceAccountName="sa")
    fields = {"N": "metadata.name", "L": "metadata.labels['app']", "I": "status.podIP", "H": "status.hostIP"}
    env = [{"name": "A", "value": "1"}, {"name": "B", "value": "$(A)2$(C)"}, {"name": "C", "value": "3"}]
    env += [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()]
    container = with_env(*env)
    values = environment.environment(item, container, ["10.0.0.1"], ["172.31.0.11"], {})
    assert values == {"A": "1", "B": "12$(C)", "C": "3", "N": "p", "L": "a", "I": "10.0.0.1", "H": "172.31.0.11"}
    assert environment.command_line(item, container, values) == ["run", "1", "$(A)", "$(NONE)"]


@pytest.mark.parametrize(
    "env",
    [
        {"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
        {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.secrets"}}},
    ],
)
def test_sources_that_a_lab_does_not_have_are_refused_by_name(env: dict[str, Any]) -> None:
    with pytest.raises(ConfigFault, match=r"A|fieldPath"):
        environment.environment(pod(), with_env(env), [], [], {})


def test_a_container_without_a_command_is_refused() -> None:
    with pytest.raises(ConfigFault, match="must be given"):
        environment.command_line(pod(), with_env(command=None), {})


@given(st.text(alphabet="$()AB ", max_size=30))
def test_references_never_raise_and_text_without_dollars_stays(text: str) -> None:
    expanded = environment.expand(text, {"A": "x"})
    assert "$" in text or expanded == text


def test_thresholds_count_only_what_comes_in_a_row() -> None:
    tally = Tally(Probe(success_threshold=2, failure_threshold=3))
    assert [tally.count(ok) for ok in (True, False, True, True)] == [None, None, None, True]
    assert [tally.count(ok) for ok in (False, False, True, False, False, False)][-2:] == [True, False]


def test_probes_name_their_port_and_an_unknown_one_is_an_error() -> None:
    container = with_env(ports=[{"name": "http", "containerPort": 8080}])
    get = POD.convert(
        {"metadata": {}, "spec": {"containers": [{"name": "c", "readinessProbe": {"httpGet": {"port": "http"}}}]}}
    )
    assert get.spec.containers is not None
    probe = get.spec.containers[0].readiness_probe
    assert probe is not None
    request = request_of(probe, container, "10.0.0.1")
    assert request is not None and (request["host"], request["port"]) == ("10.0.0.1", 8080)
    with pytest.raises(LookupError, match="http"):
        request_of(probe, with_env(), "10.0.0.1")


def test_the_files_of_a_pod_name_it_and_the_clusters_dns() -> None:
    files = etc_files(pod(subdomain="db"), "p", ("10.0.0.1",), True)
    assert files["resolv.conf"].startswith(
        "search shop.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10"
    )
    assert "10.0.0.1\tp.db.shop.svc.cluster.local\tp" in files["hosts"]


@pytest.mark.parametrize(
    ("image", "name"),
    [("shop", "shop"), ("shop:1", "shop"), ("host:5000/a/shop:1@sha256:00", "shop"), ("", "")],
)
def test_an_image_is_known_by_its_last_name(image: str, name: str) -> None:
    assert image_name(image) == name


def test_a_manifest_is_read_in_an_order_that_works_and_images_are_directories_beside_it(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    file = tmp_path / "a.yaml"
    file.write_text(
        "apiVersion: v1\nkind: List\nitems:\n"
        "- {apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: [{image: 'r/web:1'}, {image: x}]}}\n"
        "---\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: n}\n"
    )
    documents = apply.read([file])
    assert [d.kind for d in documents] == ["Namespace", "Pod"]
    assert apply.images(documents) == {"web": str(tmp_path / "web")}


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "- 1",
        "kind: Pod",
        "apiVersion: v1\nkind: Pod\nmetadata: {}",
        "apiVersion: 1\nkind: P\nmetadata: {name: x}",
    ],
)
def test_a_bad_manifest_is_refused_with_its_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigFault, match=r"bad\.yaml"):
        apply.read([file])


def test_a_pod_on_its_way_out_is_not_waited_for() -> None:
    leaving = READY_POD.convert({"metadata": {"name": "p", "deletionTimestamp": NOW}, "status": {"phase": "Running"}})
    assert leaving.ready and not READY_POD.convert({"metadata": {"name": "p"}}).ready
