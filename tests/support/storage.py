"""How many sockets hold a record in `pending`. No process can list what lives in sockets; an iterator program can."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

from ambient.datapath.layout import LAYOUT
from ambient.io import bpf_sys, btf

_PROG_LOAD, _ITER_CREATE = 5, 33
_TRACING, _TRACE_ITER = 26, 28
_BTF_FUNC = 12
_TARGET = b"bpf_iter_bpf_sk_storage_map"


def _instruction(code: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> int:
    return code | (target | source << 4) << 8 | (offset & 0xFFFF) << 16 | (value & 0xFFFFFFFF) << 32


_PROGRAM = (
    _instruction(0x79, 6, 1, 24),  # r6 = ctx->value
    _instruction(0x15, 6, offset=7),  # none at the end: out
    _instruction(0x79, 6, 1, 0),  # r6 = ctx->meta
    _instruction(0x79, 1, 6, 0),  # r1 = meta->seq
    _instruction(0x7A, 10, offset=-8),  # eight bytes
    _instruction(0xBF, 2, 10),
    _instruction(0x07, 2, value=-8),
    _instruction(0xB7, 3, value=8),
    _instruction(0x85, value=127),  # bpf_seq_write(seq, r10 - 8, 8)
    _instruction(0xB7, 0),  # out
    _instruction(0x95),
)


def _target() -> int:
    """The type of the iterator in the kernel's BTF."""
    types = btf.Btf(btf.VMLINUX.read_bytes())
    for ident in range(1, len(types._at)):
        found = types._type(ident)
        if found.kind == _BTF_FUNC and types._text(found.name) == _TARGET:
            return ident
    raise AssertionError(f"this kernel has no {_TARGET.decode()}")


def _said(result: int, what: str) -> int:
    assert result >= 0, f"{what}: {os.strerror(-result)}"
    return result


class Pending:
    """A counter of a node's records."""

    def __init__(self, bpffs_dir: Path) -> None:
        self._map = bpf_sys.obj_get(str(bpffs_dir / LAYOUT.version / "maps/pending"))
        text = ctypes.create_string_buffer(struct.pack(f"={len(_PROGRAM)}Q", *_PROGRAM))
        licence = ctypes.create_string_buffer(b"GPL")
        head = struct.pack("=IIQQ", _TRACING, len(_PROGRAM), ctypes.addressof(text), ctypes.addressof(licence))
        attr = head.ljust(68, b"\0") + struct.pack("=I", _TRACE_ITER)
        attr = attr.ljust(108, b"\0") + struct.pack("=I", _target())
        self._program = _said(bpf_sys._command(_PROG_LOAD, attr)[0], "load the iterator")
        place = ctypes.create_string_buffer(struct.pack("=IIII", self._map, 0, 0, 0))
        attr = struct.pack("=IIIIQI", self._program, 0, _TRACE_ITER, 0, ctypes.addressof(place), 16)
        self._link = _said(bpf_sys._command(bpf_sys.LINK_CREATE, attr)[0], "link the iterator")

    def count(self) -> int:
        fd = _said(bpf_sys._command(_ITER_CREATE, struct.pack("=II", self._link, 0))[0], "start the iterator")
        with os.fdopen(fd, "rb") as entries:
            return len(entries.read()) // 8

    def close(self) -> None:
        for fd in (self._link, self._program, self._map):
            os.close(fd)
