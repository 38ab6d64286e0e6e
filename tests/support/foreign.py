"""Programs of strangers, a few instructions each, loaded by hand: what may stand beside ours on a cgroup."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from ambient.io import bpf_sys

_PROG_LOAD = 5
_RETURN_1 = (0x1_0000_00B7, 0x95)  # r0 = 1; exit


def connect4_program(*instructions: int) -> int:
    """Descriptor of a cgroup/connect4 program called ``stranger``: the instructions, then return 1."""
    words = (*instructions, *_RETURN_1)
    text = ctypes.create_string_buffer(struct.pack(f"={len(words)}Q", *words))
    licence = ctypes.create_string_buffer(b"GPL")
    head = struct.pack("=IIQQ", 18, len(words), ctypes.addressof(text), ctypes.addressof(licence))
    attr = head + struct.pack("=IIQII16sII", 0, 0, 0, 0, 0, b"stranger", 0, bpf_sys.ATTACH_CONNECT4)
    result, _ = bpf_sys._command(_PROG_LOAD, attr)
    assert result >= 0, os.strerror(-result)
    return result


def port_rewriter(port: int) -> int:
    """A connect4 program that turns every destination port into another: r2 = port; ctx->user_port = r2."""
    value = int.from_bytes(port.to_bytes(2, "big"), "little")
    return connect4_program(value << 32 | 0x02B7, 24 << 16 | 0x2163)


@contextlib.contextmanager
def attached(program: int, directory: Path) -> Iterator[None]:
    """The program stands on a cgroup inside the block; it is closed afterwards."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    link = bpf_sys.link_create(program, fd, bpf_sys.ATTACH_CONNECT4, "a stranger")
    try:
        yield
    finally:
        bpf_sys.link_detach(link)
        for one in (link, fd, program):
            os.close(one)
