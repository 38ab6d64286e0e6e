"""Settings are refused with file, field and rule before anything is served by them."""

from __future__ import annotations

import pytest

from ambient.errors import ConfigFault
from ambient.settings import ControlSettings, NodeSettings, read_settings


@pytest.mark.parametrize(
    "text",
    [
        "trust_domain: Cluster.Local",
        "trust_domain: ''",
        "root_namespace: ''",
        "root_namespace: a/b",
        "system_namespace: A",
        "cluster_id: ''",
        "cluster_domain: a b",
        "node_accounts: [ambient-node]",
        "node_accounts: [a/b/c]",
        "listen: []",
        "server_names: []",
        "server_names: [caf\u00e9.example]",
        "acknowledge_timeout_s: .nan",
        "acknowledge_timeout_s: .inf",
        "acknowledge_timeout_s: -1",
        "secret_ttl_max_s: 0",
        "secret_ttl_max_s: -5",
        "log_format: xml",
        "secret_ttl_max_seconds: 60",
        "secret_ttl_max_s: 60s",
    ],
)
def test_a_wrong_setting_of_the_control_plane_is_named(text: str) -> None:
    with pytest.raises(ConfigFault) as caught:
        read_settings(ControlSettings, text, "control.yaml")
    assert "control.yaml" in str(caught.value) and text.partition(":")[0] in str(caught.value)


@pytest.mark.parametrize(
    "text", ["trust_domain: a b", "log_format: xml", "secret_ttl_s: 0", "cluster_domain: .", "cluster_id: ''"]
)
def test_a_wrong_setting_of_a_node_is_named(text: str) -> None:
    with pytest.raises(ConfigFault, match=text.partition(":")[0]):
        read_settings(NodeSettings, f"node_name: n1\n{text}", "node.yaml")


@pytest.mark.parametrize(
    "text", ["a: 2026-13-45", "[" * 3000, "- a", "a", "? [a]\n: b", "a: 'x", "a: !!python/name:os"]
)
def test_what_is_no_mapping_of_settings_is_a_fault_and_nothing_else(text: str) -> None:
    with pytest.raises(ConfigFault, match=r"control\.yaml"):
        read_settings(ControlSettings, text, "control.yaml")


def test_what_is_right_is_taken() -> None:
    text = "trust_domain: td.example\nroot_namespace: mesh\nacknowledge_timeout_s: 0\nsecret_ttl_max_s: 60"
    assert read_settings(ControlSettings, text, "f").trust_domain == "td.example"
    assert read_settings(ControlSettings, "", "f") == ControlSettings()
    assert read_settings(NodeSettings, "node_name: n1\nsecret_ttl_s: 60", "f").secret_ttl_s == 60
