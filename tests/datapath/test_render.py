"""Rows of the kernel maps: names beside numbers, and nothing hidden that has no name."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ambient.datapath import render
from ambient.datapath import values as v
from ambient.datapath.layout import LAYOUT

NAMES = render.Names({7: "shop/frontend"}, {3: "shop/catalog"}, {"10.0.0.9": "shop/catalog-1"})


def test_a_redirect_shows_who_wanted_to_go_where() -> None:
    key = v.RedirectKey(99)
    value = v.RedirectValue("10.0.0.9", "", "10.0.0.1", 5, 1_000_000_000, 7, 80, 0, 40000)
    (row,) = render.redirects([(key, value)], NAMES, now_ns=3_500_000_000)
    assert row["source"] == "shop/frontend"
    assert (row["client"], row["original"], row["destination"]) == ("10.0.0.1:40000", "10.0.0.9:80", "shop/catalog-1")
    assert (row["state"], row["age_s"], row["endpoint"]) == ("accepted", 2.5, "")


def test_a_number_without_a_name_is_shown_as_it_is() -> None:
    rows = render.workloads([("10.0.0.1", v.WorkloadValue(8, 3, 1)), ("10.0.0.2", v.WorkloadValue(7, 0, 1))], NAMES)
    assert [row["workload"] for row in rows] == [8, "shop/frontend"]
    assert rows[0]["flags"] == ("enrolled", "local")


def test_unknown_flag_bits_are_not_hidden() -> None:
    assert render.flag_names("WORKLOAD_", 1 | 1 << 20) == ("enrolled", "0x100000")


def test_ranges_are_shown_in_their_own_family() -> None:
    assert render.range_text(v.Range("10.0.0.0", 104)) == "10.0.0.0/8"
    assert render.range_text(v.Range("fd00::", 48)) == "fd00::/48"
    assert render.range_text(v.Range("", 0)) == "::/0"


@given(st.integers(0, 2**32 - 1))
def test_every_flag_word_renders(flags: int) -> None:
    named = render.flag_names("WORKLOAD_", flags)
    known = sum(LAYOUT["WORKLOAD_" + n.upper()] for n in named if not n.startswith("0x"))
    rest = sum(int(n, 16) for n in named if n.startswith("0x"))
    assert known + rest == flags


def test_every_reason_that_is_counted_says_what_it_means() -> None:
    reasons = [name.removeprefix("REASON_").lower() for name in LAYOUT.enums["reason"]]
    rows = {row["reason"]: row["what"] for row in render.counters(dict.fromkeys(reasons, 1))}
    assert [reason for reason, what in rows.items() if not what] == ["max", "none"]
    assert rows["dns"] == "DNS sent to the proxy"
