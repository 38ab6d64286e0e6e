"""Pod to pod through two workers beside no mesh, in one run, alternating: `python -m tests.bench.relay`.

Needs root, nginx, wrk, iperf3 and openssl. Everything runs on this machine, clients, server and both relays
together, so only the ratios mean anything. Results go to tests/bench/results/relay-COMMIT.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ambient.bench.measure import read_wrk
from tests.ztunnel.harness import ROOT, Mesh, mesh, wait_until

AIMS = {"p50_c1": 1.9, "rps_c32": 0.32, "rps_c256": 0.33, "new_connections": 0.30, "stream_per_rps": 0.055}
NGINX = """
worker_processes 2; daemon off; pid {dir}/pid; error_log {dir}/error crit;
events {{ worker_connections 8192; }}
http {{ access_log off; keepalive_requests 1000000000; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p;
 fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
 server {{ listen {ip}:8080 backlog=8192; location / {{ return 200 "0123456789"; }} }} }}
"""


def wrk(it: Mesh, url: str, connections: int, seconds: float, *headers: str) -> dict[str, float]:
    threads = 1 if connections == 1 else 2
    arguments = [f"-t{threads}", f"-c{connections}", f"-d{seconds:g}s", "--latency"]
    for header in headers:
        arguments += ["-H", header]
    out = it.a.run("wrk", *arguments, url, capture_output=True, check=True).stdout
    found = read_wrk(out)
    return {"p50_us": found["p50_us"], "rps": found["per_s"], "errors": found["errors"]}


def iperf(it: Mesh, host: str, port: int, size: int, seconds: float) -> float:
    out = it.a.run(
        "iperf3", "-c", host, "-p", str(port), "-l", str(size), "-t", f"{seconds:g}", "-J", capture_output=True
    ).stdout
    result = json.loads(out)
    if "end" not in result or "sum_received" not in result["end"]:
        raise SystemExit(f"iperf3: {result.get('error', out[:500])}")
    return float(result["end"]["sum_received"]["bits_per_second"]) / 1e9


def aes_gbit() -> float:
    out = subprocess.run(
        ["openssl", "speed", "-seconds", "1", "-bytes", "16384", "-evp", "aes-256-gcm"], capture_output=True, text=True
    ).stdout
    found = re.findall(r"([\d.]+)k\s*$", out, re.MULTILINE)
    return float(found[-1]) * 8000 / 1e9 if found else 0.0


def one_round(it: Mesh, seconds: float) -> dict[str, dict[str, float]]:
    direct, meshed = f"http://{it.ip}:8080/", "http://127.0.0.1:15001/"
    values: dict[str, dict[str, float]] = {"none": {}, "mesh": {}}
    for name, url in (("none", direct), ("mesh", meshed)):
        values[name]["p50_c1"] = wrk(it, url, 1, seconds)["p50_us"]
    for connections in (32, 256):
        for name, url in (("none", direct), ("mesh", meshed)):
            got = wrk(it, url, connections, seconds)
            values[name][f"rps_c{connections}"] = got["rps"]
            values[name]["errors"] = values[name].get("errors", 0) + got["errors"]
    for name, url in (("none", direct), ("mesh", meshed)):
        values[name]["new_connections"] = wrk(it, url, 32, seconds, "Connection: close")["rps"]
    return values


def streams(it: Mesh, seconds: float, values: dict[str, dict[str, float]]) -> None:
    for size in (16, 128):
        for name, (host, port) in (("none", (it.ip, 5201)), ("mesh", ("127.0.0.1", 15001))):
            values[name][f"stream_{size}k"] = iperf(it, host, port, size * 1024, seconds)


def _listens(it: Mesh, port: int) -> bool:
    try:
        it.a.connect(it.ip, port, 1).close()
    except OSError:
        return False
    return True


def run(rounds: int, seconds: float) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as directory, mesh() as it:
        it.client.control.keep_events = it.server.control.keep_events = False
        idle = (it.client.rss_mb(), it.server.rss_mb())
        config = Path(directory) / "nginx.conf"
        config.write_text(NGINX.format(dir=directory, ip=it.ip))
        nginx = it.b.start("nginx", "-c", str(config))
        server = it.b.start("iperf3", "-s", "-B", it.ip, stdout=subprocess.DEVNULL)
        try:
            wait_until(
                lambda: it.a.run("wrk", "-c1", "-t1", "-d0.1s", f"http://{it.ip}:8080/", capture_output=True), "nginx"
            )
            time_of = it.client.cpu_s() + it.server.cpu_s()
            all_values = []
            for number in range(rounds):
                values = one_round(it, seconds)
                it.port = 5201
                generation = 2 * number + 2
                it.client.control.send(it.route(generation=generation))
                streams(it, seconds, values)
                it.port = 8080
                it.client.control.send(it.route(generation=generation + 1))
                all_values.append(values)
                print(json.dumps(values), file=sys.stderr)
            busy = (it.client.rss_mb(), it.server.rss_mb())
            held = [it.connect() for _ in range(1000)]
            wait_until(lambda: it.server.control.event_count > 0, "events")
            for sock in held:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            for sock in held:
                sock.recv(1000)
            thousand = (it.client.rss_mb(), it.server.rss_mb())
            for sock in held:
                sock.close()
            cpu = it.client.cpu_s() + it.server.cpu_s() - time_of
        finally:
            nginx.terminate()
            server.terminate()
            nginx.wait(10)
            server.wait(10)
    medians = {
        name: {key: statistics.median(values[name][key] for values in all_values) for key in all_values[0][name]}
        for name in ("none", "mesh")
    }
    none, meshed = medians["none"], medians["mesh"]
    ratios = {key: meshed[key] / none[key] for key in ("p50_c1", "rps_c32", "rps_c256", "new_connections")}
    for size in ("stream_16k", "stream_128k"):
        ratios[f"{size}_per_rps"] = meshed[size] / (none["rps_c32"] / 1000)
    return {
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kernel": os.uname().release,
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "rounds": rounds,
        "seconds": seconds,
        "none": none,
        "mesh": meshed,
        "ratios": ratios,
        "aims": AIMS,
        "aes_256_gcm_gbit": aes_gbit(),
        "cpu_s": cpu,
        "rss_mb": {"idle": idle, "after_load": busy, "thousand_connections": thousand},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--no-save", action="store_true", help="only print")
    options = parser.parse_args()
    result = run(options.rounds, options.seconds)
    text = json.dumps(result, indent=1)
    print(text)
    if not options.no_save:
        path = Path(__file__).parent / "results" / f"relay-{str(result['commit'])[:10]}.json"
        path.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
