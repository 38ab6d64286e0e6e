"""A virtual machine with Debian's kernel and this machine's files, for one command.

The kernel is `build/guest` (fetch_kernel.sh). The emulator translates code (TCG), because machines that run tests often
cannot nest virtual machines; so the guest is ten to twenty times slower than its host, and no time is measured in it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import join, quote

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNEL = ROOT / "build" / "guest"
MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"),
    *("netfs", "fscache", "9pnet", "9pnet_virtio", "9p", "overlay"),
    *("llc", "stp", "bridge", "veth", "sch_ingress", "cls_bpf", "inet_diag", "tcp_diag"),
)
"""In the order they are loaded: first those that another needs. The guest has no modprobe."""
MEMORY_MB = 2048


@dataclass(frozen=True)
class Ended:
    """``code``: the command's exit code; None if it did not end within its limit, or the guest died. ``out``: the
    directory the command saw as /out."""

    code: int | None
    console: str
    out: Path

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.console.splitlines()[-lines:])


def _initrd(scratch: Path, job: str) -> Path:
    """busybox, modules, init and the job as the archive that the kernel unpacks as its first root."""
    tree = scratch / "initrd.d"
    for name in ("bin", "modules", "proc", "dev", "lower", "upper", "root"):
        (tree / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin" / "busybox")
    for number, name in enumerate(MODULES):
        (found,) = (KERNEL / "modules").glob(f"{name}.ko*")
        shutil.copy(found, tree / "modules" / f"{number:02}-{found.name}")
    shutil.copy(HERE / "init.sh", tree / "init")
    (tree / "init").chmod(0o755)
    (tree / "job").write_text(job)
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    archive = scratch / "initrd"
    with archive.open("wb") as into:
        subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=tree, input=names.encode(), stdout=into, check=True)
    return archive


def run(command: Sequence[str], scratch: Path, limit_s: float, environment: dict[str, str] | None = None) -> Ended:
    """Boot, run a command in this tree as root, power off. A guest that takes longer than ``limit_s`` is killed.

    It sees all files of this machine; what it writes is lost, but for /out, which is ``scratch``/out.
    """
    out, console = scratch / "out", scratch / "console"
    out.mkdir()
    variables = {"PATH": os.environ["PATH"], "HOME": "/root", "TMPDIR": "/dev/shm", "PYTHONPATH": str(ROOT)}
    exports = [f"export {name}={quote(value)}" for name, value in (variables | (environment or {})).items()]
    job = "\n".join([*exports, f"cd {quote(str(ROOT))}", f"{join(command)} >/out/said 2>&1 </dev/null"])
    share = "security_model=none,multidevs=remap"
    emulator = subprocess.Popen(
        [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "qemu64", "-smp", "2", "-m", str(MEMORY_MB)),
            *("-nodefaults", "-no-reboot", "-display", "none", "-serial", f"file:{console}"),
            *("-kernel", str(KERNEL / "vmlinuz"), "-initrd", str(_initrd(scratch, job))),
            *("-append", "console=ttyS0 quiet panic=-1 mitigations=off"),
            *("-virtfs", f"local,path=/,mount_tag=host,readonly=on,{share}"),
            *("-virtfs", f"local,path={out},mount_tag=out,{share}"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        said = emulator.communicate(timeout=limit_s)[0]
    except subprocess.TimeoutExpired:
        emulator.kill()
        said = emulator.communicate()[0]
        said += f"the guest did not end within {limit_s:.0f} s and was killed\n".encode()
    parts = [path.read_text("utf-8", "replace") for path in (console, out / "said") if path.exists()]
    code = out / "code"
    return Ended(
        int(code.read_text()) if code.exists() else None, "\n".join([*parts, said.decode("utf-8", "replace")]), out
    )
