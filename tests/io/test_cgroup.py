"""cgroup2 is found where it is mounted; pods' cgroups under the names kubelets use."""

from __future__ import annotations

from pathlib import Path

import pytest

from ambient.errors import PlatformFault
from ambient.io import cgroup

MOUNTS = r"""25 30 0:23 / /sys rw - sysfs sysfs rw
31 25 0:26 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
32 25 0:26 /some/slice /run/with\040space rw - cgroup2 none rw
33 25 0:27 / /sys/fs/bpf rw - bpf bpf rw
broken line
"""


def test_mounts_are_found_by_kind():
    assert cgroup.parse_mounts(MOUNTS, "cgroup2") == [
        ("/", Path("/sys/fs/cgroup/unified")),
        ("/some/slice", Path("/run/with space")),
    ]
    assert cgroup.parse_mounts(MOUNTS, "bpf") == [("/", Path("/sys/fs/bpf"))]
    assert cgroup.parse_mounts("", "bpf") == []


@pytest.mark.parametrize("name", cgroup.PODS_CGROUPS)
def test_the_pods_cgroup_is_found_under_each_name(tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    assert cgroup.find_pods_cgroup(tmp_path) == tmp_path / name


def test_without_one_the_message_names_the_setting(tmp_path):
    with pytest.raises(PlatformFault, match="pods_cgroup"):
        cgroup.find_pods_cgroup(tmp_path)


def test_the_lowest_common_cgroup_is_found():
    assert cgroup.common_ancestor(["/c/pods/a/x", "/c/pods/b"]) == Path("/c/pods")
    with pytest.raises(PlatformFault):
        cgroup.common_ancestor([])


def test_a_directory_elsewhere_is_no_cgroup(tmp_path):
    with pytest.raises(PlatformFault, match="not in a cgroup2 file system"):
        cgroup.create(tmp_path / "x")
    with pytest.raises(PlatformFault, match="No such file"):
        cgroup.cgroup_id(tmp_path / "y")
    with pytest.raises(PlatformFault, match="move process"):
        cgroup.move(1, tmp_path / "y")
