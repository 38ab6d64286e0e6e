"""The programs of a node: whether they are attached where the settings say, and the loader that sees to it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Final

from ambient.errors import AmbientError, PlatformFault
from ambient.io import bpf_links, cgroup
from ambient.settings import NodeSettings

LOADER_S: Final = 180.0
"""Compiling takes seconds; minutes on a busy small machine."""


async def load(settings: NodeSettings) -> str:
    """Have the programs compiled, pinned and attached if they are not. Returns what the loader said.

    Raises PlatformFault with the loader's own message.
    """
    node, pods = cgroups_of(settings)
    argv = [sys.executable, "-m", "ambient.io.bpf_load", "--bpffs-dir", settings.bpffs_dir]
    argv += ["--node-cgroup", str(node), "--pods-cgroup", str(pods)]
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(LOADER_S):
            said, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise PlatformFault(f"the loader did not finish in {LOADER_S:g} s") from None
    text = said.decode(errors="replace").strip()[-4000:]
    if process.returncode != 0:
        raise PlatformFault(f"the eBPF programs cannot be loaded: {text}")
    return text


def loaded(settings: NodeSettings) -> bool:
    """Whether the programs of this layout are attached to the cgroups of these settings, without compiling."""
    node, pods = (cgroup.cgroup_id(path) for path in cgroups_of(settings))
    if not (bpf_links.version_dir(settings.bpffs_dir) / "progs" / "sk_lookup").exists():
        return False
    try:
        found = bpf_links.attachments(settings.bpffs_dir)
    except AmbientError:
        return False
    return bool(found) and all(a.target == (node if a.where == bpf_links.NODE else pods) for a in found)


def cgroups_of(settings: NodeSettings) -> tuple[Path, Path]:
    """The node's and the pods' cgroup. Raises PlatformFault naming the setting."""
    node = Path(settings.node_cgroup) if settings.node_cgroup else cgroup.mount_point()
    pods = Path(settings.pods_cgroup) if settings.pods_cgroup else cgroup.find_pods_cgroup(node)
    return node, pods
