"""Call an echo server again and again until standard input ends; then print who answered: [[address, count], ...].

Equal answers in a row are counted. Who answers is known by the address that it was reached at; "refused" is anything
else than an answer. `knocking` is printed after the first answer.
"""

import itertools
import json
import select
import socket
import sys

host, port = sys.argv[1], int(sys.argv[2])
answers = []


def knock():
    try:
        with socket.create_connection((host, port), timeout=6) as connection:
            line = connection.makefile("rb").readline()
            return json.loads(line)["local"][0].removeprefix("::ffff:")
    except (OSError, ValueError):
        return "refused"


while not select.select([sys.stdin], [], [], 0.005)[0]:
    answers.append(knock())
    if len(answers) == 1:
        print("knocking", flush=True)
print(json.dumps([[who, len(list(run))] for who, run in itertools.groupby(answers)]), flush=True)
