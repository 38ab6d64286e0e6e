"""Steady load, run inside a pod: `python3 load.py URL`. New connections one after another in a few threads until stdin
closes; then one JSON line: how many were answered, the failures with their times, and the longest pause."""

import http.client
import itertools
import json
import sys
import threading
import time
from urllib.parse import urlsplit

THREADS = 3
url = urlsplit(sys.argv[1])
stop = threading.Event()
lock = threading.Lock()
answered, failed, times = 0, [], []


def work():
    global answered
    while not stop.is_set():
        connection = http.client.HTTPConnection(url.hostname, url.port or 80, timeout=10)
        error = None
        try:
            connection.request("GET", url.path or "/")
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                error = f"{response.status} {body[:200]!r}"
        except (OSError, http.client.HTTPException) as fault:
            error = f"{type(fault).__name__}: {fault}"
        finally:
            connection.close()
        with lock:
            if error is None:
                answered += 1
                times.append(time.time())
            else:
                failed.append([time.time(), error])
        stop.wait(0.01)


threads = [threading.Thread(target=work) for _ in range(THREADS)]
for thread in threads:
    thread.start()
print("started", flush=True)
sys.stdin.read()
stop.set()
for thread in threads:
    thread.join()
times.sort()
gaps = [(b - a, b) for a, b in itertools.pairwise(times)]
pause, until = max(gaps, default=(0.0, 0.0))
print(
    json.dumps({"answered": answered, "failed": failed[:20], "failures": len(failed), "pause": pause, "until": until})
)
