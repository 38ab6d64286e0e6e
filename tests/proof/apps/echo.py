"""An echo server on port 8080 (PORT), both families on one socket. The first line it sends says what it sees:
``{"peer": [address, port], "accepted": [address, port], "local": [address, port], "pod": hostname}``."""

import json
import os
import socket
import threading


def serve(connection, accepted):
    with connection:
        try:
            peer, local = connection.getpeername(), connection.getsockname()
            about = {"peer": peer[:2], "accepted": accepted[:2], "local": local[:2], "pod": socket.gethostname()}
            connection.sendall(json.dumps(about).encode() + b"\n")
            while data := connection.recv(65536):
                connection.sendall(data)
        except OSError:
            return


def main():
    listener = socket.socket(socket.AF_INET6)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("::", int(os.environ.get("PORT", "8080"))))
    listener.listen(1024)
    while True:
        threading.Thread(target=serve, args=listener.accept(), daemon=True).start()


main()
