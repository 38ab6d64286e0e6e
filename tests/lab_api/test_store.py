"""The meaning of writes: defaults, conflicts, generations, graceful deletion, paging and history."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.lab.apiserver import schema
from ambient.lab.apiserver.history import History
from ambient.lab.apiserver.schema import CONFIG_MAP, DEPLOYMENT, NAMESPACE, NODE, POD, SERVICE, SERVICE_ACCOUNT
from ambient.lab.apiserver.status import ApiError
from ambient.lab.apiserver.store import DeleteOptions, Sources, Store
from tests.lab_api.conftest import Clock
from tests.lab_api.objects import deployment, lawful, pod, running, service

Make = Callable[..., Store]


def refusal(call: Callable[[], Any]) -> ApiError:
    with pytest.raises(ApiError) as refused:
        call()
    return refused.value


def test_a_pod_gets_the_defaults_of_a_real_server(store: Store) -> None:
    made = store.create(POD, "default", pod(volumes=[{"name": "v", "configMap": {"name": "m"}}]))
    spec = made["spec"]
    assert (spec["serviceAccountName"], spec["restartPolicy"], spec["terminationGracePeriodSeconds"]) == (
        "default",
        "Always",
        30,
    )
    assert made["status"] == {"phase": "Pending", "qosClass": "BestEffort"}
    assert made["metadata"]["uid"] and made["metadata"]["creationTimestamp"] == "2026-01-02T03:04:05Z"
    assert spec["volumes"][0]["configMap"]["defaultMode"] == 420


def test_a_pod_of_an_unknown_service_account_is_forbidden(store: Store) -> None:
    error = refusal(lambda: store.create(POD, "default", pod(serviceAccountName="ghost")))
    assert error.code == 403
    assert 'serviceaccount "ghost" not found' in error.message


def test_every_namespace_has_its_name_as_label_and_a_default_service_account(store: Store) -> None:
    made = store.create(NAMESPACE, "", {"metadata": {"name": "shop"}})
    assert made["metadata"]["labels"] == {"kubernetes.io/metadata.name": "shop"}
    assert store.find(SERVICE_ACCOUNT, "shop", "default") is not None


@pytest.mark.parametrize(
    ("kind", "obj", "field"),
    [
        (POD, pod("Upper"), "metadata.name"),
        (POD, {"metadata": {"name": "x"}, "spec": {}}, "spec.containers: Required value"),
        (POD, pod(restartPolicy="Sometimes"), 'spec.restartPolicy: Unsupported value: "Sometimes"'),
        (POD, {"metadata": {}, "spec": {"containers": [{"name": "c", "image": "i"}]}}, "metadata.name"),
        (POD, {"metadata": {"name": "x", "labels": {"a": "b c"}}, "spec": pod()["spec"]}, "metadata.labels"),
        (SERVICE, service("9digit"), "DNS-1035"),
        (SERVICE, service(ports=[{"port": 0}]), "spec.ports[0].port"),
        (SERVICE, service(ports=[{"port": 80}, {"port": 81}]), "spec.ports[0].name: Required value"),
        (SERVICE, service(type="Magic"), "spec.type: Unsupported value"),
        (SERVICE, service(clusterIP="1.2.3.4"), "not in the valid range"),
        (SERVICE, service(ipFamilies=["IPv6"]), "not configured"),
        (DEPLOYMENT, deployment(selector={"matchLabels": {"app": "other"}}), "`selector` does not match"),
        (DEPLOYMENT, deployment(replicas=-1), "spec.replicas"),
        (CONFIG_MAP, {"metadata": {"name": "x"}, "data": {"a b": "c"}}, "data[a b]"),
        (schema.SECRET, {"metadata": {"name": "x"}, "data": {"a": "not base64!"}}, "must be base64"),
    ],
)
def test_a_broken_rule_is_refused_with_its_field(store: Store, kind: schema.Kind, obj: Any, field: str) -> None:
    error = refusal(lambda: store.create(kind, "default", obj))
    assert (error.code, error.reason) == (422, "Invalid")
    assert field in error.message


@pytest.mark.parametrize(
    "obj",
    [
        {"metadata": {"name": 7}, "spec": {}},
        {"metadata": [], "spec": {}},
        {"metadata": {"name": "x"}, "spec": {"containers": {}}},
        {"metadata": {"name": "x"}, "spec": {"containers": [{"name": "c", "ports": [{"containerPort": "80"}]}]}},
        {"metadata": {"name": "x", "labels": {"a": 1}}, "spec": {}},
        {"metadata": {"name": "x"}, "spec": {"a": [[[[]]]], "nodeName": True}},
    ],
)
def test_a_field_of_the_wrong_type_is_a_bad_request(store: Store, obj: Any) -> None:
    error = refusal(lambda: store.create(POD, "default", obj))
    assert error.code == 400
    assert "cannot unmarshal" in error.message


FIELDS = (
    *("metadata", "spec", "status", "name", "labels", "containers", "ports", "port", "selector", "template"),
    *("replicas", "type", "data", "image", "clusterIP", "clusterIPs", "ipFamilies", "nodePort", "targetPort"),
    *("env", "volumes", "readinessProbe", "httpGet"),
)
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(FIELDS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)


@lawful
@given(obj=st.dictionaries(st.sampled_from(["metadata", "spec", "data", "status"]), documents), which=st.integers(0, 5))
def test_garbage_is_refused_and_never_breaks_the_store(obj: Any, which: int) -> None:
    kind = (POD, SERVICE, DEPLOYMENT, CONFIG_MAP, NODE, schema.AUTHORIZATION_POLICY)[which]
    store = Store(Sources(now=lambda: datetime.now(UTC), uid=lambda: "u", suffix=lambda: "s"))
    before = store.history.version
    try:
        store.create(kind, "default" if kind.namespaced else "", obj)
    except ApiError:
        assert store.history.version == before


def test_an_object_of_an_old_version_is_a_conflict(store: Store) -> None:
    made = store.create(CONFIG_MAP, "default", {"metadata": {"name": "m"}, "data": {"a": "1"}})
    store.replace(CONFIG_MAP, "default", "m", {**made, "data": {"a": "2"}})
    error = refusal(lambda: store.replace(CONFIG_MAP, "default", "m", {**made, "data": {"a": "3"}}))
    assert (error.code, error.reason) == (409, "Conflict")
    assert store.get(CONFIG_MAP, "default", "m")["data"] == {"a": "2"}


def test_writing_what_is_there_writes_nothing(store: Store) -> None:
    made = store.create(POD, "default", pod())
    before = store.history.version
    assert store.replace(POD, "default", "one", copy.deepcopy(made)) == made
    assert store.history.version == before


def test_only_a_change_outside_metadata_and_status_moves_the_generation(store: Store) -> None:
    made = store.create(DEPLOYMENT, "default", deployment())
    assert made["metadata"]["generation"] == 1
    labelled = store.modify(DEPLOYMENT, "default", "web", lambda o: o["metadata"].update(labels={"a": "b"}))
    assert labelled["metadata"]["generation"] == 1
    scaled = store.modify(DEPLOYMENT, "default", "web", lambda o: o["spec"].update(replicas=3))
    assert scaled["metadata"]["generation"] == 2


def test_status_changes_only_by_its_subresource_and_the_rest_never_does(store: Store) -> None:
    store.create(POD, "default", pod())

    def both(obj: Any) -> None:
        obj["status"] = running("10.0.0.1")
        obj["spec"]["terminationGracePeriodSeconds"] = 5

    plain = store.modify(POD, "default", "one", both)
    assert plain["status"]["phase"] == "Pending"
    assert plain["spec"]["terminationGracePeriodSeconds"] == 5
    store.modify(
        POD, "default", "one", lambda o: o["spec"].update(terminationGracePeriodSeconds=9), subresource="status"
    )
    reported = store.modify(POD, "default", "one", both, subresource="status")
    assert reported["status"]["phase"] == "Running"
    assert reported["spec"]["terminationGracePeriodSeconds"] == 5


def test_a_pods_containers_may_change_their_image_and_nothing_else(store: Store) -> None:
    store.create(POD, "default", pod())
    store.modify(POD, "default", "one", lambda o: o["spec"]["containers"][0].update(image="app:2"))
    error = refusal(
        lambda: store.modify(POD, "default", "one", lambda o: o["spec"]["containers"][0].update(command=["x"]))
    )
    assert "pod updates may not change fields other than" in error.message


def test_a_pod_on_a_node_goes_when_its_kubelet_says_so(store: Store, clock: Clock) -> None:
    store.create(POD, "default", pod(terminationGracePeriodSeconds=7))
    store.bind("default", "one", "n1")
    doomed, gone = store.delete(POD, "default", "one")
    assert not gone
    assert doomed["metadata"]["deletionTimestamp"] == "2026-01-02T03:04:12Z"
    assert doomed["metadata"]["deletionGracePeriodSeconds"] == 7
    again, gone = store.delete(POD, "default", "one")
    assert again is store.get(POD, "default", "one") and not gone
    _, gone = store.delete(POD, "default", "one", DeleteOptions(grace_period_s=0))
    assert gone and store.find(POD, "default", "one") is None


@pytest.mark.parametrize("phase", ["", "Succeeded"])
def test_a_pod_without_a_kubelet_to_wait_for_goes_at_once(store: Store, phase: str) -> None:
    store.create(POD, "default", pod())
    if phase:
        store.bind("default", "one", "n1")
        store.modify(POD, "default", "one", lambda o: o["status"].update(phase=phase), subresource="status")
    assert store.delete(POD, "default", "one")[1]


def test_a_pod_is_bound_once(store: Store) -> None:
    store.create(POD, "default", pod())
    store.bind("default", "one", "n1")
    assert refusal(lambda: store.bind("default", "one", "n2")).code == 409


def test_finalizers_keep_an_object_until_the_last_is_removed(store: Store) -> None:
    store.create(CONFIG_MAP, "default", {"metadata": {"name": "m", "finalizers": ["x/y"]}})
    assert not store.delete(CONFIG_MAP, "default", "m")[1]
    added = refusal(lambda: store.modify(CONFIG_MAP, "default", "m", lambda o: o["metadata"]["finalizers"].append("z")))
    assert added.code == 422
    store.modify(CONFIG_MAP, "default", "m", lambda o: o["metadata"].pop("finalizers") and None)
    assert store.find(CONFIG_MAP, "default", "m") is None


def test_a_precondition_that_does_not_hold_is_a_conflict(store: Store) -> None:
    store.create(CONFIG_MAP, "default", {"metadata": {"name": "m"}})
    error = refusal(lambda: store.delete(CONFIG_MAP, "default", "m", DeleteOptions(uid="other")))
    assert error.code == 409 and "Precondition failed" in error.message


def test_nothing_is_created_in_a_namespace_that_is_going_or_absent(store: Store) -> None:
    store.create(NAMESPACE, "", {"metadata": {"name": "shop"}})
    going, gone = store.delete(NAMESPACE, "", "shop")
    assert not gone and going["status"]["phase"] == "Terminating"
    error = refusal(lambda: store.create(CONFIG_MAP, "shop", {"metadata": {"name": "m"}}))
    assert error.code == 403
    assert error.details and error.details["causes"][0]["reason"] == "NamespaceTerminating"
    store.finalize_namespace("shop")
    assert refusal(lambda: store.create(CONFIG_MAP, "shop", {"metadata": {"name": "m"}})).code == 404


def test_a_dry_run_answers_and_changes_nothing(store: Store) -> None:
    before = store.history.version
    assert store.create(POD, "default", pod(), dry_run=True)["metadata"]["uid"]
    assert store.find(POD, "default", "one") is None
    assert store.history.version == before


def test_names_are_generated_and_a_taken_one_is_not_used_twice(store: Store) -> None:
    body = {"metadata": {"generateName": "m-"}}
    names = {store.create(CONFIG_MAP, "default", body)["metadata"]["name"] for _ in range(5)}
    assert len(names) == 5 and all(name.startswith("m-") for name in names)


def test_a_full_server_refuses_new_objects_but_not_changes(new_store: Make) -> None:
    store = new_store(objects_max=10)
    left = 10 - store.history.count()
    for number in range(left):
        store.create(CONFIG_MAP, "default", {"metadata": {"name": f"m{number}"}})
    error = refusal(lambda: store.create(CONFIG_MAP, "default", {"metadata": {"name": "more"}}))
    assert error.code == 403 and "exceeded quota" in error.message
    store.modify(CONFIG_MAP, "default", "m0", lambda o: o.update(data={"a": "b"}))


# --- services -------------------------------------------------------------------------------------------

DUAL = ("10.96.0.0/24", "fd00::/112")


def test_a_service_gets_an_address_and_its_target_port(store: Store) -> None:
    made = store.create(SERVICE, "default", service(ports=[{"port": 80}]))
    assert made["spec"]["clusterIP"].startswith("10.96.")
    assert made["spec"]["clusterIPs"] == [made["spec"]["clusterIP"]]
    assert made["spec"]["ports"] == [{"port": 80, "protocol": "TCP", "targetPort": 80}]


@pytest.mark.parametrize(
    ("spec", "families"),
    [
        ({}, ["IPv4"]),
        ({"ipFamilies": ["IPv6"]}, ["IPv6"]),
        ({"ipFamilyPolicy": "PreferDualStack"}, ["IPv4", "IPv6"]),
        ({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6", "IPv4"]}, ["IPv6", "IPv4"]),
    ],
)
def test_address_families_are_as_asked(new_store: Make, spec: Any, families: list[str]) -> None:
    made = new_store(service_ranges=DUAL).create(SERVICE, "default", service(**spec))["spec"]
    assert made["ipFamilies"] == families
    assert [":" in ip for ip in made["clusterIPs"]] == [family == "IPv6" for family in families]


def test_dual_stack_cannot_be_required_of_a_single_stack_cluster(store: Store) -> None:
    error = refusal(lambda: store.create(SERVICE, "default", service(ipFamilyPolicy="RequireDualStack")))
    assert "not configured for dual-stack" in error.message


def test_an_address_is_given_once_and_again_after_its_service_is_gone(store: Store) -> None:
    store.create(SERVICE, "default", service("a", clusterIP="10.96.0.10"))
    error = refusal(lambda: store.create(SERVICE, "default", service("b", clusterIP="10.96.0.10")))
    assert "already allocated" in error.message
    store.delete(SERVICE, "default", "a")
    store.create(SERVICE, "default", service("b", clusterIP="10.96.0.10"))


def test_addresses_are_all_different_until_the_range_is_full(new_store: Make) -> None:
    store = new_store(service_ranges=("10.0.0.0/28",))
    addresses = [store.create(SERVICE, "default", service(f"s{n}"))["spec"]["clusterIP"] for n in range(13)]
    assert len(set(addresses)) == 13 and store.first_service_address() not in addresses
    assert "is full" in refusal(lambda: store.create(SERVICE, "default", service("more"))).message


def test_a_headless_service_has_no_address_and_a_set_one_may_not_change(store: Store) -> None:
    assert store.create(SERVICE, "default", service("h", clusterIP="None"))["spec"]["clusterIPs"] == ["None"]
    store.create(SERVICE, "default", service("a", clusterIP="10.96.0.10"))
    changed = service("a", clusterIP="10.96.0.11")
    assert "may not change once set" in refusal(lambda: store.replace(SERVICE, "default", "a", changed)).message
    assert store.replace(SERVICE, "default", "a", service("a"))["spec"]["clusterIP"] == "10.96.0.10"


def test_node_ports_are_allocated_kept_and_refused(store: Store) -> None:
    made = store.create(SERVICE, "default", service("a", type="NodePort"))
    port = made["spec"]["ports"][0]["nodePort"]
    assert 30000 <= port <= 32767
    assert store.replace(SERVICE, "default", "a", service("a", type="NodePort"))["spec"]["ports"][0]["nodePort"] == port
    taken = service("b", type="NodePort", ports=[{"port": 80, "nodePort": port}])
    assert "already allocated" in refusal(lambda: store.create(SERVICE, "default", taken)).message
    outside = service("b", type="NodePort", ports=[{"port": 80, "nodePort": 80}])
    assert "not in the valid range" in refusal(lambda: store.create(SERVICE, "default", outside)).message


def test_a_service_changed_back_to_cluster_ip_gives_its_node_port_up(store: Store) -> None:
    store.create(SERVICE, "default", service("a", type="NodePort"))
    plain = store.modify(SERVICE, "default", "a", lambda o: o["spec"].update(type="ClusterIP", ports=[{"port": 80}]))
    assert "nodePort" not in plain["spec"]["ports"][0]


# --- definitions ----------------------------------------------------------------------------------------


def definition(kind: str = "Widget") -> dict[str, Any]:
    plural = kind.lower() + "s"
    return {
        "metadata": {"name": f"{plural}.example.com"},
        "spec": {
            "group": "example.com",
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural},
            "versions": [{"name": "v1", "served": True, "storage": True, "subresources": {"status": {}}}],
        },
    }


def test_a_definition_is_served_until_it_is_deleted_with_its_objects(store: Store) -> None:
    store.create(schema.DEFINITION, "", definition())
    kind = store.registry.find("example.com", "v1", "widgets")
    assert kind is not None
    made = store.create(kind, "default", {"metadata": {"name": "w"}, "spec": {"anything": [None, {"x": 1}]}})
    assert made["spec"] == {"anything": [None, {"x": 1}]}
    store.delete(schema.DEFINITION, "", "widgets.example.com")
    assert store.registry.find("example.com", "v1", "widgets") is None
    assert store.find(kind, "default", "w") is None


def test_a_definition_cannot_replace_a_built_in_kind(store: Store) -> None:
    body = definition("AuthorizationPolicy")
    body["metadata"]["name"] = "authorizationpolicies.security.istio.io"
    body["spec"].update(group="security.istio.io", scope="Cluster")
    body["spec"]["names"]["plural"] = "authorizationpolicies"
    store.create(schema.DEFINITION, "", body)
    assert store.registry.get("authorizationpolicies.security.istio.io") is schema.AUTHORIZATION_POLICY
    policy = store.create(schema.AUTHORIZATION_POLICY, "default", {"metadata": {"name": "p"}, "spec": {}})
    store.delete(schema.DEFINITION, "", "authorizationpolicies.security.istio.io")
    assert store.get(schema.AUTHORIZATION_POLICY, "default", "p") is policy


# --- history --------------------------------------------------------------------------------------------


def test_pages_show_one_moment_whatever_is_written_between_them(store: Store) -> None:
    for number in range(7):
        store.create(CONFIG_MAP, "default", {"metadata": {"name": f"m{number}"}})
    first = store.page(CONFIG_MAP, limit=3)
    assert first.remaining == 4
    store.delete(CONFIG_MAP, "default", "m5")
    store.create(CONFIG_MAP, "default", {"metadata": {"name": "m35"}})
    store.modify(CONFIG_MAP, "default", "m6", lambda o: o.update(data={"changed": "yes"}))
    second = store.page(CONFIG_MAP, limit=3, token=first.next)
    third = store.page(CONFIG_MAP, limit=3, token=second.next)
    items = [*first.items, *second.items, *third.items]
    assert [obj["metadata"]["name"] for obj in items] == [f"m{n}" for n in range(7)]
    assert all("data" not in obj for obj in items)
    assert {first.version, second.version, third.version} == {first.version}
    assert third.next == ""


@pytest.mark.parametrize("token", ["", "x", "e30=", "bm9uc2Vuc2U="])
def test_a_continue_token_that_is_none_is_refused_as_expired(store: Store, token: str) -> None:
    if token:
        assert refusal(lambda: store.page(CONFIG_MAP, limit=1, token=token)).code == 410
    else:
        assert store.page(CONFIG_MAP, limit=1, token=token).items == []


def test_a_page_older_than_the_history_is_expired(new_store: Make) -> None:
    store = new_store(changes_max=5)
    for number in range(4):
        store.create(CONFIG_MAP, "default", {"metadata": {"name": f"m{number}"}})
    first = store.page(CONFIG_MAP, limit=1)
    for number in range(6):
        store.modify(CONFIG_MAP, "default", "m0", lambda o, n=number: o.update(data={"n": str(n)}))  # type: ignore[misc]
    assert refusal(lambda: store.page(CONFIG_MAP, limit=1, token=first.next)).code == 410


@lawful
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=40), st.data())
def test_a_snapshot_is_what_was_there_and_the_changes_since_lead_to_now(writes: Any, data: Any) -> None:
    history = History(first_version=10, changes_max=1000)
    moments: dict[int, dict[Any, Any]] = {10: {}}
    for name, delete in writes:
        key = ("ns", name)
        if delete and history.get("things", key) is None:
            continue
        history.commit("things", key, {"version": history.next_version()}, deleted=delete)
        moments[history.version] = dict(history.objects("things"))
    version = data.draw(st.sampled_from(sorted(moments)))
    assert dict(history.snapshot("things", version)) == moments[version]
    replayed = dict(moments[version])
    for change in history.since("things", version, limit=1000):
        if change.type == "DELETED":
            del replayed[change.key]
        else:
            assert (change.type == "ADDED") == (change.key not in replayed)
            replayed[change.key] = change.obj
    assert replayed == dict(history.objects("things"))


def test_changes_before_the_history_or_after_now_are_gone() -> None:
    history = History(first_version=10, changes_max=3)
    for _ in range(5):
        history.commit("things", ("", "a"), {})
    assert len(history.since("things", 12)) == 3
    for version in (9, 11, 16):
        assert refusal(lambda v=version: history.since("things", v)).code == 410  # type: ignore[misc]
