"""The layout of the kernel maps, read from bpf/include/layout.h.

That header is the one definition of keys, values, flags and limits. It is restricted C, and this parser
accepts nothing else: include guard, ``#define NAME NUMBER``, enums with explicit values, structs of
``__u8/16/32/64``, of structs defined above and of fixed arrays of either, each with no padding but what is
named ``pad*`` and with a ``_Static_assert`` of its size. Whatever else appears is an OurFault that names the
line: a layout that is half understood must never reach the kernel.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ambient.errors import OurFault

_SCALARS: Final[Mapping[str, tuple[int, Any]]] = {
    "__u8": (1, ctypes.c_uint8),
    "__u16": (2, ctypes.c_uint16),
    "__u32": (4, ctypes.c_uint32),
    "__u64": (8, ctypes.c_uint64),
}
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_MEANING = re.compile(r"^\s*([A-Z][A-Z0-9_]*) = \d+,[ \t]*/\* (.*?) \*/[ \t]*$", re.MULTILINE)
_GUARD = re.compile(r"#ifndef\s+(\w+_H)\s*\n\s*#define\s+(\w+_H)\s*\n")
_DEFINE = re.compile(r"#define[ \t]+([A-Z][A-Z0-9_]*)[ \t]+(\d+)[ \t]*(?:\n|$)")
_ENUM = re.compile(r"enum\s+(\w+)\s*\{([^{}]*)\}\s*;")
_ENUMERATOR = re.compile(r"([A-Z][A-Z0-9_]*)\s*=\s*(\d+)")
_STRUCT = re.compile(r"struct\s+(\w+)\s*\{([^{}]*)\}\s*;")
_FIELD = re.compile(r"(__u8|__u16|__u32|__u64|struct\s+\w+)\s+(\w+)\s*(?:\[\s*(\w+)\s*\])?")
_ASSERT = re.compile(r'_Static_assert\s*\(\s*sizeof\(struct\s+(\w+)\)\s*==\s*(\d+)\s*,\s*"(\w+)"\s*\)\s*;')


@dataclass(frozen=True, slots=True)
class Field:
    """``kind`` is a scalar (``__u32``) or the name of a struct; ``count`` 0 is one value, else an array."""

    name: str
    kind: str
    count: int
    offset: int
    size: int

    @property
    def is_padding(self) -> bool:
        return self.name.startswith("pad")


@dataclass(frozen=True, slots=True)
class Struct:
    name: str
    fields: tuple[Field, ...]
    size: int


@dataclass(frozen=True)
class Layout:
    """Everything the header says. ``digest`` is the SHA-256 of its text, in hexadecimal."""

    constants: Mapping[str, int]
    enums: Mapping[str, Mapping[str, int]]
    structs: Mapping[str, Struct]
    classes: Mapping[str, type[ctypes.Structure]]
    digest: str
    meanings: Mapping[str, str]
    """What the comment behind an enumerator says, where there is one: for people only."""

    @property
    def version(self) -> str:
        """Name of the pin directory: another layout, another directory."""
        return f"v{self.constants['LAYOUT_VERSION']}-{self.digest[:8]}"

    def __getitem__(self, name: str) -> int:
        """The value of a constant or enumerator."""
        if name in self.constants:
            return self.constants[name]
        for values in self.enums.values():
            if name in values:
                return values[name]
        raise KeyError(name)

    def names(self, enum: str) -> dict[int, str]:
        """Value -> enumerator of one enum."""
        return {value: name for name, value in self.enums[enum].items()}


def _fail(text: str, position: int, message: str) -> OurFault:
    line = text.count("\n", 0, position) + 1
    return OurFault(f"layout.h, line {line}: {message}")


class _Parser:
    def __init__(self, text: str) -> None:
        # Comments become blanks of the same shape so that positions still tell lines.
        self.text = _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
        self.constants: dict[str, int] = {}
        self.enums: dict[str, dict[str, int]] = {}
        self.structs: dict[str, Struct] = {}
        self.classes: dict[str, type[ctypes.Structure]] = {}
        self.asserted: set[str] = set()

    def parse(self) -> None:
        position = self._blank(0)
        guard = _GUARD.match(self.text, position)
        if guard is None or guard[1] != guard[2]:
            raise _fail(self.text, position, "an include guard must come first")
        position = self._blank(guard.end())
        while not self.text.startswith("#endif", position):
            position = self._blank(self._item(position))
        rest = self._blank(position + len("#endif"))
        if rest != len(self.text):
            raise _fail(self.text, rest, "nothing may follow the closing #endif")
        for name in self.structs:
            if name not in self.asserted and name != "address":
                raise OurFault(f"layout.h: struct {name} has no _Static_assert of its size")

    def _blank(self, position: int) -> int:
        while position < len(self.text) and self.text[position] in " \t\n":
            position += 1
        return position

    def _item(self, position: int) -> int:
        for pattern, take in (
            (_DEFINE, self._define),
            (_ENUM, self._enum),
            (_STRUCT, self._struct),
            (_ASSERT, self._assertion),
        ):
            match = pattern.match(self.text, position)
            if match is not None:
                take(match)
                return match.end()
        excerpt = self.text[position : position + 40].partition("\n")[0] or "end of file"
        raise _fail(self.text, position, f"not understood: {excerpt!r}")

    def _new_constant(self, name: str, value: int, position: int) -> None:
        if name in self.constants or any(name in values for values in self.enums.values()):
            raise _fail(self.text, position, f"{name} is defined twice")
        if value > 0xFFFF_FFFF:
            raise _fail(self.text, position, f"{name} does not fit 32 bits")

    def _define(self, match: re.Match[str]) -> None:
        self._new_constant(match[1], int(match[2]), match.start())
        self.constants[match[1]] = int(match[2])

    def _enum(self, match: re.Match[str]) -> None:
        if match[1] in self.enums:
            raise _fail(self.text, match.start(), f"enum {match[1]} is defined twice")
        values: dict[str, int] = {}
        for part in match[2].split(","):
            if not part.strip():
                continue
            item = _ENUMERATOR.fullmatch(part.strip())
            if item is None:
                raise _fail(self.text, match.start(), f"enum {match[1]}: {part.strip()!r} is not NAME = NUMBER")
            self._new_constant(item[1], int(item[2]), match.start())
            if item[1] in values or int(item[2]) in values.values():
                raise _fail(self.text, match.start(), f"enum {match[1]}: {item[1]} repeats a name or value")
            values[item[1]] = int(item[2])
        self.enums[match[1]] = values

    def _struct(self, match: re.Match[str]) -> None:
        name = match[1]
        if name in self.structs:
            raise _fail(self.text, match.start(), f"struct {name} is defined twice")
        fields: list[Field] = []
        members: list[tuple[str, Any]] = []
        offset, alignment = 0, 1
        declarations = match[2].split(";")
        if declarations[-1].strip() or len(declarations) < 2:
            raise _fail(self.text, match.start(), f"struct {name}: a field ends with a semicolon")
        for declaration in declarations[:-1]:
            item = _FIELD.fullmatch(declaration.strip())
            if item is None:
                raise _fail(self.text, match.start(), f"struct {name}: {declaration.strip()!r} is not a field")
            field, member, align = self._field(name, item, offset, match.start())
            if any(other.name == field.name for other in fields):
                raise _fail(self.text, match.start(), f"struct {name}: {field.name} is declared twice")
            if offset % align:
                raise _fail(self.text, match.start(), f"struct {name}: {field.name} needs explicit padding before it")
            fields.append(field)
            members.append((field.name, member))
            offset += field.size
            alignment = max(alignment, align)
        if offset % alignment:
            raise _fail(self.text, match.start(), f"struct {name} needs explicit padding at its end")
        self.structs[name] = Struct(name, tuple(fields), offset)
        self.classes[name] = type(name, (ctypes.Structure,), {"_fields_": members})

    def _field(self, struct: str, item: re.Match[str], offset: int, position: int) -> tuple[Field, Any, int]:
        kind, name, length = item[1], item[2], item[3]
        if kind in _SCALARS:
            size, member = _SCALARS[kind]
            align = size
        else:
            kind = kind.split()[1]
            if kind not in self.structs:
                raise _fail(self.text, position, f"struct {struct}: struct {kind} is not defined above")
            size, member = self.structs[kind].size, self.classes[kind]
            align = ctypes.alignment(member)
        count = 0
        if length is not None:
            count = int(length) if length.isdigit() else self.constants.get(length, 0)
            if not 1 <= count <= 4096:
                raise _fail(self.text, position, f"struct {struct}: {name}[{length}]: 1 to 4096 elements")
            size, member = size * count, member * count
        return Field(name, kind, count, offset, size), member, align

    def _assertion(self, match: re.Match[str]) -> None:
        name, size = match[1], int(match[2])
        if name != match[3] or name not in self.structs:
            raise _fail(self.text, match.start(), f"the assertion names struct {name} and {match[3]!r}")
        actual = ctypes.sizeof(self.classes[name])
        if size != actual or self.structs[name].size != actual:
            raise _fail(self.text, match.start(), f"struct {name} has {actual} bytes, not {size}")
        self.asserted.add(name)


def parse(text: str) -> Layout:
    """Parse the text of layout.h. Raises OurFault naming the line and what was not understood."""
    parser = _Parser(text)
    parser.parse()
    if "LAYOUT_VERSION" not in parser.constants:
        raise OurFault("layout.h: LAYOUT_VERSION is not defined")
    return Layout(
        constants=parser.constants,
        enums=parser.enums,
        structs=parser.structs,
        classes=parser.classes,
        digest=hashlib.sha256(text.encode()).hexdigest(),
        meanings=dict(_MEANING.findall(text)),
    )


def source_directory() -> Path:
    """Where the eBPF sources are: beside the packages in a checkout, under share/ambient once installed."""
    for candidate in (Path(__file__).resolve().parents[2] / "bpf", Path(sys.prefix) / "share/ambient/bpf"):
        if (candidate / "include/layout.h").is_file():
            return candidate
    raise OurFault("bpf/include/layout.h is neither beside the packages nor in share/ambient: incomplete installation")


LAYOUT: Final = parse((source_directory() / "include/layout.h").read_text())
"""The layout this version of the program was written for."""
