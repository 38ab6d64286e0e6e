"""Compiler, kernel and Python agree on every size, offset and number of the layout."""

from __future__ import annotations

import subprocess

import pytest

from ambient import ports
from ambient.datapath.layout import LAYOUT, source_directory
from ambient.io import bpf_sys
from ambient.io.bpf_maps import SPEC
from tests.support.require import require


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """What gcc says: `NAME NUMBER` lines."""
    require("gcc")
    scratch = tmp_path_factory.mktemp("layout")
    lines = ["#include <stdio.h>", "#include <stddef.h>", "#include <linux/types.h>", '#include "layout.h"']
    lines.append("int main(void) {")
    for struct in LAYOUT.structs.values():
        lines.append(f'printf("{struct.name} %zu\\n", sizeof(struct {struct.name}));')
        for field in struct.fields:
            where = f"offsetof(struct {struct.name}, {field.name})"
            size = f"sizeof(((struct {struct.name} *)0)->{field.name})"
            lines.append(f'printf("{struct.name}.{field.name} %zu\\n", {where});')
            lines.append(f'printf("{struct.name}.{field.name}.size %zu\\n", {size});')
    for name in [*LAYOUT.constants, *(name for enum in LAYOUT.enums.values() for name in enum)]:
        lines.append(f'printf("{name} %ld\\n", (long){name});')
    lines.append("return 0; }")
    source = scratch / "layout.c"
    source.write_text("\n".join(lines))
    binary = scratch / "layout"
    subprocess.run(["gcc", "-Wall", "-Werror", "-I", source_directory() / "include", "-o", binary, source], check=True)
    said = subprocess.run([binary], check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in (line.split() for line in said.splitlines())}


def test_gcc_and_python_agree_on_structs(compiled):
    for struct in LAYOUT.structs.values():
        assert compiled[struct.name] == struct.size, struct.name
        for field in struct.fields:
            assert compiled[f"{struct.name}.{field.name}"] == field.offset
            assert compiled[f"{struct.name}.{field.name}.size"] == field.size
            assert getattr(LAYOUT.classes[struct.name], field.name).offset == field.offset


def test_gcc_and_python_agree_on_numbers(compiled):
    numbers = dict(LAYOUT.constants)
    for enum in LAYOUT.enums.values():
        numbers |= enum
    assert {name: compiled[name] for name in numbers} == numbers


def test_the_ports_are_those_of_the_python_side():
    assert LAYOUT["PORT_OUTBOUND"] == ports.OUTBOUND
    assert LAYOUT["PORT_INBOUND_PLAINTEXT"] == ports.INBOUND_PLAINTEXT
    assert LAYOUT["PORT_HBONE"] == ports.HBONE
    assert LAYOUT["PORT_DNS"] == ports.DNS


def test_reasons_are_numbered_without_gaps_and_fit_the_counters():
    numbers = sorted(LAYOUT.enums["reason"].values())
    assert numbers == list(range(LAYOUT["REASON_MAX"] + 1))
    assert LAYOUT["REASON_MAX"] <= LAYOUT["COUNTERS_MAX"]


@pytest.mark.bpf
@pytest.mark.net
def test_the_kernel_has_the_maps_of_the_layout(loaded_node):
    """What bcc made of the declarations, as the kernel holds it."""
    for name, (key, value, entries) in SPEC.items():
        info = bpf_sys.map_info(bpf_sys.obj_get(str(loaded_node.maps.directory / "maps" / name)))
        assert (info.key_size, info.value_size, info.max_entries) == (key, value, entries), name
        assert info.name == name


@pytest.mark.bpf
@pytest.mark.net
def test_bcc_sees_the_same_sizes(tmp_path):
    require("bpf")
    from ambient.io.bpf_load import Compiled

    compiled = Compiled()
    library = compiled._bcc.lib
    for name, (key, value, _) in SPEC.items():
        if name == "events":
            continue  # a ring buffer has neither keys nor values; bcc pretends that it has
        ident = library.bpf_table_id(compiled._module.module, name.encode())
        assert library.bpf_table_key_size_id(compiled._module.module, ident) == key, name
        assert library.bpf_table_leaf_size_id(compiled._module.module, ident) == value, name
