"""Finding a living pod in the cgroup tree, and telling who cannot be served."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.node import inspect
from ambient.node.inspect import Namespace
from ambient.node.listeners import Refused, listening_ports

UID = "3c9e09c8-bf21-4787-a1e8-552ec5d9aacf"


@pytest.mark.parametrize(
    "path",
    [
        f"pod{UID}",
        f"burstable/pod{UID}",
        f"kubepods-besteffort.slice/kubepods-besteffort-pod{UID.replace('-', '_')}.slice",
        f"kubepods-pod{UID.replace('-', '_')}.slice",
    ],
)
def test_a_pod_is_found_by_the_names_of_both_cgroup_drivers(tmp_path: Path, path: str) -> None:
    (tmp_path / path / "container").mkdir(parents=True)
    (tmp_path / "burstable/pod3c9e09c8-bf21-4787-a1e8-000000000000").mkdir(parents=True)
    assert inspect.pod_directories(tmp_path, UID) == [tmp_path / path]


def test_a_name_that_only_resembles_the_pods_is_not_it(tmp_path: Path) -> None:
    for name in (f"xpod{UID}", f"pod{UID}x", f"pod{UID[:-1]}", UID[:-1], f"pod{UID.replace('-', '_')}"):
        (tmp_path / name).mkdir()
    assert inspect.pod_directories(tmp_path, UID) == []


def test_processes_of_all_containers_are_found_oldest_first(tmp_path: Path) -> None:
    for name, text in (("", "7\n"), ("a", "30\n5\n"), ("a/b", "x\n")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "cgroup.procs").write_text(text)
    assert inspect.processes(tmp_path) == [5, 7, 30]


def test_processes_in_our_own_namespace_say_nothing(tmp_path: Path) -> None:
    (tmp_path / f"pod{UID}").mkdir()
    (tmp_path / f"pod{UID}" / "cgroup.procs").write_text(f"{os.getpid()}\n4194304\n")
    assert inspect.namespaces_of(tmp_path, UID) == []


def test_a_second_namespace_in_the_pod_is_refused_and_the_pods_own_is_not() -> None:
    own, inner = Namespace("/proc/1/ns/net", 5), Namespace("/proc/2/ns/net", 6)
    inspect.check_not_nested([own], 5)
    inspect.check_not_nested([], 5)
    with pytest.raises(Refused) as refusal:
        inspect.check_not_nested([own, inner], 5)
    assert refusal.value.reason == "nested_namespaces"


@pytest.mark.parametrize(
    ("inherited", "four", "six", "interfaces", "refused"),
    [
        (False, False, False, ["lo", "eth0"], False),
        (False, True, False, ["lo", "eth0"], True),
        (True, True, False, ["lo", "eth0", "tunl0"], False),
        (True, True, False, ["lo", "eth0", "docker0"], True),
        (True, False, False, ["lo", "eth0", "docker0"], False),
        (False, False, True, ["lo", "eth0"], True),
    ],
)
def test_forwarding_is_refused_unless_it_is_only_inherited(
    monkeypatch: pytest.MonkeyPatch, inherited: bool, four: bool, six: bool, interfaces: list[str], refused: bool
) -> None:
    monkeypatch.setattr(inspect, "_fresh_namespace_forwards", lambda: inherited)
    monkeypatch.setattr(inspect, "run_in_netns", lambda fd, function: (four, six, interfaces))
    if refused:
        with pytest.raises(Refused, match="forwards"):
            inspect.check_not_forwarding(3)
    else:
        inspect.check_not_forwarding(3)


TABLE = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:3A99 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 0100007F:1F90 00000000:0000 01 00000000:00000000 00:00000000 00000000     0        0 1 1
   2: 00000000000000000000000000000000:3AA0 0000:0000 0A
"""


def test_only_listeners_are_taken_from_the_kernels_table() -> None:
    assert listening_ports(TABLE) == {15001, 15008}


@given(st.text())
def test_any_table_can_be_read(text: str) -> None:
    assert all(port >= 0 for port in listening_ports("header\n" + text))
