"""Ending an older layout: at once, or when the last socket has left its sockhash.

The last pin of a sockhash frees it, and what a receiver in it has not read yet is lost. So a layout whose `sockets`
holds something only drains: it is detached, nothing enters any more, and its sk_msg, which lives in the sockets, finds
no settings and lets everything go natively. Nothing here knows that layout's structures; only the names of its maps and
that the key of `flows` is a 4-tuple, for whoever takes the flows over (ambient.node.inherit).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import TupleKey
from ambient.io import bpf_links, bpf_sys, bpffs

_PAD: Final = next(f.offset for f in LAYOUT.structs["tuple_key"].fields if f.is_padding)


def _open(pin: Path) -> bpf_sys.Table | None:
    try:
        return bpf_sys.Table(bpf_sys.obj_get(str(pin)), pin.name)
    except bpf_sys.BpfFault:
        return None


def _holds_sockets(directory: Path) -> bool:
    table = _open(directory / "maps" / "sockets")
    if table is None:
        return False
    try:
        return table.holds_any()
    finally:
        table.close()


def inherited(bpffs_dir: str | Path) -> tuple[list[TupleKey], str]:
    """Flows of the other layouts, and what of them cannot be read, in a sentence."""
    found: dict[TupleKey, None] = {}
    said = ""
    for version in bpf_links.other_versions(bpffs_dir):
        table = _open(Path(bpffs_dir) / version / "maps" / "flows")
        if table is None:
            continue
        try:
            if table.info.key_size != LAYOUT.structs["tuple_key"].size:
                said = f"flows of layout {version} cannot be taken over: no change of policy closes them"
                continue
            keys = [raw for raw in table.list_keys() if not any(raw[_PAD:])]  # else put aside: over
            found |= dict.fromkeys(TupleKey.decode(raw) for raw in keys)
        finally:
            table.close()
    return list(found), said


def drain(bpffs_dir: str | Path, version: str, *, taken_over: bool = True) -> bool:
    """Detach a layout that is not this program's; whether it is gone. Repeat until it is. Safe to repeat.

    Unless its flows were ``taken_over`` it keeps them.
    """
    directory = Path(bpffs_dir) / version
    if not directory.is_dir():
        return True
    bpf_links.detach_links(directory)
    for part in ("links", "pods", "progs"):
        bpffs.remove_tree(directory / part)
    # Without settings its sk_msg passes everything natively, so that receivers run empty.
    settings = _open(directory / "maps" / "settings")
    if settings is not None:
        try:
            settings.delete(bytes(settings.info.key_size))
        finally:
            settings.close()
    kept = {"sockets", "settings"} | (set() if taken_over else {"flows"})
    if not taken_over or _holds_sockets(directory):
        for pin in (directory / "maps").iterdir():
            if pin.name not in kept:
                with contextlib.suppress(OSError):
                    os.unlink(pin)
        return False
    bpffs.remove_tree(directory)
    return True


def drain_others(bpffs_dir: str | Path, *, taken_over: bool = True) -> list[str]:
    """Drain every layout but this program's; those that are still there."""
    others = bpf_links.other_versions(bpffs_dir)
    return [version for version in others if not drain(bpffs_dir, version, taken_over=taken_over)]
