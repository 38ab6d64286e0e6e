"""Writing the World: what finds no room makes the maps incomplete, and is counted, until it fits."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from ambient.datapath.entries import LocalPod
from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import SettingsValue, WorkloadValue
from ambient.errors import PlatformFault
from ambient.model.address import parse_ip
from ambient.model.workload import Workload
from ambient.model.world import World
from ambient.node import kernel as kernels
from ambient.node.kernel import Kernel
from ambient.node.records import Names
from ambient.settings import NodeSettings


class Table(dict[Any, Any]):
    """A map with a limit, as the kernel has them; counts what is written."""

    limit = 100
    writes = 0

    def __setitem__(self, key: Any, value: Any) -> None:
        if key not in self and len(self) >= self.limit:
            raise PlatformFault("no room")
        self.writes += 1
        super().__setitem__(key, value)

    def delete(self, key: Any) -> bool:
        return self.pop(key, None) is not None


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    def settings(_: NodeSettings, before: SettingsValue) -> SettingsValue:
        return SettingsValue(heartbeat_ns=time.monotonic_ns(), mode=before.mode)

    monkeypatch.setattr(kernels, "_settings_value", settings)
    maps: Any = SimpleNamespace(
        workloads=Table(),
        services=Table(),
        endpoints=Table(),
        verdicts=Table(),
        flows=Table(),
        enrolled=Table(),
        settings=SettingsValue(mode=1),
        counters=lambda: {"kernel": 0},
        tables={"flows": Table()},
    )
    return Kernel(NodeSettings(node_name="n1"), Names(tmp_path / "names.json"), maps)


def world(count: int) -> World:
    return World.of(
        Workload(uid=f"w{n}", name=f"w{n}", namespace="shop", addresses=(parse_ip(f"10.0.0.{n}"),), node="n2")
        for n in range(1, count + 1)
    )


OURS = LocalPod("ours", ("10.0.0.200",), 5, True)


def test_the_maps_are_complete_once_the_first_world_is_in_them(kernel: Kernel) -> None:
    kernel.put_pods([OURS])
    kernel.beat()
    assert kernel.maps.settings is not None and kernel.maps.settings.complete == 0
    kernel.put_world(World(), [OURS])
    assert kernel.maps.settings.complete == 1


def test_the_same_world_again_writes_nothing(kernel: Kernel) -> None:
    kernel.put_world(world(5), [OURS])
    table: Any = kernel.maps.workloads
    before = table.writes
    kernel.put_world(world(5), [OURS])
    assert before == 6 and table.writes == before


def test_what_finds_no_room_makes_the_maps_incomplete_until_it_fits(kernel: Kernel) -> None:
    table: Any = kernel.maps.workloads
    table.limit = 4
    kernel.put_world(world(6), [])
    assert kernel.maps.settings is not None and kernel.maps.settings.complete == 0
    assert kernel.refused == 2 and "no room" in kernel.problem
    kernel.put_world(world(3), [])
    assert kernel.maps.settings.complete == 1 and kernel.problem == ""


def test_who_was_silent_for_long_is_believed_only_after_it_asked_anew(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.put_world(world(1), [OURS])
    silent_ns = LAYOUT["AGENT_SILENT_S"] * 10**9
    for later_ns, believed in ((silent_ns - 10**9, 1), (silent_ns + 1, 0)):
        assert kernel.maps.settings is not None
        now_ns = kernel.maps.settings.heartbeat_ns + later_ns
        monkeypatch.setattr(kernels.time, "monotonic_ns", lambda now_ns=now_ns: now_ns)
        kernel.beat()
        assert kernel.maps.settings.heartbeat_ns == now_ns and kernel.maps.settings.complete == believed
    kernel.put_world(world(2), [OURS])  # of a stream from before: another loss may be behind it
    kernel.believe(0)
    assert kernel.maps.settings.complete == 0
    kernel.believe(kernel.doubts)
    assert kernel.maps.settings.complete == 1


def test_what_cannot_be_written_to_the_end_counts_for_nobody(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, say: numbers are written down before they are used."""
    kernel.put_world(world(1), [OURS])
    revoked: list[bool] = []
    monkeypatch.setattr(kernel.same_node, "revoke", lambda: revoked.append(True))
    with monkeypatch.context() as broken:
        broken.setattr(Names, "save", Mock(side_effect=OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            kernel.put_world(world(2), [OURS])
        assert kernel.maps.settings is not None and kernel.maps.settings.complete == 0
        assert revoked and "full" in kernel.problem
        with pytest.raises(OSError, match="full"):
            kernel.put_pods([OURS])
    kernel.put_pods([OURS])
    assert kernel.maps.settings.complete == 0  # the World is not in the maps yet
    kernel.put_world(world(2), [OURS])
    assert kernel.maps.settings.complete == 1 and kernel.problem == ""


def test_numbers_in_the_kernel_are_nobody_elses_when_their_names_are_lost(tmp_path: Path, kernel: Kernel) -> None:
    kernel.put_world(world(3), [OURS])
    used = {value.workload for value in kernel.maps.workloads.values()}  # type: ignore[attr-defined]
    names = Names(tmp_path / "lost.json")
    again = Kernel(NodeSettings(node_name="n1"), names, kernel.maps)
    again.put_world(World(), [LocalPod("another", ("10.0.0.201",), 6, True)])
    assert names.workloads.of("another") > max(used)


def test_an_operators_bypass_outlives_the_agent(kernel: Kernel) -> None:
    kernel.beat()
    assert kernel.maps.settings is not None and kernel.maps.settings.mode == 1


def test_entries_of_an_earlier_agent_serve_until_the_first_world(tmp_path: Path, kernel: Kernel) -> None:
    table: Any = kernel.maps.workloads
    table["10.0.0.9"] = WorkloadValue(3, 1, 3)
    table["10.0.0.201"] = WorkloadValue(4, kernels.entries.LOCAL, 3)  # a pod of ours that is gone
    again = Kernel(NodeSettings(node_name="n1"), Names(tmp_path / "names.json"), kernel.maps)
    again.put_pods([OURS])
    assert set(table) == {"10.0.0.9", "10.0.0.200"}
    again.put_world(World(), [OURS])
    assert set(table) == {"10.0.0.200"}


def test_a_cgroup_that_holds_the_pods_cannot_be_exempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pods, beside = tmp_path / "kubepods", tmp_path / "agent"
    pods.mkdir()
    beside.mkdir()
    monkeypatch.setattr(kernels.cgroup, "of_pid", lambda pid: beside)
    fine = NodeSettings(node_name="n", node_cgroup=str(tmp_path), pods_cgroup=str(pods))
    assert kernels._settings_value(fine, SettingsValue()).exempt_cgroups == (beside.stat().st_ino,)
    for field in ("ztunnel_cgroup", "agent_cgroup"):
        settings = NodeSettings(
            node_name="n", node_cgroup=str(tmp_path), pods_cgroup=str(pods), **{field: str(tmp_path)}
        )
        with pytest.raises(PlatformFault, match=field):
            kernels._settings_value(settings, SettingsValue())
