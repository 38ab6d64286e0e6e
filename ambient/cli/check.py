"""`ambient check`: can this machine run the mesh, and what is in the way?

Each check is a small function from the machine to a `Result`; a failure always carries a hint that says what
to do next. A warning does not fail the command.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from ambient.cli.output import emit_object, output_option
from ambient.cli.target import LABS, NODE_CONFIG
from ambient.datapath.layout import LAYOUT
from ambient.errors import AmbientError, LayoutMismatch
from ambient.io import bpf_links, bpf_selftest_destroy, bpf_selftest_redirect, bpffs, btf, cgroup, kernel_headers
from ambient.io.bpf_maps import Maps
from ambient.settings import NodeSettings, read_settings

KERNEL_FLOOR = (5, 15)
OPEN_FILES_MIN = 65536


@dataclass(frozen=True, slots=True)
class Result:
    """``status`` is ok, warning or error; ``detail`` what was found; ``hint`` what to do about it."""

    status: str
    detail: str
    hint: str = ""


Check = Callable[[], Result]


def _ok(detail: str) -> Result:
    return Result("ok", detail)


def kernel_version(release: str | None = None) -> Result:
    release = release or platform.release()
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is None:
        return Result("error", f"cannot read the kernel version {release!r}", "run on Linux 5.15 or later")
    found = (int(match[1]), int(match[2]))
    if found < KERNEL_FLOOR:
        return Result("error", f"kernel {release}", "capture needs Linux 5.15 or later (netns cookies in sock_ops)")
    return _ok(f"kernel {release}")


def privileges() -> Result:
    if os.geteuid() != 0:
        return Result("error", f"running as uid {os.geteuid()}", "loading eBPF programs and reading maps needs root")
    return _ok("root")


def kernel_btf() -> Result:
    path = Path("/sys/kernel/btf/vmlinux")
    if not path.exists():
        return Result(
            "warning", f"{path} is missing", "same-node redirection stays off without BTF (CONFIG_DEBUG_INFO_BTF)"
        )
    return _ok(f"BTF, {path.stat().st_size // 1024} KiB")


def cgroup2_mount() -> Result:
    try:
        return _ok(f"cgroup2 at {cgroup.mount_point()}")
    except AmbientError as error:
        return Result("error", str(error), "mount it: mount -t cgroup2 none /sys/fs/cgroup/unified")


def bpf_filesystem() -> Result:
    found = bpffs.mounted_at("/sys/fs/bpf")
    if found is None:
        return Result("warning", "no bpf file system is mounted", "the node agent mounts one at /sys/fs/bpf")
    return _ok(f"bpf file system at {found}")


def bcc_package() -> Result:
    found = next((p for p in map(Path, _package_dirs()) if (p / "bcc" / "libbcc.py").exists()), None)
    if found is None:
        return Result("error", "python3-bpfcc is not installed", "apt-get install python3-bpfcc (never PyPI's bcc)")
    return _ok(f"bcc in {found}")


def _package_dirs() -> Iterator[str]:
    yield from (p for p in sys.path if p)
    yield "/usr/lib/python3/dist-packages"


def headers() -> Result:
    try:
        with tempfile.TemporaryDirectory(prefix="ambient-headers-") as scratch:
            found = kernel_headers.find(platform.release(), Path(scratch) / "tree")
    except AmbientError as error:
        return Result("error", str(error), "apt-get install linux-headers-amd64")
    return _ok(
        "kernel headers: those of the running kernel" if found is None else "kernel headers: an installed package"
    )


def foreign_programs() -> Result:
    """Programs that stand above ours without BPF_F_ALLOW_MULTI make every attach below fail with EPERM."""
    try:
        top = cgroup.mount_point()
        kinds = {hook.attach_type for hook in bpf_links.HOOKS if hook.where in (bpf_links.NODE, bpf_links.PODS)}
        found = [line for kind in sorted(kinds) for line in bpf_links.foreign_programs(top, kind)]
    except (AmbientError, OSError) as error:
        return Result("warning", str(error), "run as root to see programs attached to cgroups")
    strangers = [line for line in found if not line.endswith("multi)")]
    if strangers:
        return Result(
            "error",
            "; ".join(strangers),
            "attach it with BPF_F_ALLOW_MULTI or a bpf_link, or detach it (bpftool cgroup detach)",
        )
    return _ok("no foreign program blocks attaching to cgroups")


def closing() -> Result:
    """Whether a right that is taken away can end the connections it let in."""
    try:
        said = bpf_selftest_destroy.run()
    except (AmbientError, OSError) as error:
        return Result("warning", str(error), "run as root to try it")
    if not said:
        return _ok("established connections can be closed (SOCK_DESTROY)")
    return Result("warning", said, "CONFIG_INET_DIAG_DESTROY and the module tcp_diag are what is needed")


def acceleration() -> Result:
    """What ambient.mesh/acceleration can mean on this kernel."""
    try:
        _, unavailable = btf.redirect_macros()
        found = bpf_selftest_redirect.run(unavailable)
    except (AmbientError, OSError) as error:
        return Result("warning", str(error), "run as root to try redirection")
    said = "; ".join(found.said) or "acceleration: redirect works here, and auto means it"
    if found.bits & LAYOUT["CAN_REDIRECT"]:
        return _ok(said)
    return Result("warning", said, "same-node connections are direct, without redirection; nothing else changes")


def open_files() -> Result:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES_MIN:
        return Result("warning", f"at most {hard} open files", f"raise the limit to {OPEN_FILES_MIN} (ulimit -Hn)")
    return _ok(f"open files: {soft} now, up to {hard}")


def lab_tools() -> Result:
    missing = [tool for tool in ("ip", "nft", "tcpdump", "kubectl") if shutil.which(tool) is None]
    if missing:
        return Result(
            "warning", f"not found: {', '.join(missing)}", f"the lab and the demo use them: {', '.join(missing)}"
        )
    return _ok("ip, nft, tcpdump and kubectl are there")


def nothing_bypassed() -> Result:
    """Capture that an operator switched off on a node of this machine, in the kernel's own words."""
    try:
        nodes = [
            read_settings(NodeSettings, path.read_text(), str(path))
            for path in [NODE_CONFIG, *sorted(LABS.glob("*/nodes/*/node.yaml"))]
            if path.exists()
        ]
        found = [f"{node.node_name} ({Path(node.run_dir)})" for node in nodes if _bypassed(node)]
    except (AmbientError, OSError) as error:
        return Result("warning", str(error), "run as root to see what the kernel holds")
    if found:
        return Result("warning", f"capture is switched off on {', '.join(found)}", "ambient bypass status")
    return _ok("nothing is bypassed" if nodes else "no node runs here")


