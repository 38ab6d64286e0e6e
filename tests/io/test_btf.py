"""Offsets come from the running kernel's BTF, exactly, or not at all."""

from __future__ import annotations

import json
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ambient.errors import PlatformFault
from ambient.io import btf
from tests.support.require import require


@pytest.fixture(scope="module")
def raw():
    require("bpf")
    return btf.VMLINUX.read_bytes()


@pytest.fixture(scope="module")
def parsed(raw):
    return btf.Btf(raw)


def test_the_running_kernel_has_every_field(raw):
    macros, why = btf.redirect_macros(raw)
    assert why == ""
    assert macros["REDIRECT_OFFSETS"] == 1
    assert set(btf._NAMED) < set(macros)
    assert all(value > 0 for name, value in macros.items() if name != "OFF_EPOLL_ENTRY")


@pytest.mark.parametrize(
    ("v1", "wanted", "others"), [(True, "_MEMCG_V1", "_MEMCG_V2"), (False, "_MEMCG_V2", "_MEMCG_V1")]
)
def test_limits_are_read_where_the_memory_controller_keeps_them(raw, v1, wanted, others):
    macros, why = btf.redirect_macros(raw, v1)
    assert why == ""
    assert set(getattr(btf, wanted)) < set(macros)
    assert not set(getattr(btf, others)) & set(macros)


def test_a_kernel_whose_limits_cannot_be_read_redirects_nothing(raw):
    """It would charge, fail, and kill: never without looking."""
    macros, why = btf.redirect_macros(raw.replace(b"\0page_counter\0", b"\0page_counted\0"), False)
    assert "no struct page_counter" in why
    assert macros["REDIRECT_OFFSETS"] == 0


@pytest.mark.parametrize(
    ("said", "v1"),
    [
        ("#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t4\t21\t1\n", True),
        ("#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t0\t21\t1\n", False),
        ("#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t1\t1\t1\n", False),
        ("", False),
    ],
)
def test_where_the_memory_controller_is(said, v1):
    assert btf.memory_is_v1(said) is v1


def test_bpftool_says_the_same_of_plain_members(parsed):
    require("bpftool")
    command = ["bpftool", "btf", "dump", "file", btf.VMLINUX, "format", "raw", "-j"]
    types = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["types"]
    wanted = {"sock": "sk_rcvbuf", "tcp_sock": "copied_seq", "file": "f_flags", "socket": "file"}
    sizes = {"sk_rcvbuf": 4, "copied_seq": 4, "f_flags": 4, "file": 8}
    for kind in types:
        if kind["kind"] == "STRUCT" and kind["name"] in wanted:
            member = wanted.pop(kind["name"])
            (bits,) = [m["bits_offset"] for m in kind["members"] if m["name"] == member]
            assert parsed.offset(kind["name"], member, sizes[member]) == bits // 8
    assert not wanted


def test_a_missing_field_struct_or_enumerator_is_named(parsed):
    with pytest.raises(PlatformFault, match="struct sock has no sk_nothing"):
        parsed.offset("sock", "sk_nothing", 4)
    with pytest.raises(PlatformFault, match="no struct socket_of_nobody"):
        parsed.offset("socket_of_nobody", "x", 4)
    with pytest.raises(PlatformFault, match="sk_rcvbuf has 4 bytes, not 8"):
        parsed.offset("sock", "sk_rcvbuf", 8)
    with pytest.raises(PlatformFault, match="enum sock_flags has no SOCK_NOTHING"):
        parsed.enumerator("sock_flags", "SOCK_NOTHING")
    with pytest.raises(PlatformFault, match="bit field"):
        parsed.offset("sock", "__sk_common.skc_reuse", 1)


@pytest.mark.parametrize("damage", ["", "cut", "magic", "kind"])
def test_without_usable_btf_redirection_is_off_with_the_reason(raw, damage):
    broken = {
        "": b"",
        "cut": raw[: len(raw) // 2],
        "magic": b"\0\0" + raw[2:],
        "kind": raw[:28] + bytes([255]) * 4 + raw[32:],
    }[damage]
    macros, why = btf.redirect_macros(broken)
    assert why.startswith("no usable BTF: ")
    assert macros["REDIRECT_OFFSETS"] == 0
    assert set(btf._NAMED) < set(macros)


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_no_bytes_do_more_than_fail(noise):
    header = btf._HEADER.pack(0xEB9F, 1, 0, 24, 0, len(noise) // 2, len(noise) // 2, len(noise) - len(noise) // 2)
    macros, why = btf.redirect_macros(header + noise)
    assert why
    assert macros["REDIRECT_OFFSETS"] == 0
