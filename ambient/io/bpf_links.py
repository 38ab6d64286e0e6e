"""Attachments of the pinned programs, for processes that never compile.

    BPFFS_DIR/VERSION/maps/NAME            the maps (ambient.io.bpf_maps)
    BPFFS_DIR/VERSION/progs/sk_lookup      a program that is attached later, pod by pod
    BPFFS_DIR/VERSION/links/HOOK           attachments to the node's and the pods' cgroup
    BPFFS_DIR/VERSION/pods/UID/sk_lookup   attachment to a pod's network namespace
    BPFFS_DIR/VERSION/progs/enrol          the tc program of redirection; missing where redirection is off
    BPFFS_DIR/VERSION/pods/UID/enrol-*     its attachment to a pod's interface (ambient.io.bpf_tc)

Attached by bpf_link where the kernel has one: a link never disturbs foreign programs, and its pin outlives us.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ambient.datapath.layout import LAYOUT
from ambient.errors import PlatformFault
from ambient.io import bpf_sys, bpffs, cgroup, netns

POD: Final = "pod"
NODE: Final = "node"
PODS: Final = "pods"
INTERFACE: Final = "interface"
SOCKETS: Final = "sockets"


@dataclass(frozen=True, slots=True)
class Hook:
    """``where``: PODS or NODE (a cgroup), POD (a network namespace), INTERFACE (a pod's), or SOCKETS (the map).

    Without the hooks of redirection (REDIRECTION) a node works, and its same-node flows are native.
    """

    name: str
    where: str
    prog_type: int
    attach_type: int


HOOKS: Final = (
    Hook("connect4", PODS, bpf_sys.PROG_TYPE_CGROUP_SOCK_ADDR, bpf_sys.ATTACH_CONNECT4),
    Hook("connect6", PODS, bpf_sys.PROG_TYPE_CGROUP_SOCK_ADDR, bpf_sys.ATTACH_CONNECT6),
    Hook("getpeername4", PODS, bpf_sys.PROG_TYPE_CGROUP_SOCK_ADDR, bpf_sys.ATTACH_GETPEERNAME4),
    Hook("getpeername6", PODS, bpf_sys.PROG_TYPE_CGROUP_SOCK_ADDR, bpf_sys.ATTACH_GETPEERNAME6),
    Hook("sendmsg4", PODS, bpf_sys.PROG_TYPE_CGROUP_SOCK_ADDR, bpf_sys.ATTACH_SENDMSG4),
    Hook("sendmsg6", PODS, bpf_sys.PROG_TYPE_CGROUP_SOCK_ADDR, bpf_sys.ATTACH_SENDMSG6),
    Hook("recvmsg4", PODS, bpf_sys.PROG_TYPE_CGROUP_SOCK_ADDR, bpf_sys.ATTACH_RECVMSG4),
    Hook("recvmsg6", PODS, bpf_sys.PROG_TYPE_CGROUP_SOCK_ADDR, bpf_sys.ATTACH_RECVMSG6),
    Hook("sock_ops", NODE, bpf_sys.PROG_TYPE_SOCK_OPS, bpf_sys.ATTACH_SOCK_OPS),
    Hook("probe4", NODE, bpf_sys.PROG_TYPE_CGROUP_SOCK_ADDR, bpf_sys.ATTACH_CONNECT4),
    Hook("probe6", NODE, bpf_sys.PROG_TYPE_CGROUP_SOCK_ADDR, bpf_sys.ATTACH_CONNECT6),
    Hook("sk_lookup", POD, bpf_sys.PROG_TYPE_SK_LOOKUP, bpf_sys.ATTACH_SK_LOOKUP),
    Hook("enrol", INTERFACE, bpf_sys.PROG_TYPE_SCHED_CLS, bpf_sys.ATTACH_TCX_INGRESS),
    Hook("sk_msg", SOCKETS, bpf_sys.PROG_TYPE_SK_MSG, bpf_sys.ATTACH_SK_MSG),
    Hook("setsockopt", PODS, bpf_sys.PROG_TYPE_CGROUP_SOCKOPT, bpf_sys.ATTACH_SETSOCKOPT),
)
REDIRECTION: Final = ("enrol", "sk_msg", "setsockopt")

_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def version_dir(bpffs_dir: str | Path) -> Path:
    """Where this program's layout is pinned."""
    return Path(bpffs_dir) / LAYOUT.version


def foreign_programs(directory: str | Path, attach_type: int) -> list[str]:
    """Programs on a cgroup and those above it, as ``CGROUP: program 12 "name" (type 18, exclusive)``."""
    top = cgroup.mount_point()
    here = Path(directory)
    found = []
    for level in (here, *here.parents):
        if not level.is_relative_to(top):
            break
        fd = os.open(level, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            ids, flags = bpf_sys.prog_query(fd, attach_type)
        except bpf_sys.BpfFault:
            ids, flags = (), 0
        finally:
            os.close(fd)
        for ident in ids:
            try:
                prog = bpf_sys.prog_fd_by_id(ident)
            except bpf_sys.BpfFault:
                continue
            try:
                info = bpf_sys.prog_info(prog)
            finally:
                os.close(prog)
            mode = bpf_sys.ATTACH_FLAGS.get(flags & 3, str(flags))
            found.append(f'{level}: program {ident} "{info.name}" (type {info.type}, {mode})')
    return found


def attach_cgroup(prog_fd: int, hook: Hook, directory: str | Path) -> int:
    """Attach to a cgroup; returns the link's descriptor. A stranger in the way is named."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise PlatformFault(f"cgroup {directory}: {error.strerror}") from None
    try:
        return bpf_sys.link_create(prog_fd, fd, hook.attach_type, f"{hook.name} to cgroup {directory}")
    except bpf_sys.BpfFault as fault:
        strangers = foreign_programs(directory, hook.attach_type) if fault.errno == errno.EPERM else []
        if not strangers:
            raise
        raise PlatformFault(
            f"attach {hook.name} to cgroup {directory}: a foreign program allows no other beside it: "
            + "; ".join(strangers)
            + ": attach it with BPF_F_ALLOW_MULTI or a bpf_link, or remove it"
        ) from None
    finally:
        os.close(fd)


def pod_dir(bpffs_dir: str | Path, pod_uid: str) -> Path:
    """Where a pod's attachments are pinned. Raises PlatformFault for what is no UID."""
    if not _UID.fullmatch(pod_uid):
        raise PlatformFault(f"pod UID {pod_uid!r}: letters, digits and dashes, at most 128")
    return version_dir(bpffs_dir) / "pods" / pod_uid


def attach_sk_lookup(bpffs_dir: str | Path, netns_fd: int, pod_uid: str) -> bool:
    """Steer new connections in a pod's namespace. False if it was so already; safe to repeat.

    A pin left by an earlier namespace of the same pod is replaced.
    """
    directory = pod_dir(bpffs_dir, pod_uid)
    pin = directory / "sk_lookup"
    if pin.exists():
        link = bpf_sys.obj_get(str(pin))
        try:
            if bpf_sys.link_info(link).target == netns.inode(netns_fd):
                return False
        finally:
            os.close(link)
        detach_sk_lookup(bpffs_dir, pod_uid)
    prog = bpf_sys.obj_get(str(version_dir(bpffs_dir) / "progs" / "sk_lookup"))
    try:
        link = bpf_sys.link_create(prog, netns_fd, bpf_sys.ATTACH_SK_LOOKUP, f"sk_lookup to the namespace of {pod_uid}")
    finally:
        os.close(prog)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        bpf_sys.obj_pin(link, str(pin))
    except OSError as error:
        raise PlatformFault(f"pin {pin}: {error.strerror}") from None
    finally:
        os.close(link)
    return True


def detach_sk_lookup(bpffs_dir: str | Path, pod_uid: str) -> bool:
    """Stop steering in a pod's namespace, and whatever else is attached. False if there was nothing; safe to repeat."""
    directory = pod_dir(bpffs_dir, pod_uid)
    pin = directory / "sk_lookup"
    if not pin.exists():
        bpffs.remove_tree(directory)
        return False
    link = bpf_sys.obj_get(str(pin))
    try:
        bpf_sys.link_detach(link)
    finally:
        os.close(link)
    bpffs.remove_tree(directory)
    return True


def attached_pods(bpffs_dir: str | Path) -> dict[str, int]:
    """Pod UID -> inode of the namespace its sk_lookup is attached to; 0: that namespace is gone."""
    pods = version_dir(bpffs_dir) / "pods"
    found: dict[str, int] = {}
    for pin in sorted(pods.glob("*/sk_lookup")) if pods.is_dir() else ():
        link = bpf_sys.obj_get(str(pin))
        try:
            found[pin.parent.name] = bpf_sys.link_info(link).target
        finally:
            os.close(link)
    return found


@dataclass(frozen=True, slots=True)
class Attachment:
    """``target``: id of the cgroup, 0 if it is gone; None if there is no pin."""

    hook: str
    where: str
    target: int | None
    prog_id: int


def attachments(bpffs_dir: str | Path) -> list[Attachment]:
    """What is attached to the cgroups, hook by hook."""
    found = []
    redirection = can_redirect(bpffs_dir)
    for hook in HOOKS:
        if hook.where not in (NODE, PODS) or (hook.name in REDIRECTION and not redirection):
            continue
        pin = version_dir(bpffs_dir) / "links" / hook.name
        if not pin.exists():
            found.append(Attachment(hook.name, hook.where, None, 0))
            continue
        link = bpf_sys.obj_get(str(pin))
        try:
            info = bpf_sys.link_info(link)
        finally:
            os.close(link)
        found.append(Attachment(hook.name, hook.where, info.target, info.prog_id))
    return found


def can_redirect(bpffs_dir: str | Path) -> bool:
    """Whether the programs of redirection were loaded."""
    return (version_dir(bpffs_dir) / "progs" / "enrol").exists()


def other_versions(bpffs_dir: str | Path) -> list[str]:
    """Layout versions pinned beside this one."""
    root = Path(bpffs_dir)
    if not root.is_dir():
        return []
    return sorted(path.name for path in root.glob("v*-*") if path.name != LAYOUT.version)


def unload(bpffs_dir: str | Path, versions: list[str] | None = None) -> None:
    """Detach and unpin everything (or only these layout versions). Nothing there is fine.

    After an upgrade: write the new maps, then ``unload(dir, other_versions(dir))``. While both are attached
    a captured connect of an enrolled pod is refused by the second hook's recursion guard: closed, not open.
    """
    root = Path(bpffs_dir)
    if not root.is_dir() or bpffs.mounted_at(root) is None:
        return
    for path in sorted(root.iterdir()):
        if path.name in versions if versions is not None else re.fullmatch(r"(v\d+-[0-9a-f]{8}|new-\d+)", path.name):
            detach_links(path)
            bpffs.remove_tree(path)
    if versions is None and not os.path.ismount(root) and not any(root.iterdir()):
        bpffs.remove_tree(root)


def detach_links(directory: Path) -> None:
    """Detach every link pinned below a directory, now, whoever else may hold it."""
    for pin in [*directory.glob("links/*"), *directory.glob("pods/*/*")]:
        try:
            link = bpf_sys.obj_get(str(pin))
        except bpf_sys.BpfFault:
            continue  # not a link of ours, or gone
        try:
            bpf_sys.link_detach(link)
        except bpf_sys.BpfFault:
            pass  # its cgroup or namespace is gone
        finally:
            os.close(link)
