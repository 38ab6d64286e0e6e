"""`ambient bench`: what it judges by, and one quick run for its structure (never for speed)."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from click.testing import CliRunner

from ambient.bench import plan, plot
from ambient.bench.awake import awake
from ambient.bench.measure import another_path, read_wrk
from ambient.bench.report import Measurement, Report, memory_targets
from ambient.bench.run import compile_load, record_name
from ambient.bench.usage import role
from ambient.cli import cli
from ambient.errors import ConfigFault, PlatformFault
from ambient.lab import record
from tests.support.require import require

PATHS = {p.name: p for p in plan.PATHS}
WRK = """Running 2s test @ http://10.0.0.1:8080/
  Latency Distribution
     50%  812.00us
     75%    1.20ms
     99%    2.50ms
  40000 requests in 2.00s, 6.00MB read
{more}Requests/sec:  20000.00
"""


def test_only_takes_the_bases_along_and_refuses_unknown_words() -> None:
    chosen = plan.select(["mesh_across", "http_32"])
    assert [p.name for p in chosen.paths] == ["none_across", "mesh_across"]
    assert [w.name for w in chosen.works] == ["http_32"] and not chosen.memory
    everything = plan.select([])
    assert (everything.paths, everything.works, everything.memory) == (plan.PATHS, plan.WORKS, True)
    assert [w.name for w in plan.select([], quick=True).works] == list(plan.QUICK_WORKS)
    assert plan.select(["memory"]).works == () and not plan.select(["none_same"]).memory
    with pytest.raises(ConfigFault, match="is none of"):
        plan.select(["http_33"])


def test_paths_of_a_work_follow_each_other_and_every_other_round_goes_backwards() -> None:
    made = plan.order(plan.select(["mesh_off", "rtt_1", "connect"]), 2)
    names = [(number, work.name, path.name) for number, work, path in made]
    assert names[:2] == [(0, "rtt_1", "none_same"), (0, "rtt_1", "mesh_off")]
    assert names[4:6] == [(1, "rtt_1", "mesh_off"), (1, "rtt_1", "none_same")]
    assert len(names) == len(set(names)) == 8


def run_of(*values: tuple[str, str, dict[str, float]]) -> Report:
    return Report([Measurement(number, work, path, found) for number, (work, path, found) in enumerate(values)])


def test_medians_spreads_and_ratios_are_of_the_runs() -> None:
    report = run_of(
        *(("http_32", "none_across", {"per_s": v}) for v in (90.0, 100.0, 120.0)),
        *(("http_32", "mesh_across", {"per_s": v}) for v in (50.0, 40.0, 10.0)),
        *(("http_32", "envoy_across", {"per_s": v}) for v in (20.0, 25.0, 30.0)),
    )
    (row,) = [r for r in report.rows() if r["path"] == "mesh_across"]
    assert (row["median"], row["min"], row["max"], row["ratio"], row["spread"], row["runs"]) == (40, 10, 50, 0.4, 1, 3)
    met = {row["target"]: (row["measured"], row["met"]) for row in report.targets()}
    assert met == {
        "mesh_across http_32 per_s >= 0.35 x none_across": (0.4, True),
        "mesh_across http_32 per_s >= 1.2 x envoy_across": (1.6, True),
    }
    missed = run_of(("rtt_1", "none_same", {"p50_us": 10.0}), ("rtt_1", "mesh_direct", {"p50_us": 11.0}))
    assert [row["met"] for row in missed.targets()] == [False]


def test_errors_and_a_stream_that_was_not_redirected_make_a_run_fail() -> None:
    good = {"gbit_s": 1.0, "redirected_bytes": 60.0, "native_bytes": 40.0}
    bad = {"gbit_s": 1.0, "redirected_bytes": 40.0, "native_bytes": 60.0}
    assert run_of(("stream_16k", "mesh_redirect", good), ("rtt_1", "mesh_redirect", bad)).failures() == []
    (said,) = run_of(("stream_16k", "mesh_redirect", bad)).failures()
    assert "only 40% was redirected" in said
    assert run_of(("stream_1k", "mesh_redirect", bad)).failures()
    (row,) = run_of(("stream_16k", "mesh_redirect", bad)).rows()
    assert (row["redirected_bytes"], row["native_bytes"]) == (40, 60)
    assert run_of(("http_1", "mesh_off", {"per_s": 1.0, "errors": 2.0})).failures()


@pytest.mark.parametrize(
    ("path", "captured", "kernel", "right"),
    [
        ("mesh_direct", 0, 3, True),
        ("mesh_direct", 1, 2, False),
        ("mesh_redirect", 0, 0, False),
        ("mesh_off", 3, 0, True),
        ("mesh_off", 0, 0, False),
        ("mesh_across", 3, 1, False),
        ("none_same", 0, 0, True),
    ],
)
def test_a_measurement_counts_only_on_the_path_it_is_meant_for(
    path: str, captured: int, kernel: int, right: bool
) -> None:
    assert (another_path(PATHS[path], {"captured": captured, "kernel": kernel}) == "") is right


def test_what_wrk_says_is_read_with_its_units_and_errors() -> None:
    found = read_wrk(WRK.format(more=""))
    assert (found["per_s"], found["p50_us"], found["p99_us"], found["count"], found["errors"]) == (
        20000,
        812,
        2500,
        40000,
        0,
    )
    more = "  Socket errors: connect 1, read 2, write 3, timeout 4\n  Non-2xx or 3xx responses: 5\n"
    assert read_wrk(WRK.format(more=more))["errors"] == 15
    with pytest.raises(PlatformFault, match="unable to connect"):
        read_wrk("unable to connect to 10.0.0.1:8080")


def test_memory_is_judged_by_the_largest_process_of_a_kind() -> None:
    rows = [{"role": "worker", "rss_mb": 30.0}, {"role": "worker", "rss_mb": 41.0}, {"role": "parent", "rss_mb": 99.0}]
    (row,) = memory_targets({"idle": rows})
    assert (row["measured"], row["met"]) == (41.0, False)
    assert [role(name) for name in ("ztunnel-w0", "ztunnel-control", "python")] == ["worker", "control", "parent"]


def test_the_drawing_is_xml_with_a_bar_for_each_path() -> None:
    report = run_of(("rtt_1", "none_same", {"p50_us": 10.0}), ("rtt_1", "mesh_off", {"p50_us": 30.0}))
    root = ET.fromstring(plot.svg("a < b", report.rows()))
    bars = [e for e in root.iter("{http://www.w3.org/2000/svg}rect") if e.get("x")]
    assert [round(float(b.get("width", "0")) / float(bars[0].get("width", "1"))) for b in bars] == [1, 3]
    assert ET.fromstring(plot.svg("nothing", [])) is not None


def test_a_record_is_named_by_day_commit_and_what() -> None:
    result = {"at": "2026-11-21T09:00:00Z", "commit": "0123456789+"}
    assert record_name(result, ()) == "2026-11-21-0123456789-full"
    assert record_name(result, ("mesh_across", "http_32")) == "2026-11-21-0123456789-meshacross-http32"

    assert record_name(result, (), awake=True) == "2026-11-21-0123456789-full-awake"


def test_processors_are_kept_awake_by_processes_that_give_way_and_end_with_the_benchmark() -> None:
    with awake({0}) as (pid,):
        assert os.sched_getscheduler(pid) == os.SCHED_IDLE and os.sched_getaffinity(pid) == {0}
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    code = "from ambient.bench.awake import awake\nwith awake({0}) as pids:\n    print(*pids, flush=True)\n    input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        spinning = os.pidfd_open(int(killed.stdout.readline()))
        killed.kill()
    assert select.select([spinning], [], [], 10)[0], "it ends with who started it, however that ended"
    os.close(spinning)


def test_wrong_words_and_listing_need_no_lab() -> None:
    result = CliRunner().invoke(cli, ["bench", "--only", "nothing"])
    assert result.exit_code == 2 and "--only" in result.output
    listed = json.loads(CliRunner().invoke(cli, ["bench", "--list", "-o", "json"]).output)
    assert {row["name"] for row in listed} == {*PATHS, *(w.name for w in plan.WORKS)}


def test_the_load_generator_moves_every_byte_and_fails_without_a_server(tmp_path: Path) -> None:
    require("gcc", "nginx", "wrk")
    load = compile_load(tmp_path)

    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [str(load), *words]
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)

    refused = ask("rtt", "127.0.0.1", "1", "1", "0.1")
    assert refused.returncode == 1 and "refused" in refused.stderr
    assert ask("rtt", "127.0.0.1", "1", "0", "0.1").returncode == 2
    for port in range(17311, 17331):
        server = subprocess.Popen([str(load), "serve", str(port)], stderr=subprocess.DEVNULL)
        try:
            first = ask("hold", "127.0.0.1", str(port), "1", "0")
            while first.returncode and server.poll() is None:
                first = ask("hold", "127.0.0.1", str(port), "1", "0")
            if server.poll() is not None:
                continue  # somebody else's port
            assert json.loads(ask("hold", "127.0.0.1", str(port), "300", "0").stdout) == {"held": 300}
            trip = json.loads(ask("rtt", "127.0.0.1", str(port), "1024", "0.1").stdout)
            assert trip["count"] > 0 and 0 < trip["p50_us"] <= trip["p99_us"]
            assert trip["bytes"] == (trip["count"] + 20) * 1024
            stream = json.loads(ask("stream", "127.0.0.1", str(port), "16384", "0.1").stdout)
            assert stream["bytes"] > 1 and stream["bytes"] % 16384 == 1 and stream["enomem"] == 0
            made = json.loads(ask("connect", "127.0.0.1", str(port), "4", "0.1").stdout)
            assert made["count"] > 4 and made["errors"] == 0
            return
        finally:
            server.kill()
            server.wait()
    pytest.fail("no free port")


@pytest.mark.lab
@pytest.mark.net
@pytest.mark.interop
@pytest.mark.timeout(300)
def test_a_quick_run_measures_every_path_and_leaves_no_lab(tmp_path: Path) -> None:
    require("lab", "kubectl", "gcc", "nginx", "wrk", "envoy")
    file, svg = tmp_path / "result.json", tmp_path / "result.svg"
    argv = [sys.executable, "-m", "ambient", "bench", "--quick", "--out", str(file), "--svg", str(svg), "-o", "json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=280)
    assert file.exists(), done.stderr[-3000:]
    result = json.loads(file.read_text())
    # how much is redirected in a fifth of a second on a busy machine is a matter of speed
    assert [f for f in result["failures"] if "was redirected" not in f] == [], done.stderr[-3000:]
    assert json.loads(done.stdout) == result and done.returncode == (1 if result["failures"] else 0)
    measured = {(row["work"], row["path"]) for row in result["raw"]}
    assert measured >= {
        (work, path)
        for work in plan.QUICK_WORKS
        for path in ("none_same", "mesh_off", "none_across", "mesh_across", "envoy_across")
    }
    for name in ("mesh_direct", "mesh_redirect"):
        assert any(path == name for _, path in measured) or any(name in note for note in result["notes"])
    for row in result["raw"]:
        if row["path"] in ("mesh_off", "mesh_across"):
            assert row["captured"] > 0 and row.get("kernel", 0) == 0
    for state in ("idle", "after_load", "thousand"):
        assert {(r["node"], r["role"]) for r in result["memory"][state]} >= {("node1", "worker"), ("node2", "control")}
        assert all(r["rss_mb"] > r["pss_mb"] > 0 for r in result["memory"][state])
    ET.fromstring(svg.read_text())
    assert "round 1" in done.stderr
    assert not [name for name in record.names() if name.startswith("b") and name.endswith(("-n", "-m")) and _mine(name)]


def _mine(name: str) -> bool:
    """Whether a lab is left of a benchmark whose process has ended."""
    pid = name[1:-2]
    return pid.isdigit() and not Path(f"/proc/{pid}").exists()
