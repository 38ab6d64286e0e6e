"""Many connections at once, byte by byte: `many.py serve PORT` in one pod, `many.py call IP PORT COUNT` in another.

Each connection carries a random amount both ways. Half of them are closed for writing by the client first, the
other half by the server; whoever closed first still gets everything. Content follows from a seed, so both ends can
tell every byte. `call` prints one JSON line.
"""

import asyncio
import hashlib
import json
import random
import resource
import struct
import sys

HEADER = struct.Struct("!QII?")  # seed, bytes up, bytes down, whether the client closes first
SIZES = (0, 1, 100, 5_000, 40_000, 200_000)
LIMIT_S = 60


def content(seed, size):
    return random.Random(seed).randbytes(size)


async def served(reader, writer):
    try:
        seed, up, down, client_first = HEADER.unpack(await reader.readexactly(HEADER.size))
        if not client_first:
            writer.write(content(seed + 1, down))
            await writer.drain()
            writer.write_eof()
        got = await reader.read(-1)
        if got != content(seed, up):
            writer.transport.abort()
            return
        if client_first:
            writer.write(content(seed + 1, down))
            await writer.drain()
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def called(address, port, number, gate):
    rng = random.Random(number)
    seed, up, down, client_first = number * 2, rng.choice(SIZES), rng.choice(SIZES), bool(number % 2)
    reader, writer = await asyncio.open_connection(address, port)
    gate.arrive()
    await gate.all.wait()  # from here all of them are open at once
    writer.write(HEADER.pack(seed, up, down, client_first))
    if client_first:
        writer.write(content(seed, up))
        await writer.drain()
        writer.write_eof()
        got = await reader.read(-1)
    else:
        got = await reader.read(-1)
        writer.write(content(seed, up))
        await writer.drain()
        writer.write_eof()
        await reader.read(1)
    writer.close()
    if got != content(seed + 1, down):
        raise ValueError(f"{len(got)} of {down} bytes, {hashlib.sha256(got).hexdigest()[:8]}")
    return up + down


class Gate:
    def __init__(self, count):
        self.missing, self.all = count, asyncio.Event()

    def arrive(self):
        self.missing -= 1
        if not self.missing:
            self.all.set()


async def call(address, port, count):
    gate = Gate(count)

    async def one(number):
        try:
            async with asyncio.timeout(LIMIT_S):
                return await called(address, port, number, gate)
        except (OSError, ValueError, TimeoutError) as error:
            if gate.missing:
                gate.arrive()
            return f"{number}: {type(error).__name__}: {error}"

    results = await asyncio.gather(*(one(number) for number in range(count)))
    wrong = [result for result in results if isinstance(result, str)]
    right = [result for result in results if isinstance(result, int)]
    print(json.dumps({"right": len(right), "bytes": sum(right), "wrong": len(wrong), "examples": wrong[:5]}))


async def serve(port):
    server = await asyncio.start_server(served, "", port, backlog=4096)
    print("serving", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    if sys.argv[1] == "serve":
        asyncio.run(serve(int(sys.argv[2])))
    else:
        asyncio.run(call(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
