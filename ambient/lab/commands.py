"""Running the system's programs: ip, nft and nsenter, with a fault that shows what they said."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ambient.errors import PlatformFault

NETNS_DIR = Path("/run/netns")
TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program that was run to its end left behind."""

    code: int
    stdout: bytes
    stderr: bytes

    def talk(self) -> str:
        return (self.stderr or self.stdout).decode(errors="replace").strip()[:2000]


def run(argv: Sequence[str], stdin: str = "", *, check: bool = True) -> str:
    """Run to the end and return stdout. PlatformFault with the program's own words if it fails."""
    try:
        done = subprocess.run(argv, input=stdin.encode(), capture_output=True, timeout=TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise PlatformFault(f"{argv[0]} is not installed: apt-get install iproute2 nftables util-linux") from None
    except subprocess.TimeoutExpired:
        raise PlatformFault(f"{' '.join(argv)[:200]}: no end after {TIMEOUT_S:g} s") from None
    if check and done.returncode:
        raise PlatformFault(f"{' '.join(argv)[:200]}: {done.stderr.decode(errors='replace').strip()[:2000]}")
    return done.stdout.decode(errors="replace")


async def run_async(
    argv: Sequence[str], stdin: bytes = b"", *, env: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S
) -> Answer:
    """The same from the event loop; the exit code is the caller's to judge. PlatformFault on a timeout."""
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
    except OSError as error:
        raise PlatformFault(f"{argv[0]}: {error.strerror}") from None
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr = await process.communicate(stdin)
    except TimeoutError:
        raise PlatformFault(f"{' '.join(argv)[:200]}: no end after {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    assert process.returncode is not None
    return Answer(process.returncode, stdout, stderr)


def netns_path(name: str) -> str:
    return str(NETNS_DIR / name)


def netns_names() -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in NETNS_DIR.iterdir())) if NETNS_DIR.is_dir() else ()


def in_netns(name_or_path: str, *argv: str) -> list[str]:
    """The command line that runs ``argv`` in a network namespace; nothing but the network changes."""
    path = name_or_path if "/" in name_or_path else netns_path(name_or_path)
    return ["nsenter", f"--net={path}", "--", *argv]


def ip_batch(netns: str, lines: Sequence[str]) -> None:
    """Run `ip` commands, one a line without the word ip, in a namespace. Stops at the first that fails."""
    run(in_netns(netns, "ip", "-batch", "-"), "\n".join(lines) + "\n")


def set_sysctls(netns: str, values: Mapping[str, object]) -> None:
    """Write sysctls of a namespace, as paths below /proc/sys; what this kernel does not have is left out."""
    script = "".join(f"[ ! -e /proc/sys/{key} ] || echo {value} > /proc/sys/{key}\n" for key, value in values.items())
    run(in_netns(netns, "sh", "-e", "-s"), script)


def enter_argv(
    argv: Sequence[str],
    *,
    cgroup: str | None = None,
    netns: str | None = None,
    pid: int | None = None,
    directory: str = "",
) -> list[str]:
    """The command line that runs ``argv`` in a cgroup and in the namespaces of a pod.

    ``netns`` is a path; ``pid`` a process whose mount and UTS namespaces to join. exec only: the process keeps
    its ID all the way, so the caller's child is the program itself.
    """
    line: list[str] = []
    if cgroup is not None:
        line += ["sh", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"', cgroup]
    if netns is not None or pid is not None or directory:
        line.append("nsenter")
        if netns is not None:
            line.append(f"--net={netns}")
        if pid is not None:
            line += [f"--mount=/proc/{pid}/ns/mnt", f"--uts=/proc/{pid}/ns/uts"]
        if directory:
            line.append(f"--wd={directory}")
        line.append("--")
    return line + list(argv)
