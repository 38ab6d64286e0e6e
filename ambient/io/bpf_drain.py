"""Ending an older layout: at once, or when the last socket has left its sockhash.

The last pin of a sockhash frees it, and what a receiver in it has not read yet is lost. So a layout whose `sockets`
holds something only drains: it is detached, nothing enters any more, and its sk_msg, which lives in the sockets, finds
no settings and lets everything go natively. Nothing here knows that layout's structures; only the names of its maps.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ambient.io import bpf_links, bpf_sys, bpffs


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


def drain(bpffs_dir: str | Path, version: str) -> bool:
    """Detach a layout that is not this program's; whether it is gone. Repeat until it is. Safe to repeat."""
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
    if _holds_sockets(directory):
        for pin in (directory / "maps").iterdir():
            if pin.name not in ("sockets", "settings"):
                with contextlib.suppress(OSError):
                    os.unlink(pin)
        return False
    bpffs.remove_tree(directory)
    return True


def drain_others(bpffs_dir: str | Path) -> list[str]:
    """Drain every layout but this program's; those that still hold sockets."""
    return [version for version in bpf_links.other_versions(bpffs_dir) if not drain(bpffs_dir, version)]
