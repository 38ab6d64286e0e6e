"""What the agent remembers, and that a broken memory is set aside and not believed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ambient.node.records import Names, Record, Records


def test_pods_are_remembered(tmp_path: Path) -> None:
    records = Records(tmp_path / "agent.json")
    record = Record(uid="u", namespace="n", name="p", addresses=("10.0.0.1",), in_mesh=True, generation=7)
    records.pods["u"] = record
    records.save()
    assert Records(tmp_path / "agent.json").pods == {"u": record}
    assert (tmp_path / "agent.json").stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [tmp_path / "agent.json"]


def test_generations_grow_also_when_the_clock_goes_back_and_over_a_restart(tmp_path: Path) -> None:
    records = Records(tmp_path / "agent.json")
    first, second = records.next_generation(1000), records.next_generation(10)
    records.save()
    third = Records(tmp_path / "agent.json").next_generation(5)
    assert first == 1000 and first < second < third


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"pods": [{}]}', b"\xff", b'{"pods": 3}', b"[" * 5000])
def test_what_cannot_be_read_is_set_aside_and_reported(tmp_path: Path, raw: bytes) -> None:
    for kind in (Records, Names):
        path = tmp_path / f"{kind.__name__}.json"
        path.write_bytes(raw)
        memory = kind(path)
        assert str(path) in memory.problem or (kind is Names and raw.startswith(b'{"pods"'))
        assert not memory.problem or path.with_name(path.name + ".unreadable").read_bytes() == raw


def test_numbers_and_names_are_written_for_others_to_read(tmp_path: Path) -> None:
    names = Names(tmp_path / "names.json")
    number, other = names.workloads.of("Kubernetes//Pod/shop/web"), names.services.of("shop/web")
    names.save()
    written = msgspec.json.decode((tmp_path / "names.json").read_bytes())
    assert written["workloads"] == {str(number): "Kubernetes//Pod/shop/web"}
    assert written["services"] == {str(other): "shop/web"}
    again = Names(tmp_path / "names.json")
    assert again.workloads.of("Kubernetes//Pod/shop/web") == number
    again.workloads.retain([])
    again.save()
    assert Names(tmp_path / "names.json").workloads.of("Kubernetes//Pod/shop/web") > number


def test_nothing_is_written_when_nothing_changed(tmp_path: Path) -> None:
    names = Names(tmp_path / "names.json")
    names.workloads.of("a")
    names.save()
    before = (tmp_path / "names.json").stat().st_ino
    names.workloads.of("a")
    names.save()
    assert (tmp_path / "names.json").stat().st_ino == before
