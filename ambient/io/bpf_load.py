"""The loader: compile the eBPF programs, check them, pin and attach them, exit.

    python -m ambient.io.bpf_load --bpffs-dir DIR --node-cgroup DIR --pods-cgroup DIR [--check]

It is a process of its own because the compiler costs 70 MB, and the only one that imports bcc. All or
nothing: everything is pinned in a directory aside and attached, and that directory is renamed at the end.
If the same layout is already loaded and attached there, it says so and does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ambient.datapath.layout import LAYOUT, source_directory
from ambient.datapath.values import SettingsValue
from ambient.errors import AmbientError, OurFault, PlatformFault
from ambient.io import (
    bpf_links,
    bpf_selftest,
    bpf_selftest_destroy,
    bpf_selftest_redirect,
    bpf_sys,
    bpffs,
    btf,
    cgroup,
    kernel_headers,
)
from ambient.io.bpf_maps import SPEC, Maps, check_map

SOURCES: Final = (
    *("common", "connect", "getpeername", "dns", "flow", "sockops", "probe", "sk_lookup"),
    *("sk_msg", "enrol", "setsockopt"),
)
"""Files of bpf/ in the order they make one text: bcc rewrites map methods only in its main text, and one
text shares its maps."""


def source_text(directory: Path) -> str:
    """All programs as one text; compiler messages still name file and line."""
    parts = []
    for name in SOURCES:
        path = directory / f"{name}.c"
        parts.append(f'#line 1 "{path}"\n{path.read_text()}\n')
    return "".join(parts)


class Compiled:
    """The programs and maps in this process, not yet pinned. Keep it alive as long as its descriptors are used."""

    def __init__(self, directory: Path | None = None) -> None:
        sources = directory or source_directory()
        try:
            import bcc
        except ImportError:
            raise PlatformFault(
                "the Python module bcc is missing: apt-get install python3-bpfcc, and run with /usr/bin/python3 or an "
                "environment made from it with system site packages (the package called bcc on PyPI is another one)"
            ) from None
        if not hasattr(bcc, "BPF"):
            raise PlatformFault(f"{bcc.__file__} is the lattice library from PyPI: pip uninstall bcc")
        self._bcc = bcc
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="ambient-headers-") as scratch:
            headers = kernel_headers.find(os.uname().release, Path(scratch) / "tree")
            self.headers = str(headers or "of the running kernel")
            if headers is not None:
                os.environ["BCC_KERNEL_SOURCE"] = str(headers)
            try:
                # bcc wants bytes and warns about text, except for flags, where it is the other way round.
                macros, self.redirection = btf.redirect_macros()
                flags = ["-I", str(sources / "include"), "-Wall"]
                flags += [f"-D{name}={value}" for name, value in macros.items()]
                self._module = bcc.BPF(text=source_text(sources).encode(), cflags=flags)
            except Exception as error:
                said = str(error)[-500:]
                raise OurFault(f"the eBPF programs do not compile (headers: {self.headers}): {said}") from None
        self.maps = {name: self._map(name) for name in SPEC}
        self.programs: dict[str, int] = {}
        for hook in bpf_links.HOOKS:
            if hook.name not in bpf_links.REDIRECTION:
                self.programs[hook.name] = self._load(hook)
            elif not self.redirection:
                try:
                    self.programs[hook.name] = self._load(hook)
                except PlatformFault as fault:
                    self.redirection = str(fault)
        self.seconds = time.monotonic() - started

    def _map(self, name: str) -> int:
        fd = int(self._bcc.lib.bpf_table_fd(self._module.module, name.encode()))
        if fd < 0:
            raise OurFault(f"map {name} is not declared in bpf/include/maps.h")
        check_map(name, bpf_sys.map_info(fd), *SPEC[name])
        return fd

    def _load(self, hook: bpf_links.Hook) -> int:
        try:
            function: Any = self._module.load_func(hook.name.encode(), hook.prog_type, attach_type=hook.attach_type)
        except Exception as error:
            raise PlatformFault(
                f"the kernel ({os.uname().release}) refuses program {hook.name}: {error}: Linux 5.15 or newer and "
                "CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN are needed"
            ) from None
        return int(function.fd)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One loader at a time for a directory."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def loaded(bpffs_dir: Path, targets: dict[str, int]) -> bool:
    """Whether this layout is pinned and attached to exactly these cgroups (``where`` -> id).

    Pins whose cgroups are gone count as not loaded; pins attached to other cgroups that live are a PlatformFault.
    """
    directory = bpf_links.version_dir(bpffs_dir)
    if not directory.is_dir():
        return False
    found = bpf_links.attachments(bpffs_dir)
    others = {entry.hook: entry.target for entry in found if entry.target not in (None, 0, targets[entry.where])}
    elsewhere = {hook: path for hook, ident in others.items() if ident and (path := cgroup.path_of_id(ident))}
    if elsewhere:
        names = ", ".join(f"{hook} to {path}" for hook, path in elsewhere.items())
        raise PlatformFault(
            f"{directory}: already attached to other cgroups: {names}: unload it or use another directory"
        )
    if any(entry.target != targets[entry.where] for entry in found):
        return False
    Maps.open(bpffs_dir).close()
    return (directory / "progs" / "sk_lookup").exists()


def load(bpffs_dir: str | Path, node_cgroup: str | Path, pods_cgroup: str | Path) -> str:
    """Compile, check, pin, attach. Returns a sentence for the operator. Raises an AmbientError, having undone all."""
    root = bpffs.ensure(bpffs_dir)
    where = {bpf_links.NODE: Path(node_cgroup), bpf_links.PODS: Path(pods_cgroup)}
    targets = {name: cgroup.cgroup_id(path) for name, path in where.items()}
    with _locked(root):
        if loaded(root, targets):
            return f"layout {LAYOUT.version} is already loaded and attached in {root}: nothing to do"
        bpf_links.unload(root, [LAYOUT.version, *(path.name for path in root.glob("new-*"))])
        compiled = Compiled()
        untried = bpf_selftest.run(compiled.maps, compiled.programs, where[bpf_links.NODE])
        aside = root / f"new-{os.getpid()}"
        try:
            for name in ("maps", "progs", "links", "pods"):
                (aside / name).mkdir(parents=True)
            for name, fd in compiled.maps.items():
                bpf_sys.obj_pin(fd, str(aside / "maps" / name))
            bpf_sys.obj_pin(compiled.programs["sk_lookup"], str(aside / "progs" / "sk_lookup"))
            redirection = bpf_selftest_redirect.run(compiled.redirection)
            unclosable = bpf_selftest_destroy.run()
            able = bool(redirection.bits & LAYOUT["CAN_REDIRECT"])
            for hook in bpf_links.HOOKS:
                if hook.where not in where or (hook.name in bpf_links.REDIRECTION and not able):
                    continue
                link = bpf_links.attach_cgroup(compiled.programs[hook.name], hook, where[hook.where])
                try:
                    bpf_sys.obj_pin(link, str(aside / "links" / hook.name))
                finally:
                    os.close(link)
            if able:
                _attach_sk_msg(compiled, aside)
                bpf_sys.obj_pin(compiled.programs["enrol"], str(aside / "progs" / "enrol"))
            _tell(compiled.maps["settings"], redirection.bits | (LAYOUT["NO_DESTROY"] if unclosable else 0))
            os.rename(aside, bpf_links.version_dir(root))
        except BaseException:
            bpf_links.detach_links(aside)
            bpffs.remove_tree(aside)
            raise
    others = bpf_links.other_versions(root)
    return (
        f"loaded layout {LAYOUT.version} in {root} ({compiled.seconds:.1f} s, headers {compiled.headers}); "
        f"attached to {where[bpf_links.PODS]} and {where[bpf_links.NODE]}"
        + (f"; still pinned: {', '.join(others)}" if others else "")
        + "".join(f"; {said}" for said in (untried, unclosable, *redirection.said) if said)
    )


def _attach_sk_msg(compiled: Compiled, aside: Path) -> None:
    """To the sockhash: by a link (6.10), else the map keeps the program, and is pinned."""
    prog, table = compiled.programs["sk_msg"], compiled.maps["sockets"]
    try:
        link = bpf_sys.link_create(prog, table, bpf_sys.ATTACH_SK_MSG, "sk_msg to map sockets")
    except bpf_sys.BpfFault:
        bpf_sys.prog_attach(prog, table, bpf_sys.ATTACH_SK_MSG, "sk_msg to map sockets")
        return
    try:
        bpf_sys.obj_pin(link, str(aside / "links" / "sk_msg"))
    finally:
        os.close(link)


def _tell(settings: int, bits: int) -> None:
    """Leave what was found where the agent finds it; it keeps these bits, and writes everything else."""
    table = bpf_sys.Table(os.dup(settings), "settings")
    try:
        table.update(bytes(4), SettingsValue(acceleration=bits).encode())
    finally:
        table.close()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ambient.io.bpf_load", description=__doc__)
    parser.add_argument("--bpffs-dir", required=True, help="directory in a bpf file system, one per node")
    parser.add_argument("--node-cgroup", required=True, help="cgroup2 directory of the whole node")
    parser.add_argument("--pods-cgroup", required=True, help="lowest cgroup2 directory common to all pods")
    parser.add_argument("--check", action="store_true", help="compile and check only; pin and attach nothing")
    options = parser.parse_args(arguments)
    # An end by SIGTERM undoes what was begun, like any other failure.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    try:
        if options.check:
            compiled = Compiled()
            untried = bpf_selftest.run(compiled.maps, compiled.programs, Path(options.node_cgroup))
            said = f"layout {LAYOUT.version} compiles and loads ({compiled.seconds:.1f} s, headers {compiled.headers})"
            redirection = bpf_selftest_redirect.run(compiled.redirection)
            found = (untried, bpf_selftest_destroy.run(), *redirection.said)
            print(said + "".join(f"; {text}" for text in found if text))
        else:
            print(load(options.bpffs_dir, options.node_cgroup, options.pods_cgroup))
    except AmbientError as error:
        print(f"bpf_load: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
