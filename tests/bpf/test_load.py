"""Loading is all or nothing, says what is in the way, and never trusts pins of another layout."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from ambient.cli import check
from ambient.datapath.layout import LAYOUT
from ambient.errors import LayoutMismatch, PlatformFault
from ambient.io import bpf_links, bpf_load, bpf_selftest_destroy, bpf_sys, bpffs, cgroup, sock_diag
from ambient.io.bpf_maps import Maps
from tests.support.foreign import connect4_program
from tests.support.require import require

pytestmark = [pytest.mark.bpf, pytest.mark.net]


@pytest.fixture
def place(netlab, request):
    """(bpffs directory, node's cgroup, pods' cgroup), not loaded."""
    require("bpf")
    node = cgroup.create(netlab.cgroup / "load")
    pods = cgroup.create(node / "kubepods")
    directory = Path(f"/sys/fs/bpf/ambient-test-{os.getpid()}-load")
    yield directory, node, pods
    bpf_links.unload(directory)
    cgroup.remove(node)


def test_loading_twice_is_once(loaded_node):
    """The second run compiles nothing, changes nothing and says so."""
    before = bpf_links.attachments(loaded_node.bpffs_dir)
    said = loaded_node.load()
    assert "already loaded and attached" in said
    assert bpf_links.attachments(loaded_node.bpffs_dir) == before
    assert "loaded layout" in loaded_node.loader_said


def test_every_hook_is_attached_where_it_belongs(loaded_node):
    found = {entry.hook: entry for entry in bpf_links.attachments(loaded_node.bpffs_dir)}
    assert set(found) == {hook.name for hook in bpf_links.HOOKS} - {"sk_lookup", "enrol", "sk_msg"}
    pods, node = cgroup.cgroup_id(loaded_node.cgroup / "kubepods"), cgroup.cgroup_id(loaded_node.cgroup)
    for hook in bpf_links.HOOKS:
        if hook.where in (bpf_links.NODE, bpf_links.PODS):
            assert found[hook.name].target == (pods if hook.where == bpf_links.PODS else node)


def test_checking_compiles_and_attaches_nothing(place):
    directory, node, pods = place
    command = [sys.executable, "-m", "ambient.io.bpf_load", "--check", "--bpffs-dir", directory]
    command += ["--node-cgroup", node, "--pods-cgroup", pods]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compiles and loads" in done.stdout
    assert not directory.exists()


def test_a_foreign_program_that_allows_no_other_is_named_and_nothing_stays(place):
    directory, node, pods = place
    prog = connect4_program()
    fd = os.open(node, os.O_RDONLY | os.O_DIRECTORY)
    result, _ = bpf_sys._command(8, struct.pack("=IIII", fd, prog, bpf_sys.ATTACH_CONNECT4, 0))
    assert result == 0, os.strerror(-result)
    try:
        with pytest.raises(PlatformFault, match=r'program \d+ "stranger" \(type 18, exclusive\).*BPF_F_ALLOW_MULTI'):
            bpf_load.load(directory, node, pods)
        assert list(directory.iterdir()) == []
        assert bpf_sys.prog_query(fd, bpf_sys.ATTACH_SOCK_OPS)[0] == ()
    finally:
        bpf_sys._command(9, struct.pack("=IIII", fd, prog, bpf_sys.ATTACH_CONNECT4, 0))
        os.close(fd)
        os.close(prog)


def test_a_kernel_that_does_not_do_what_is_needed_is_refused_before_anything_is_pinned(place, monkeypatch):
    """Stand-in for such a kernel: a connect4 program that does nothing."""
    directory, node, pods = place
    real = bpf_load.Compiled

    def crippled():
        compiled = real()
        compiled.programs["connect4"] = connect4_program()
        return compiled

    monkeypatch.setattr(bpf_load, "Compiled", crippled)
    with pytest.raises(PlatformFault, match=r"self-test: .*Network is unreachable"):
        bpf_load.load(directory, node, pods)
    assert list(directory.iterdir()) == []
    assert [path.name for path in node.iterdir() if path.is_dir()] == ["kubepods"]


def refuses(*_):
    raise PlatformFault("closing a TCP socket (SOCK_DESTROY): EOPNOTSUPP")


@pytest.mark.parametrize(
    ("destroy", "said"),
    [(refuses, "EOPNOTSUPP"), (lambda *_: False, "finds no socket"), (lambda *_: True, "left it open")],
    ids=["refused", "not found", "without effect"],
)
def test_a_kernel_that_cannot_close_connections_authorizes_none(place, monkeypatch, destroy, said):
    """Stand-ins for CONFIG_INET_DIAG_DESTROY not set, and for worse."""
    directory, node, pods = place
    monkeypatch.setattr(sock_diag, "destroy", destroy)
    assert said in bpf_selftest_destroy.run()
    loaded = bpf_load.load(directory, node, pods)
    assert "goes through ztunnel" in loaded and said in loaded
    with Maps.open(directory) as maps:
        assert maps.settings.acceleration & LAYOUT["NO_DESTROY"]
    result = check.closing()
    assert result.status == "warning" and said in result.detail and "CONFIG_INET_DIAG_DESTROY" in result.hint


def test_this_kernel_closes_connections(loaded_node):
    assert bpf_selftest_destroy.run() == ""
    assert check.closing().status == "ok"
    with Maps.open(loaded_node.bpffs_dir) as maps:
        assert not maps.settings.acceleration & LAYOUT["NO_DESTROY"]


def test_a_cgroup_that_is_not_there_is_named(place, capsys):
    directory, node, _ = place
    arguments = ["--bpffs-dir", str(directory), "--node-cgroup", str(node), "--pods-cgroup", str(node / "nothing")]
    assert bpf_load.main(arguments) == 1
    assert "nothing: No such file or directory" in capsys.readouterr().err


def test_programs_attached_to_other_living_cgroups_are_not_moved(loaded_node, place):
    _, node, pods = place
    with pytest.raises(PlatformFault, match=f"attached to other cgroups: connect4 to {loaded_node.cgroup}/kubepods"):
        bpf_load.load(loaded_node.bpffs_dir, node, pods)


def test_pins_of_cgroups_that_are_gone_and_of_a_crashed_loader_are_replaced(place):
    directory, node, pods = place
    bpf_load.load(directory, node, pods)
    (directory / "new-1").mkdir()
    old = cgroup.cgroup_id(node)
    assert cgroup.path_of_id(old) == node
    cgroup.remove(node)
    assert cgroup.path_of_id(old) is None
    cgroup.create(pods)
    said = bpf_load.load(directory, node, pods)
    assert said.startswith("loaded layout")
    assert [path.name for path in directory.iterdir()] == [LAYOUT.version]
    ids = {"node": cgroup.cgroup_id(node), "pods": cgroup.cgroup_id(pods)}
    assert all(entry.target == ids[entry.where] for entry in bpf_links.attachments(directory))


def test_maps_of_another_size_are_refused(place):
    directory, _, _ = place
    version = bpffs.ensure(directory / LAYOUT.version / "maps")
    attr = struct.pack("=IIIII", 1, 8, 24, 16, 1)  # BPF_MAP_CREATE: hash, key 8, value 24, 16 entries, no prealloc
    fd, _ = bpf_sys._command(0, attr)
    assert fd >= 0
    bpf_sys.obj_pin(fd, str(version / "enrolled"))
    os.close(fd)
    with pytest.raises(LayoutMismatch, match=r"map enrolled: .*\(8, 24, 16\).*\(8, 64, 1024\)"):
        Maps.open(directory)


def test_pins_of_another_layout_are_not_opened_but_named(place):
    directory, _, _ = place
    bpffs.ensure(directory / "v1-00000000" / "maps")
    with pytest.raises(LayoutMismatch, match="v1-00000000 are there, of another version of ambient"):
        Maps.open(directory)
    assert bpf_links.other_versions(directory) == ["v1-00000000"]
    bpf_links.unload(directory, ["v1-00000000"])
    assert bpf_links.other_versions(directory) == []


def test_without_any_pins_the_message_says_what_to_do(place):
    with pytest.raises(LayoutMismatch, match="is `ambient node` running"):
        Maps.open(place[0])


def test_unloading_what_is_not_there_is_fine(place):
    bpf_links.unload(place[0])
    bpf_links.unload("/nonexistent/ambient")


def test_pod_uids_are_names_and_not_paths(loaded_node):
    for uid in ("", "..", "a/b", ".hidden", "x" * 129, "a\0b"):
        with pytest.raises(PlatformFault, match="pod UID"):
            bpf_links.attach_sk_lookup(loaded_node.bpffs_dir, 0, uid)


def test_names_with_dots_are_refused_before_the_kernel_does():
    with pytest.raises(PlatformFault, match="no dots"):
        bpffs.ensure("/sys/fs/bpf/ambient.test/x")
