"""The beginning and the end of labs: two at once, names in use, and an end that leaves nothing, whatever died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ambient.io import cgroup
from ambient.lab import record
from ambient.lab.driver import CommandFailed, Driver, eventually
from ambient.lab.topology import Lab
from tests.support.require import require

SHOP = Path(__file__).parents[2] / "examples" / "shop.yaml"
pytestmark = [pytest.mark.net, pytest.mark.lab]


def traces(lab: Lab) -> list[str]:
    """Everything of a lab that the machine still knows of."""
    found = [name for name in os.listdir("/run/netns") if lab.owns_netns(name)] if os.path.isdir("/run/netns") else []
    found += [str(lab.directory)] if Path(lab.directory).exists() else []
    tree = cgroup.mount_point() / lab.cgroup
    found += [str(tree)] if tree.exists() else []
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    found += [line for line in mounts if f"{lab.directory}/" in line or f"al-{lab.name}-" in line]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"  # dead, PID 1 will see to it
                if not zombie and f"ambient-lab-{lab.name}/" in (entry / "cgroup").read_text():
                    found.append(f"process {entry.name}")
            except OSError:
                continue
    return found


@pytest.fixture
def labs() -> Iterator[list[Driver]]:
    require("net", "nft", "kubectl")
    drivers = [Driver(f"l{os.getpid()}"), Driver(f"l{os.getpid()}-b", nodes=1, ipv6=False)]
    try:
        yield drivers
    finally:
        for driver in drivers:
            driver.down()


def test_two_labs_at_once_do_not_see_each_other_and_one_goes_without_the_other(labs: list[Driver]) -> None:
    one, other = labs
    one.up([SHOP], "--no-mesh")
    other.up([], "--no-mesh", "--no-ipv6")
    assert traces(one.lab) and traces(other.lab)
    assert not any(ns["metadata"]["name"] == "shop" for ns in other.get("namespaces")["items"])
    # the same addresses in both, and no confusion
    assert one.pods("shop")["client"]["status"]["podIP"].startswith("10.244.1.")
    before = one.pods("shop")["client"]["status"]["containerStatuses"][0]["containerID"]
    other.down()
    assert traces(other.lab) == []
    assert one.pods("shop")["client"]["status"]["containerStatuses"][0]["containerID"] == before
    assert "200" in one.exec("shop", "client", "python3", str(SHOP.parent / "shop" / "get.py"), "http://frontend/buy")
    one.down()
    assert traces(one.lab) == []


def test_after_the_supervisor_was_killed_the_lab_says_so_and_down_leaves_nothing(labs: list[Driver]) -> None:
    one = labs[0]
    one.up([SHOP], "--no-mesh")
    found = record.read(one.lab.name)
    os.kill(found.supervisor_pid, signal.SIGKILL)
    eventually(lambda: not record.alive(found), 5, "the supervisor to end")
    with pytest.raises(CommandFailed):
        one.ambient("lab", "status", "--name", one.lab.name)
    assert len(traces(one.lab)) > 10
    one.down()
    assert traces(one.lab) == []
    one.down()


def test_down_works_by_name_when_the_files_are_gone(labs: list[Driver]) -> None:
    other = labs[1]
    other.up([], "--no-mesh", "--no-ipv6")
    for path in (Path(other.lab.directory) / "lab.json", Path(other.lab.kubeconfig)):
        path.unlink()
    other.down()
    assert traces(other.lab) == []


def test_a_name_in_use_is_refused_and_the_lab_of_that_name_stays(labs: list[Driver]) -> None:
    other = labs[1]
    other.up([], "--no-mesh", "--no-ipv6")
    with pytest.raises(CommandFailed, match="is there already"):
        other.up([], "--no-mesh")
    assert len(other.get("nodes")["items"]) == 1


def test_a_bad_file_starts_nothing(labs: list[Driver], tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("kind: Pod\nmetadata: {}\n")
    with pytest.raises(CommandFailed, match=r"bad\.yaml: apiVersion"):
        labs[1].up([bad], "--no-mesh")
    assert traces(labs[1].lab) == []


def test_pods_that_do_not_become_ready_end_up_with_exit_code_1_and_the_reason(
    labs: list[Driver], tmp_path: Path
) -> None:
    file = tmp_path / "pod.yaml"
    file.write_text(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: default}\n"
        "spec: {containers: [{name: c, image: none}]}\n"
    )
    with pytest.raises(CommandFailed, match=r"not ready: pod default/p: .*command.*must be given"):
        labs[1].up([file], "--no-mesh", "--no-ipv6", "--timeout", "2")


@pytest.mark.lab
@pytest.mark.parametrize("crash", [False, True])
def test_nothing_of_the_mesh_is_left_pins_and_programs_included(labs: list[Driver], crash: bool) -> None:
    require("lab")
    one = labs[0]
    one.up([SHOP])
    one.kubectl("label", "namespace", "shop", "istio.io/dataplane-mode=ambient")
    eventually(
        lambda: all("ambient.istio.io/redirection" in p["metadata"].get("annotations", {}) for p in shop(one)), 20, "it"
    )
    mine = pinned_programs(one.lab)
    assert len(mine) > 10
    if crash:
        for name in ("holder", "agent", "ztunnel"):
            for file in Path(one.lab.directory).glob(f"nodes/*/run/{name}.pid"):
                os.kill(int(file.read_text()), signal.SIGKILL)
        os.kill(record.read(one.lab.name).supervisor_pid, signal.SIGKILL)
    one.down()
    assert traces(one.lab) == []
    # programs go when the kernel has let go of the last socket and link, a moment later
    eventually(lambda: not mine & all_programs(), 10, "the programs to go")


def shop(driver: Driver) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = driver.get("pods", "-n", "shop")["items"]
    return found


def pinned_programs(lab: Lab) -> set[int]:
    """Programs that the links pinned in the lab's bpf file systems hold."""
    files = [path for path in Path(lab.bpffs).rglob("*") if path.is_file() and "maps" not in path.parts]
    links = [subprocess.run(["bpftool", "-j", "link", "show", "pinned", str(f)], capture_output=True) for f in files]
    return {int(json.loads(link.stdout)["prog_id"]) for link in links if link.returncode == 0}


def all_programs() -> set[int]:
    return {int(item["id"]) for item in json.loads(subprocess.check_output(["bpftool", "prog", "list", "-j"]))}
