"""Open connections to HOST PORT, COUNT of them, say something on each, and hold them until ended."""

import signal
import socket
import sys

host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
held = [socket.create_connection((host, port), timeout=20) for _ in range(count)]
for sock in held:
    sock.sendall(b"held")
signal.pause()
