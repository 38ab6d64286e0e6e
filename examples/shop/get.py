"""GET a URL and print what came: `python3 get.py [--marker M] [--count N] URL`. Exit code 1 if it was refused.

Each request uses a connection of its own. The last line of output is a JSON object for each request, either the
service's answer or ``{"error": ...}``; ``local`` is the address this end of the connection had.
"""

import argparse
import http.client
import json
import sys
from urllib.parse import urlsplit


def get(url, marker, timeout):
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout)
    try:
        connection.connect()
        ends = {"local": connection.sock.getsockname()[0], "peer": connection.sock.getpeername()[0]}
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"X-Marker": marker} if marker else {})
        response = connection.getresponse()
        body = response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        connection.close()
    try:
        answer = json.loads(body)
    except ValueError:
        answer = {"body": body}
    return {"status": response.status, "answer": answer} | ends


parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("--marker", default="")
parser.add_argument("--count", type=int, default=1)
parser.add_argument("--timeout", type=float, default=10.0)
arguments = parser.parse_args()
failed = False
for _ in range(arguments.count):
    result = get(arguments.url, arguments.marker, arguments.timeout)
    failed = failed or result.get("status") != 200
    print(json.dumps(result), flush=True)
sys.exit(1 if failed else 0)
