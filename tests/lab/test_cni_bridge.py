"""The bridge plugin and the chain: addresses, requests that make no sense, and links in real namespaces."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.lab import cni_bridge
from ambient.lab.cni import Chain, CniFault, Sandbox
from ambient.lab.commands import run_async
from tests.support.require import require


def config(directory: Path, **more: Any) -> str:
    value = {
        "cniVersion": "1.0.0",
        "name": "lab",
        "bridge": "pods",
        "subnets": ["10.9.0.0/29", "fd09::/64"],
        "gateways": ["10.9.0.1", "fd09::1"],
        "dataDir": str(directory),
    }
    return json.dumps(value | more)


def test_version_lists_what_is_understood() -> None:
    answer = cni_bridge.run({"CNI_COMMAND": "VERSION"}, "")
    assert answer is not None and "1.0.0" in answer["supportedVersions"]


@pytest.mark.parametrize(
    ("env", "stdin"),
    [
        ({"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "a1", "CNI_IFNAME": "eth0"}, "{}"),
        ({"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "a1", "CNI_IFNAME": "eth0"}, "not json"),
        ({"CNI_COMMAND": "FLY", "CNI_CONTAINERID": "a1", "CNI_IFNAME": "eth0"}, None),
        ({"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "../x", "CNI_IFNAME": "eth0"}, None),
        ({"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "a1", "CNI_IFNAME": "eth0", "CNI_NETNS": "/nowhere"}, None),
        ({}, None),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(env: dict[str, str], stdin: str | None, tmp_path: Path) -> None:
    with pytest.raises(cni_bridge.Refused):
        cni_bridge.run(env, config(tmp_path) if stdin is None else stdin)


@given(st.text(max_size=200))
def test_garbage_on_stdin_is_refused_and_nothing_else_happens(text: str) -> None:
    env = {"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "a1", "CNI_IFNAME": "eth0"}
    with pytest.raises(cni_bridge.Refused):
        cni_bridge.run(env, text)


@pytest.fixture
def node() -> Iterator[str]:
    """A namespace with a bridge, as a node has."""
    require("net")
    name = f"al-cni{os.getpid()}-node1"
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "add", "pods", "type", "bridge"], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture
def pod() -> Iterator[str]:
    name = f"al-cni{os.getpid()}-p0000000000"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def chain(node: str, directory: Path, *more: dict[str, Any]) -> Chain:
    binaries = directory / "bin"
    binaries.mkdir(exist_ok=True)
    script = binaries / "lab-bridge"
    script.write_text(f"#!/bin/sh\nexec python3 -I -S {cni_bridge.__file__}\n")
    script.chmod(0o755)
    bridge = json.loads(config(directory / "addresses", type="lab-bridge"))
    conflist = directory / "conflist"
    conflist.write_text(json.dumps({"cniVersion": "1.0.0", "name": "lab", "plugins": [bridge, *more]}))
    return Chain(node, conflist, binaries, {"PATH": os.environ["PATH"]})


def sandbox(pod: str, container: str = "c1", address: str = "") -> Sandbox:
    return Sandbox(container, f"/run/netns/{pod}", "p", "ns", "uid", address)


@pytest.mark.net
async def test_add_gives_both_families_and_del_gives_them_back(node: str, pod: str, tmp_path: Path) -> None:
    plugins = chain(node, tmp_path)
    added = await plugins.add(sandbox(pod))
    assert added.addresses == ("10.9.0.2", "fd09::2")
    shown = (await run_async(["ip", "-n", pod, "-o", "addr", "show", "eth0"])).stdout.decode()
    assert "10.9.0.2/32" in shown and "fd09::2/128" in shown and "tentative" not in shown.split("fd09::2/128")[1]
    await plugins.check(sandbox(pod), added)
    for _ in range(2):
        await plugins.delete(sandbox(pod), added)
    with pytest.raises(CniFault, match="missing"):
        await plugins.check(sandbox(pod), added)
    assert not [name for name in os.listdir(tmp_path / "addresses") if name.startswith(("10.", "fd09"))]


@pytest.mark.net
async def test_an_address_is_not_given_out_again_at_once_but_on_request(node: str, pod: str, tmp_path: Path) -> None:
    plugins = chain(node, tmp_path)
    seen = []
    for number in range(3):
        added = await plugins.add(sandbox(pod, f"c{number}"))
        seen.append(added.addresses[0])
        await plugins.delete(sandbox(pod, f"c{number}"), added)
    assert len(set(seen)) == 3
    again = await plugins.add(sandbox(pod, "c9", "10.9.0.2"))
    assert again.addresses[0] == "10.9.0.2"
    with pytest.raises(CniFault, match=r"10\.9\.0\.2 is in use"):
        await plugins.add(sandbox(pod, "c10", "10.9.0.2"))


@pytest.mark.net
async def test_a_full_range_refuses_and_leaks_nothing(node: str, pod: str, tmp_path: Path) -> None:
    plugins = chain(node, tmp_path)
    (tmp_path / "addresses").mkdir()
    for last in range(2, 7):
        (tmp_path / "addresses" / f"10.9.0.{last}").write_text("others")
    with pytest.raises(CniFault, match=r"no free address in 10\.9\.0\.0/29"):
        await plugins.add(sandbox(pod))
    assert "fd09::2" not in os.listdir(tmp_path / "addresses")


@pytest.mark.net
async def test_a_failing_plugin_names_itself_and_del_still_asks_the_others(node: str, pod: str, tmp_path: Path) -> None:
    plugins = chain(node, tmp_path, {"type": "bad"})
    bad = tmp_path / "bin" / "bad"
    bad.write_text('#!/bin/sh\necho \'{"cniVersion": "1.0.0", "code": 11, "msg": "not today"}\'\nexit 1\n')
    bad.chmod(0o755)
    with pytest.raises(CniFault, match="plugin bad ADD: not today"):
        await plugins.add(sandbox(pod))
    with pytest.raises(CniFault, match="plugin bad DEL: not today"):
        await plugins.delete(sandbox(pod), None)
    assert "10.9.0.2" not in os.listdir(tmp_path / "addresses")


@pytest.mark.net
async def test_a_missing_plugin_and_a_path_as_its_name_are_refused(node: str, pod: str, tmp_path: Path) -> None:
    for name in ("missing", "../bin/lab-bridge"):
        plugins = chain(node, tmp_path, {"type": name})
        with pytest.raises(CniFault, match="failed to find plugin"):
            await plugins.add(sandbox(pod))
        with pytest.raises(CniFault, match="failed to find plugin"):
            await plugins.delete(sandbox(pod), None)