def _bypassed(node: NodeSettings) -> bool:
    """Whether anything of the node is; a node whose maps are not there bypasses nothing."""
    try:
        with Maps.open(node.bpffs_dir) as maps:
            held = maps.settings
            return (held is not None and held.mode == LAYOUT["MODE_BYPASS"]) or any(
                value.flags & LAYOUT["ENROLLED_BYPASS"] for _, value in maps.enrolled.items()
            )
    except LayoutMismatch:
        return False


CHECKS: dict[str, tuple[tuple[str, Check], ...]] = {
    "kernel": (
        ("kernel is 5.15 or later", kernel_version),
        ("kernel has BTF", kernel_btf),
        ("running with the privileges needed", privileges),
    ),
    "ebpf": (
        ("cgroup2 is mounted", cgroup2_mount),
        ("bpf file system is mounted", bpf_filesystem),
        ("bcc is installed", bcc_package),
        ("kernel headers are found", headers),
        ("no foreign cgroup program is in the way", foreign_programs),
        ("same-node kernel path", closing),
        ("same-node redirection", acceleration),
    ),
    "limits": (("enough open files", open_files),),
    "mesh": (("capture is on", nothing_bypassed),),
    "lab": (("tools of the lab are installed", lab_tools),),
}

_MARK = {"ok": "√", "warning": "‼", "error": "×"}


def run_checks() -> list[dict[str, str]]:
    rows = []
    for category, checks in CHECKS.items():
        for description, run in checks:
            result = run()
            rows.append(
                {
                    "category": category,
                    "check": description,
                    "status": result.status,
                    "detail": result.detail,
                    "hint": result.hint,
                }
            )
    return rows


@click.command()
@output_option
def check(output: str) -> None:
    """Check kernel, eBPF, limits and tools; exit 1 if something essential is missing.

    \b
    Example:
      ambient check
      ambient check -o json
    """
    rows = run_checks()
    failed = any(row["status"] == "error" for row in rows)
    if output == "table":
        _print(rows, failed)
    else:
        emit_object({"success": not failed, "checks": rows}, output)
    sys.exit(1 if failed else 0)


def _print(rows: list[dict[str, str]], failed: bool) -> None:
    category = ""
    for row in rows:
        if row["category"] != category:
            category = row["category"]
            click.echo(f"{category}\n{'-' * len(category)}")
        click.echo(f"{_MARK[row['status']]} {row['check']}: {row['detail']}")
        if row["hint"]:
            click.echo(f"    {row['hint']}")
    click.echo(f"\nStatus check results are {'×' if failed else '√'}")
