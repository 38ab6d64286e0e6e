"""DNS messages: what is answered, what is refused with which code, and that garbage is refused and nothing else."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.shop import ips
from ztunnel.core.dns import (
    NAME_BYTES_MAX,
    TYPE_A,
    TYPE_AAAA,
    TYPE_CNAME,
    Code,
    DnsFault,
    Question,
    answers_of,
    build_answer,
    build_query,
    build_refusal,
    encode_name,
    parse_query,
    parse_response,
    with_number,
)

NAME = b"\x04cart\x04shop\x00"


def message(flags: int = 0x0100, counts: tuple[int, int, int, int] = (1, 0, 0, 0), body: bytes | None = None) -> bytes:
    return struct.pack(">HHHHHH", 7, flags, *counts) + (NAME + b"\0\1\0\1" if body is None else body)


OPT = b"\0\0\x29\x04\xd0\0\0\0\0\0\0"


def test_a_plain_query_is_read() -> None:
    query = parse_query(message())
    assert (query.number, query.question, query.recursion_desired) == (7, Question("cart.shop", TYPE_A), True)
    assert (query.edns, query.udp_bytes_max) == (False, 512)


def test_an_opt_record_says_how_long_an_answer_may_be() -> None:
    query = parse_query(message(counts=(1, 0, 0, 1), body=NAME + b"\0\1\0\1" + OPT))
    assert (query.edns, query.edns_version, query.udp_bytes_max) == (True, 0, 1232)


def test_the_length_an_opt_record_asks_for_is_bounded_both_ways() -> None:
    for size, wanted in ((0, 512), (65535, 4096)):
        opt = b"\0\0\x29" + struct.pack(">H", size) + b"\0\0\0\0\0\0"
        assert parse_query(message(counts=(1, 0, 0, 1), body=NAME + b"\0\1\0\1" + opt)).udp_bytes_max == wanted


def test_letters_compare_without_case_and_come_back_as_they_were_sent() -> None:
    raw = message(body=b"\x04CaRt\x04sHoP\x00\0\1\0\1")
    query = parse_query(raw)
    assert query.question.name == "cart.shop"
    assert b"\x04CaRt\x04sHoP" in build_answer(query, ips("10.0.0.1"))


def test_a_dot_inside_a_label_is_no_separator() -> None:
    assert parse_query(message(body=b"\x09cart.shop\x00\0\1\0\1")).question.name != "cart.shop"


REFUSED = [
    (b"", None),
    (b"\0" * 11, None),
    (message(0x8100), None),  # a response
    (message(0x0900), Code.NOTIMP),  # IQUERY
    (message(0x2900), Code.NOTIMP),  # UPDATE
    (message(counts=(0, 0, 0, 0), body=b""), Code.FORMERR),
    (message(counts=(2, 0, 0, 0)), Code.FORMERR),
    (message(counts=(1, 1, 0, 0)), Code.FORMERR),
    (message(counts=(1, 0, 0, 65)), Code.FORMERR),
    (message(0x0300), Code.FORMERR),  # truncated
    (message(body=NAME + b"\0\1\0"), Code.FORMERR),
    (message(body=NAME + b"\0\1\0\1x"), Code.FORMERR),
    (message(body=b"\x04car"), Code.FORMERR),
    (message(body=b"\x41" + b"a" * 65 + b"\0\0\1\0\1"), Code.FORMERR),
    (message(body=(b"\x3f" + b"a" * 63) * 4 + b"\0\0\1\0\1"), Code.FORMERR),
    (message(body=b"\xc0\x0c\0\1\0\1"), Code.FORMERR),  # a pointer in the question
    (message(counts=(1, 0, 0, 2), body=NAME + b"\0\1\0\1" + OPT + OPT), Code.FORMERR),
    (message(counts=(1, 0, 1, 0), body=NAME + b"\0\1\0\1" + OPT), Code.FORMERR),
    (message(counts=(1, 0, 0, 1), body=NAME + b"\0\1\0\1" + OPT[:-1]), Code.FORMERR),
    (message(counts=(1, 0, 0, 1), body=NAME + b"\0\1\0\1" + OPT[:-2] + b"\xff\xff"), Code.FORMERR),
]


@pytest.mark.parametrize(("raw", "code"), REFUSED)
def test_what_is_no_query_for_us_is_refused_with_its_code(raw: bytes, code: Code | None) -> None:
    with pytest.raises(DnsFault) as fault:
        parse_query(raw)
    assert fault.value.code == code


@pytest.mark.parametrize("target", [b"\xc0\x1b", b"\xc0\x1d", b"\xff\xff", b"\xc0\x00"])
def test_pointers_that_do_not_go_back_into_the_message_are_refused(target: bytes) -> None:
    record = target + b"\0\1\0\1\0\0\0\0\0\0"
    with pytest.raises(DnsFault):
        parse_query(message(counts=(1, 0, 0, 1), body=NAME + b"\0\1\0\1" + record))


def test_a_pointer_back_to_the_question_is_followed() -> None:
    record = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\0"
    assert parse_query(message(counts=(1, 0, 0, 1), body=NAME + b"\0\1\0\1" + record)).question.name == "cart.shop"


def test_a_refusal_carries_the_number_and_the_code() -> None:
    refusal = build_refusal(message(0x0900), Code.NOTIMP)
    assert refusal is not None and refusal[:2] == b"\0\x07" and refusal[3] & 0xF == Code.NOTIMP and refusal[2] & 0x80
    assert build_refusal(b"\0" * 5, Code.FORMERR) is None
    assert build_refusal(message(0x8100), Code.FORMERR) is None, "responses are never answered: two proxies would talk"


def test_an_answer_is_read_back_with_its_addresses_and_ttl() -> None:
    query = parse_query(message())
    raw = build_answer(query, ips("10.0.0.1", "10.0.0.2"))
    response = parse_response(raw)
    assert (response.number, response.question, response.code) == (7, query.question, 0)
    assert answers_of(raw) == [
        ("cart.shop", TYPE_A, 30, b"\x0a\0\0\1"),
        ("cart.shop", TYPE_A, 30, b"\x0a\0\0\2"),
    ]


def test_a_name_found_behind_a_search_suffix_comes_with_an_alias() -> None:
    query = parse_query(build_query(1, Question("example.org.shop", TYPE_AAAA)))
    raw = build_answer(query, ips("fd00::1"), alias="example.org")
    assert [(n, k) for n, k, _, _ in answers_of(raw)] == [
        ("example.org.shop", TYPE_CNAME),
        ("example.org", TYPE_AAAA),
    ]


def test_what_does_not_fit_is_cut_and_marked_truncated() -> None:
    query = parse_query(message())
    raw = build_answer(query, ips(*(f"10.0.0.{n}" for n in range(100))), bytes_max=512)
    assert len(raw) <= 512 and parse_response(raw).truncated and 0 < len(answers_of(raw)) < 100
    whole = build_answer(query, ips(*(f"10.0.0.{n}" for n in range(100))))
    assert not parse_response(whole).truncated and len(answers_of(whole)) == 100


def test_an_answer_to_an_edns_query_has_an_opt_record_and_others_have_none() -> None:
    with_opt = parse_query(build_query(1, Question("a", TYPE_A), udp_bytes_max=1232))
    assert build_answer(with_opt)[10:12] == b"\0\1"
    assert build_answer(parse_query(message()))[10:12] == b"\0\0"
    bad = build_answer(with_opt, code=Code.BADVERS)
    assert bad[3] & 0xF == 0 and bad[-6:-5] == b"\1", "its upper bits are in the OPT record"


labels = st.text(
    st.characters(codec="latin-1", exclude_characters=".", exclude_categories=("Lu", "Lt")), min_size=1, max_size=20
)
names = st.lists(labels.filter(lambda t: "\\" not in t), max_size=8).map(".".join)


@given(names, st.integers(0, 65535), st.integers(0, 65535), st.booleans())
def test_every_query_built_is_read_back(name: str, kind: int, number: int, edns: bool) -> None:
    query = parse_query(build_query(number, Question(name, kind), udp_bytes_max=1232 if edns else 0))
    assert (query.question, query.number, query.edns) == (Question(name, kind), number, edns)


@given(names, st.lists(st.ip_addresses(v=4), max_size=40), st.integers(64, 2000), st.booleans())
def test_every_answer_built_fits_and_is_read_back(name: str, addresses: list[object], limit: int, edns: bool) -> None:
    query = parse_query(build_query(1, Question(name, TYPE_A), udp_bytes_max=1232 if edns else 0))
    raw = build_answer(query, addresses, bytes_max=max(limit, 512))  # type: ignore[arg-type]
    assert len(raw) <= max(limit, 512)
    found = answers_of(raw)
    assert [d for _, _, _, d in found] == [a.packed for a in addresses[: len(found)]]  # type: ignore[attr-defined]
    assert parse_response(raw).truncated == (len(found) < len(addresses))


@given(st.binary(max_size=300))
def test_garbage_is_refused_or_read_and_never_anything_else(raw: bytes) -> None:
    for parse in (parse_query, parse_response, answers_of):
        try:
            parse(raw)
        except DnsFault:
            pass
    build_refusal(raw, Code.FORMERR)


@given(st.binary(max_size=120), st.integers(0, 3))
def test_garbage_behind_a_good_header_is_refused_or_read(body: bytes, records: int) -> None:
    raw = message(counts=(1, 0, 0, records), body=body)
    try:
        query = parse_query(raw)
    except DnsFault as fault:
        assert fault.code is not None
        return
    assert len(query.question.name) < NAME_BYTES_MAX
    assert parse_response(build_answer(query, ips("10.0.0.1"))).number == 7


@pytest.mark.parametrize("name", ["a..b", "a" * 64, ".".join(["a" * 60] * 5)])
def test_a_name_that_has_no_wire_form_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a DNS name"):
        encode_name(name)


def test_only_the_number_changes_when_a_message_is_passed_on() -> None:
    assert with_number(message(), 0x1234) == b"\x12\x34" + message()[2:]
