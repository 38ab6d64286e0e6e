"""Kernel headers are found where distributions put them, in order; otherwise the message names the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from ambient.errors import PlatformFault
from ambient.io import kernel_headers

RELEASE = "6.18.0-test"


def debian(root: Path, version: str, flavour: str = "amd64") -> None:
    arch = root / f"usr/src/linux-headers-{version}-{flavour}"
    common = root / f"usr/src/linux-headers-{version}-common"
    for path in (arch / "include/generated/autoconf.h", common / "include/linux/kconfig.h", common / "Makefile"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(version)
    (arch / "include/linux").mkdir(exist_ok=True)
    (arch / "include/linux/only-arch.h").write_text("")


def test_those_of_the_running_kernel_come_first(tmp_path):
    debian(tmp_path, "6.1.0-1")
    (tmp_path / "lib/modules" / RELEASE / "build").mkdir(parents=True)
    assert kernel_headers.find(RELEASE, tmp_path / "tree", tmp_path) is None


def test_then_those_the_kernel_carries_itself(tmp_path):
    debian(tmp_path, "6.1.0-1")
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/kheaders.tar.xz").write_text("")
    assert kernel_headers.find(RELEASE, tmp_path / "tree", tmp_path) is None


def test_debians_two_halves_are_merged_and_the_newest_wins(tmp_path):
    debian(tmp_path, "6.1.0-9")
    debian(tmp_path, "6.1.0-10")
    tree = kernel_headers.find(RELEASE, tmp_path / "tree", tmp_path)
    assert tree == tmp_path / "tree"
    assert (tree / "include/generated/autoconf.h").read_text() == "6.1.0-10"
    assert (tree / "include/linux/kconfig.h").read_text() == "6.1.0-10"
    assert (tree / "include/linux/only-arch.h").exists()
    assert (tree / "Makefile").exists()


def test_a_tree_that_is_whole_is_used_as_it_is(tmp_path):
    whole = tmp_path / "usr/src/linux-headers-6.8.0-1-generic"
    for name in ("include/generated/autoconf.h", "include/linux/kconfig.h"):
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).write_text("")
    assert kernel_headers.find(RELEASE, tmp_path / "tree", tmp_path) == whole


def test_half_a_package_is_none(tmp_path):
    debian(tmp_path, "6.1.0-1")
    (tmp_path / "usr/src/linux-headers-6.1.0-1-common/include/linux/kconfig.h").unlink()
    with pytest.raises(PlatformFault, match="apt-get install linux-headers-amd64"):
        kernel_headers.find(RELEASE, tmp_path / "tree", tmp_path)


def test_without_any_the_message_names_the_package(tmp_path):
    with pytest.raises(PlatformFault, match="apt-get install linux-headers-amd64"):
        kernel_headers.find(RELEASE, tmp_path / "tree", tmp_path)
