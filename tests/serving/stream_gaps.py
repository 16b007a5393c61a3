"""Run as a process of its own: keeps some streams going and notes when their chunks arrive.

`python stream_gaps.py PORT STREAMS`; ends when its input does, and prints a JSON list of [arrival, gap] in s,
arrivals by CLOCK_MONOTONIC, gaps within a stream.
"""

import asyncio
import json
import sys
import time

BODY = json.dumps(
    {
        "model": "tiny",
        "messages": [{"role": "user", "content": "go on"}],
        "stream": True,
        "max_tokens": 1900,
        "ignore_eos": True,
    }
)
REQUEST = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(BODY)}\r\n\r\n{BODY}"
).encode()


async def follow(port, seen):
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST)
        last = None
        while await reader.read(65536):
            now = time.monotonic()
            if last is not None:
                seen.append((now, now - last))
            last = now
        writer.close()


async def main():
    seen = []
    followers = [asyncio.create_task(follow(int(sys.argv[1]), seen)) for _ in range(int(sys.argv[2]))]
    await asyncio.to_thread(sys.stdin.read)
    for follower in followers:
        follower.cancel()
    print(json.dumps(seen))


asyncio.run(main())
