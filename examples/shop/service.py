"""What the services of the shop share: an HTTP server and calls to other services. Standard library only.

Every answer is a JSON object with ``service``, ``pod`` and ``client`` (the address this service sees its caller
at) beside its own fields. A marker in the request's X-Marker header is shown in the answer and passed on with every
call, so that one request can be followed on the wire through the whole chain.
"""

import http.client
import json
import os
import select
import signal
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from urllib.parse import parse_qs, urlsplit

PORT = int(os.environ.get("PORT", "8080"))
TIMEOUT_S = 10
IDLE_S = 60


class Refused(Exception):
    """Another service could not be asked: its name and why."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    address_family = socket.AF_INET6

    def server_bind(self):
        if self.address_family == socket.AF_INET6:  # one socket for both families
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)  # HTTPServer's asks DNS for our name, which nobody needs
        self.server_name, self.server_port = socket.gethostname(), self.server_address[1]


class Call:
    """One request: where it came from, what it asks, and calls on its behalf."""

    def __init__(self, handler):
        url = urlsplit(handler.path)
        self.path = url.path
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.marker = handler.headers.get("X-Marker", "")
        self.client = plain(handler.client_address[0])
        self.client_port = handler.client_address[1]
        self.local = plain(handler.connection.getsockname()[0])

    def ask(self, service, path):
        """GET ``path`` of another service and return its answer. Raises Refused."""
        connection = http.client.HTTPConnection(service, int(os.environ.get("PEER_PORT", "80")), timeout=TIMEOUT_S)
        try:
            connection.request("GET", path, headers={"X-Marker": self.marker} if self.marker else {})
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Refused(f"{service}: {type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if response.status != 200:
            raise Refused(f"{service}: {answer.get('error', response.status)}")
        return answer


def plain(address):
    """An IPv4 address that came in over an IPv6 socket, as people write it."""
    return address.removeprefix("::ffff:")


def serve(name, paths):
    """Serve ``paths`` (path -> function of a Call that returns a dict), and /healthz and /whoami, until SIGTERM."""
    about = {"service": name, "pod": os.environ.get("POD_NAME", socket.gethostname())}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # With a timeout the socket is non-blocking, and it is waited for by level: fit to be redirected.
        timeout = IDLE_S

        def setup(self):
            super().setup()
            self.loop = select.epoll()
            self.loop.register(self.connection, select.EPOLLIN)

        def finish(self):
            self.loop.close()
            super().finish()

        wbufsize = -1  # an answer in one piece: in two, the second waits for the first's acknowledgement

        def do_GET(self):
            call = Call(self)
            seen = about | {"client": call.client} | ({"marker": call.marker} if call.marker else {})
            if call.path == "/healthz":
                self.answer(200, {"ok": True})
            elif call.path == "/whoami":
                self.answer(200, seen | {"client_port": call.client_port, "local": call.local})
            elif call.path not in paths:
                self.answer(404, seen | {"error": f"{name} has no {call.path}"})
            else:
                try:
                    self.answer(200, seen | paths[call.path](call))
                except Refused as refusal:
                    self.answer(502, seen | {"error": str(refusal)})

        def answer(self, status, value):
            body = json.dumps(value).encode() + b"\n"
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):
            if not self.path.startswith("/healthz"):
                print(f"{plain(self.client_address[0])} {format % args}", flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        server = Server(("::", PORT), Handler)
    except OSError:  # no IPv6 here
        Server.address_family = socket.AF_INET
        server = Server(("0.0.0.0", PORT), Handler)
    print(f"{name} listens on {PORT}", flush=True)
    server.serve_forever()
