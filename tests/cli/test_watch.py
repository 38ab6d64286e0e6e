"""Filters, rates and repeated looks of `ambient maps` and `ambient flows`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import click
import pytest

from ambient.cli.filters import Filter, namespace_of
from ambient.cli.flows import kernel_row, service_name, with_rates, ztunnel_row
from ambient.cli.output import age_text, table
from ambient.cli.watch import Rates, show, ticks
from ambient.errors import ConfigFault

ROWS = [
    {"address": "10.0.0.1", "workload": "shop/a-1"},
    {"address": "10.0.0.2", "workload": "shop/b"},
    {"address": "10.0.0.3", "workload": "other/a-1"},
    {"address": "10.0.0.4", "workload": 17},
    {"address": "10.0.0.5", "source": "spiffe://cluster.local/ns/shop/sa/a-1", "destination": "other/web"},
]


def addresses(only: Filter) -> list[str]:
    return [str(row["address"])[-1] for row in only.apply(ROWS)]


def test_filters_go_by_names_and_all_that_are_given_must_hold() -> None:
    assert addresses(Filter()) == ["1", "2", "3", "4", "5"]
    assert addresses(Filter(namespace="shop")) == ["1", "2", "5"]
    assert addresses(Filter(pod="a-1")) == ["1", "3"]
    assert addresses(Filter(pod="shop/a-1")) == ["1"]
    assert addresses(Filter(service="web")) == ["5"]
    assert addresses(Filter(namespace="shop", pod="web")) == ["5"]
    assert addresses(Filter(namespace="none")) == []
    assert namespace_of("spiffe://td/ns/x/sa/y") == "x" and namespace_of("17") == ""


def test_what_holds_no_names_cannot_be_filtered() -> None:
    with pytest.raises(ConfigFault, match="counters"):
        Filter(namespace="shop").apply([{"reason": "captured", "count": 1}], "counters")
    assert Filter(namespace="shop").apply([], "counters") == []


def test_rates_count_entries_that_come_and_go_and_numbers_that_grow() -> None:
    rates = Rates()
    assert rates.entries("m", 10.0, ["a", "b"]) == (None, None)
    assert rates.entries("m", 12.0, ["b", "c", "d", "e"]) == (1.5, 0.5)
    assert rates.number("n", 10.0, 100) is None
    assert rates.number("n", 12.0, 150) == 25
    assert rates.number("n", 13.0, 10) == 10  # began again
    assert rates.number("n", 13.0, 20) is None  # no time has passed


def test_looking_ends_after_the_count_and_restores_the_signals() -> None:
    before = signal.getsignal(signal.SIGTERM)
    times = list(ticks(0.05, 3))
    assert len(times) == 3 and 0.08 < times[2] - times[0] < 5
    assert signal.getsignal(signal.SIGTERM) is before


def test_each_look_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    show([{"a": 1}], "json", ())
    show([], "json", ())
    looks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [look["rows"] for look in looks] == [[{"a": 1}], []]
    with pytest.raises(ConfigFault, match="one line per look"):
        show([], "yaml", ())


LOOK = """
from ambient.cli.watch import show, ticks
for now in ticks(60, None):
    show([{"a": 1}], "json", ())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_watch_at_once_with_exit_code_0(number: int) -> None:
    argv = [sys.executable, "-c", LOOK]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["rows"]
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (0, "")


CONNECTION = {
    "workload": "shop/a",
    "direction": "Outbound",
    "local": "10.0.0.1:4000",
    "remote": "10.0.1.2:8080",
    "remoteTarget": "web.shop.svc.cluster.local",
    "protocol": "HBONE",
    "remoteWorkload": "shop/b",
    "original": "10.96.0.5:80",
    "service": "web.shop.svc.cluster.local",
    "sourceIdentity": "spiffe://cluster.local/ns/shop/sa/a",
    "destinationIdentity": "",
    "bytesSent": 10,
    "bytesReceived": 20,
    "durationMs": 1500.0,
    "policy": "",
}


def test_a_connection_of_ztunnel_is_seen_from_its_source_on_both_sides() -> None:
    out = ztunnel_row(CONNECTION)
    into = ztunnel_row({**CONNECTION, "direction": "Inbound", "workload": "shop/b", "remoteWorkload": "shop/a"})
    assert (out["path"], out["source"], out["destination"], out["age_s"]) == ("ztunnel", "shop/a", "shop/b", 1.5)
    assert (out["client"], out["server"], out["service"]) == ("10.0.0.1:4000", "10.0.1.2:8080", "shop/web")
    assert (into["source"], into["destination"]) == ("shop/a", "shop/b")
    assert (into["client"], into["server"]) == ("10.0.1.2:8080", "10.0.0.1:4000")
    assert service_name("example.com") == "example.com"


def test_a_kernel_flow_is_redirect_once_bytes_were_redirected() -> None:
    row = dict.fromkeys(
        ("source", "destination", "client", "server", "original", "identity", "policy", "state", "acceleration"), "x"
    ) | {"service": ""}
    direct = kernel_row({**row, "sent_redirected": 0, "received_redirected": 0, "age_s": 2.0}, 5, 7)
    assert (direct["path"], direct["sent"], direct["received"]) == ("direct", 5, 7)
    moved = kernel_row({**row, "sent_redirected": 0, "received_redirected": 3, "age_s": 2.0}, -1, 10)
    assert (moved["path"], moved["sent"], moved["received"], moved["redirected"]) == ("redirect", None, 10, 3)
    named = {**direct, "service": "shop/web"}
    assert Filter(service="web").matches(named) and not Filter(service="web").matches(direct)
    assert set(direct) == set(ztunnel_row(CONNECTION))  # one kind of row, whatever the path


def test_watched_flows_have_bytes_per_second() -> None:
    rates = Rates()
    row = {"node": "n1", **ztunnel_row(CONNECTION)}
    assert with_rates(rates, 1.0, [row])[0]["bytes_per_s"] is None
    assert with_rates(rates, 3.0, [{**row, "sent": 50}])[0]["bytes_per_s"] == 20


def test_an_interval_that_cannot_be_is_misuse() -> None:
    from click.testing import CliRunner

    from ambient.cli import cli

    for words in (["--watch", "--interval", "0"], ["--watch", "--count", "0"], ["--interval", "2"], ["--count", "2"]):
        assert CliRunner().invoke(cli, ["flows", *words]).exit_code == click.UsageError.exit_code


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (59.94, "59.9s"),
        (60, "1m00s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (90000, "1d01h"),
        (8e6, "92d14h"),
    ],
)
def test_ages_are_written_as_people_do(seconds: float, text: str) -> None:
    assert age_text(seconds) == text


def test_headings_say_what_is_per_second_and_numbers_stay_in_json() -> None:
    assert table([{"per_s": 1.0}], ["per_s"]).splitlines()[0] == "PER SECOND"
    text = table([{"age_s": 75.5, "added_per_s": 2.0, "bytes_per_s": None}], ["age_s", "added_per_s", "bytes_per_s"])
    assert [line.split() for line in text.splitlines()] == [["AGE", "ADDED/S", "BYTES/S"], ["1m15s", "2.0", "-"]]


def test_a_look_at_one_map_tells_what_came_and_went(capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"added_per_s": 1.5, "removed_per_s": 0.0}
    show([{"a": 1}], "json", (), changes)
    show([{"a": 1}], "table", ("a",), changes)
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert json.loads(first)["added_per_s"] == 1.5
    assert second.endswith("added 1.5/s, removed 0.0/s")
