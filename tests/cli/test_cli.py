"""The command line's manners: where it looks, what it prints, how it exits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from ambient.cli import check, cli, target
from ambient.cli.namespace import find_kubeconfig
from ambient.cli.output import cell, emit, table
from ambient.datapath.layout import LAYOUT
from ambient.errors import AmbientError, ConfigFault, LayoutMismatch, PlatformFault
from ambient.io.bpf_maps import Maps
from ambient.lab import lifecycle

NOWHERE = Path("/nonexistent")


def node_file(labs: Path, lab: str, node: str) -> Path:
    path = labs / lab / "nodes" / node / "node.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"node_name: {node}\nrun_dir: {path.parent}\n")
    return path


def test_the_nodes_of_the_only_lab_are_found_and_one_can_be_chosen(tmp_path: Path) -> None:
    for node in ("node1", "node2"):
        node_file(tmp_path, "demo", node)
    everything = target.find_nodes(target.Target(None, None, None), tmp_path, NOWHERE)
    assert [n.node_name for n in everything] == ["node1", "node2"]
    (one,) = target.find_nodes(target.Target(None, None, "node2"), tmp_path, NOWHERE)
    assert one.node_name == "node2"
    with pytest.raises(ConfigFault, match="is not one of node1, node2"):
        target.find_nodes(target.Target(None, None, "node3"), tmp_path, NOWHERE)


def test_two_labs_must_be_told_apart(tmp_path: Path) -> None:
    node_file(tmp_path, "a", "node1")
    node_file(tmp_path, "b", "node1")
    with pytest.raises(ConfigFault, match="name one of a, b"):
        target.find_nodes(target.Target(None, None, None), tmp_path, NOWHERE)
    assert target.find_nodes(target.Target(None, "b", None), tmp_path, NOWHERE)[0].run_dir.startswith(
        str(tmp_path / "b")
    )
    with pytest.raises(ConfigFault, match="no such lab"):
        target.find_nodes(target.Target(None, "c", None), tmp_path, NOWHERE)


def test_the_machines_own_node_goes_before_a_lab(tmp_path: Path) -> None:
    node_file(tmp_path, "demo", "node1")
    own = tmp_path / "node.yaml"
    own.write_text("node_name: metal\n")
    assert target.find_nodes(target.Target(None, None, None), tmp_path, own)[0].node_name == "metal"
    assert target.find_nodes(target.Target(None, "demo", None), tmp_path, own)[0].node_name == "node1"


def test_without_any_node_the_next_step_is_said(tmp_path: Path) -> None:
    with pytest.raises(PlatformFault, match="give --config FILE or start a lab"):
        target.find_nodes(target.Target(None, None, None), tmp_path, NOWHERE)


def test_a_lab_gives_its_kubeconfig_unless_another_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "kubeconfig").write_text("")
    assert find_kubeconfig(None, None, tmp_path) == str(tmp_path / "demo" / "kubeconfig")
    assert find_kubeconfig("mine", None, tmp_path) == "mine"
    monkeypatch.setenv("KUBECONFIG", "/env/config:/other")
    assert find_kubeconfig(None, None, tmp_path) == "/env/config"
    assert find_kubeconfig(None, "demo", tmp_path) == str(tmp_path / "demo" / "kubeconfig")


def test_a_table_has_upper_case_headings_and_shows_nothing_as_a_dash() -> None:
    assert table([{"pod_name": "a", "x": None}], ("pod_name", "x")).splitlines() == ["POD NAME  X", "a         -"]
    assert (cell(True), cell(["a", "b"]), cell(0)) == ("yes", "a,b", "0")


def test_json_and_yaml_hold_every_field_and_empty_is_said_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"name": "a", "hidden": 1}]
    emit(rows, "json", ("name",))
    assert json.loads(capsys.readouterr().out) == rows
    emit(rows, "yaml", ("name",))
    assert yaml.safe_load(capsys.readouterr().out) == rows
    emit([], "table", ("name",), empty="no rows")
    assert capsys.readouterr() == ("", "no rows\n")


def test_an_unknown_command_is_misuse() -> None:
    assert CliRunner().invoke(cli, ["frobnicate"]).exit_code == 2
    assert CliRunner().invoke(cli, ["version", "-o", "xml"]).exit_code == 2


def test_a_fault_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    missing = tmp_path / "node.yaml"
    result = CliRunner().invoke(cli, ["maps", "--config", str(missing)])
    assert result.exit_code == 1
    assert str(missing) in result.output
    assert "Traceback" not in result.output


def test_maps_of_another_layout_are_refused(tmp_path: Path) -> None:
    config = tmp_path / "node.yaml"
    config.write_text(f"node_name: a\nbpffs_dir: {tmp_path}\n")
    (tmp_path / "v0-deadbeef").mkdir()
    result = CliRunner().invoke(cli, ["maps", "--config", str(config)])
    assert result.exit_code == 1
    assert "v0-deadbeef" in result.output
    assert issubclass(LayoutMismatch, AmbientError)


def test_who_may_not_look_at_the_maps_is_told_to_be_root(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o000)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(PlatformFault, match="Permission denied: run as root"):
            Maps.open(closed)
    finally:
        os.seteuid(before)


def test_the_map_that_cannot_be_listed_says_so(tmp_path: Path) -> None:
    config = tmp_path / "node.yaml"
    config.write_text("node_name: a\n")
    result = CliRunner().invoke(cli, ["maps", "pending", "--config", str(config)])
    assert (result.exit_code, "lives in sockets" in result.output) == (2, True)
    assert CliRunner().invoke(cli, ["maps", "flux", "--config", str(config)]).exit_code == 2


@pytest.mark.parametrize(
    ("release", "status"),
    [("6.18.44-x", "ok"), ("5.15.0", "ok"), ("5.14.21", "error"), ("4.19", "error"), ("plan9", "error")],
)
def test_the_kernel_floor_is_5_15(release: str, status: str) -> None:
    result = check.kernel_version(release)
    assert result.status == status
    assert bool(result.hint) == (status != "ok")


def test_check_exits_by_its_worst_result(monkeypatch: pytest.MonkeyPatch) -> None:
    fine, odd, bad = (check.Result(s, "found", "" if s == "ok" else "do this") for s in ("ok", "warning", "error"))
    for results, code in (((fine, odd), 0), ((fine, bad), 1)):
        checks = {"kernel": tuple((f"check {n}", lambda r=r: r) for n, r in enumerate(results))}
        monkeypatch.setattr(check, "CHECKS", checks)
        result = CliRunner().invoke(cli, ["check", "-o", "json"])
        assert result.exit_code == code
        assert json.loads(result.output)["success"] is (code == 0)
        as_yaml = CliRunner().invoke(cli, ["check", "-o", "yaml"])
        assert (as_yaml.exit_code, yaml.safe_load(as_yaml.output)) == (code, json.loads(result.output))
        assert "do this" in CliRunner().invoke(cli, ["check"]).output


def test_addresses_in_a_table_are_never_taken_for_pictures() -> None:
    assert table([{"a": "fd00:96::100: :80"}], ("a",)).splitlines()[1] == "fd00:96::100: :80"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("word", ["version", "--help"])
def test_what_cannot_be_written_is_one_line_and_exit_code_1(word: str, unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        argv = [sys.executable, "-c", "from ambient.cli import main; main()", word]
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (1, "ambient: [Errno 28] No space left on device\n")


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, "-c", "from ambient.cli import main; main()", "version"]
    done = subprocess.run(argv, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_wrong_names_of_nodes_labs_and_maps_are_misuse(tmp_path: Path) -> None:
    config = tmp_path / "node.yaml"
    config.write_text("node_name: a\n")
    for words in (["maps", "flux"], ["maps", "--node", "b"], ["maps", "counters", "--raw"], ["maps", "--raw"]):
        assert CliRunner().invoke(cli, [*words, "--config", str(config)]).exit_code == 2, words
    assert CliRunner().invoke(cli, ["maps", "--lab", "nosuch"]).exit_code == 2
    assert CliRunner().invoke(cli, ["why", "a", "b", "--config", str(config)]).exit_code == 2


def test_a_settings_file_is_refused_without_repeating_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "key.yaml"
    config.write_text("secret words of somebody [\n")
    result = CliRunner().invoke(cli, ["maps", "--config", str(config)])
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    config.write_text("- secret\n")
    result = CliRunner().invoke(cli, ["maps", "--config", str(config)])
    assert result.exit_code == 1 and "secret" not in result.output
    monkeypatch.setenv("AMBIENT_NODE_CONFIG", str(tmp_path / "gone"))
    result = CliRunner().invoke(cli, ["maps"])
    assert "gone (AMBIENT_NODE_CONFIG): No such file" in result.output and "run as root" not in result.output


def test_the_version_is_an_option_too() -> None:
    rows = json.loads(CliRunner().invoke(cli, ["version", "-o", "json"]).output)
    assert {"component": "layout", "version": LAYOUT.version} in rows
    assert CliRunner().invoke(cli, ["--version"]).output.startswith("ambient, version ")


def test_a_process_that_ended_and_was_not_waited_for_does_not_run(tmp_path: Path) -> None:
    file = tmp_path / "agent.pid"
    file.write_text(str(os.getpid()))
    assert lifecycle._pid_file(file) == os.getpid()
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    file.write_text(str(process.pid))
    assert lifecycle._pid_file(file) == 0
    process.wait()
    assert lifecycle._pid_file(file) == 0


@pytest.mark.parametrize("words", [["lab"], ["namespace"], ["bypass"]])
def test_the_help_of_a_group_cuts_no_sentence(words: list[str]) -> None:
    assert "..." not in CliRunner().invoke(cli, [*words, "--help"]).output.partition("Commands:")[2]
