"""What the CNI plugin answers: passing the previous result on, refusing, and surviving garbage."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from ambient.model.address import parse_ip
from ambient.node import cni

NETCONF = {
    "cniVersion": "0.3.1",
    "name": "k8s",
    "type": "ambient-cni",
    "prevResult": {"cniVersion": "0.3.1", "ips": [{"version": "4", "address": "10.1.0.7/24"}], "dns": {}},
}
ENV = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": "/run/netns/x",
    "CNI_IFNAME": "eth0",
    "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-1;K8S_POD_UID=u-1",
}


def ask(config: object = NETCONF, **env: str) -> cni.Request | cni.Answer:
    return cni.read_request(json.dumps({"env": ENV | env, "stdin": json.dumps(config)}).encode())


def refused(answer: cni.Request | cni.Answer) -> int:
    assert isinstance(answer, cni.Answer) and answer.code != 0
    body = json.loads(answer.stdout)
    assert body["msg"] and body["cniVersion"]
    return int(body["code"])


def test_add_names_the_pod_and_its_addresses() -> None:
    request = ask()
    assert isinstance(request, cni.Request)
    assert (request.pod_namespace, request.pod_name, request.pod_uid) == ("shop", "web-1", "u-1")
    assert request.addresses == (parse_ip("10.1.0.7"),) and request.netns == "/run/netns/x"


def test_add_passes_the_previous_result_on_with_its_version() -> None:
    request = ask()
    assert isinstance(request, cni.Request)
    assert json.loads(cni.done(request).stdout) == NETCONF["prevResult"]


def test_add_without_a_previous_result_is_refused() -> None:
    assert refused(ask({"cniVersion": "0.3.1"})) == cni.INVALID_CONFIG


def test_add_with_an_unreadable_address_is_refused() -> None:
    bad = NETCONF | {"prevResult": {"ips": [{"address": "10.1.0.700/24"}]}}
    assert refused(ask(bad)) == cni.INVALID_CONFIG


def test_add_without_a_namespace_is_refused() -> None:
    assert refused(ask(CNI_NETNS="")) == cni.INVALID_ENVIRONMENT


def test_del_succeeds_with_an_empty_namespace_and_no_result() -> None:
    request = ask({"cniVersion": "0.3.1"}, CNI_COMMAND="DEL", CNI_NETNS="")
    assert isinstance(request, cni.Request) and request.pod_uid == "u-1"
    assert cni.done(request) == cni.Answer(0, "")


def test_del_succeeds_with_a_broken_configuration() -> None:
    raw = json.dumps({"env": ENV | {"CNI_COMMAND": "DEL"}, "stdin": "{nonsense"}).encode()
    assert isinstance(cni.read_request(raw), cni.Request)


def test_version_lists_what_is_supported_and_keeps_the_lists_version() -> None:
    answer = ask({"cniVersion": "0.4.0"}, CNI_COMMAND="VERSION")
    assert isinstance(answer, cni.Answer) and answer.code == 0
    assert json.loads(answer.stdout) == {
        "cniVersion": "0.4.0",
        "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"],
    }


def test_a_version_of_tomorrow_is_refused() -> None:
    assert refused(ask(NETCONF | {"cniVersion": "2.0.0"})) == cni.INCOMPATIBLE_VERSION


def test_status_succeeds() -> None:
    assert ask(CNI_COMMAND="STATUS") == cni.Answer(0, "")


def test_an_unknown_command_is_refused() -> None:
    assert refused(ask(CNI_COMMAND="FROB")) == cni.INVALID_ENVIRONMENT


def test_gc_names_the_attachments_that_exist() -> None:
    request = ask(NETCONF | {"cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}]}, CNI_COMMAND="GC")
    assert isinstance(request, cni.Request) and request.valid == (cni.Attachment("a", "eth0"),)


def test_gc_with_an_unreadable_list_collects_nothing() -> None:
    request = ask(NETCONF | {"cni.dev/valid-attachments": [{"containerID": 3}]}, CNI_COMMAND="GC")
    assert isinstance(request, cni.Request) and request.valid is None


def test_an_error_has_code_and_message() -> None:
    answer = cni.error("1.0.0", cni.TRY_AGAIN_LATER, "later", "because")
    assert json.loads(answer.stdout) == {"cniVersion": "1.0.0", "code": 11, "msg": "later", "details": "because"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=400))
def test_any_bytes_get_an_answer(raw: bytes) -> None:
    assert isinstance(cni.read_request(raw), cni.Request | cni.Answer)


@given(
    st.sampled_from(["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION", "X"]),
    st.dictionaries(st.sampled_from(["cniVersion", "prevResult", "cni.dev/valid-attachments", "name"]), json_values),
    st.dictionaries(st.sampled_from(sorted(ENV)), st.text(max_size=30)),
    json_values,
)
def test_any_configuration_gets_an_answer(command: str, config: object, env: dict[str, str], result: object) -> None:
    for netconf in (config, {"cniVersion": "1.0.0", "prevResult": {"ips": result}}, result):
        answer = ask(netconf, **(env | {"CNI_COMMAND": command}))
        if isinstance(answer, cni.Answer):
            assert isinstance(json.loads(answer.encode()), dict)
        elif command == "ADD":
            json.loads(cni.done(answer).stdout)
