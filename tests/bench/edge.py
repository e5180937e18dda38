"""CPU of one request in the edge, without HTTP parsing and without the tiers: `python -m tests.bench.edge`.

The ASGI application is called as a server would call it. Alternating rounds; smallest and median are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from typing import Any

from serve_app.config import IngressSettings
from serve_app.ingress.asgi import App, create_app
from serve_app.ingress.service import SettingsRef
from serve_app.types import Answer, Request
from tests.ingress.edge import FakeService

HEADERS = [
    (b"host", b"127.0.0.1:8000"),
    (b"accept", b"*/*"),
    (b"accept-encoding", b"gzip, deflate"),
    (b"user-agent", b"python-httpx/0.28.1"),
    (b"content-type", b"application/json"),
    (b"x-request-id", b"3f0c9d9a-52cd-4d8b-a1b2-b9f5d0a6d0a1"),
]
TEXT = "The quick brown fox jumps over the lazy dog."
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "one text": ("/embed", {"inputs": TEXT}),
    "32 texts": ("/embed", {"inputs": [TEXT] * 32}),
    "32 texts, base64": ("/v1/embeddings", {"encoding_format": "base64", "input": [TEXT] * 32}),
}


class Instant(FakeService):
    """Computes each answer once."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, Answer] = {}

    async def answer(self, request: Request) -> Answer:
        key = len(request.inputs)
        if key not in self._known:
            self._known[key] = await super().answer(request)
        return self._known[key]


async def ask(app: Any, path: str, body: bytes) -> None:
    scope = {"type": "http", "method": "POST", "path": path, "headers": list(HEADERS), "query_string": b""}
    received = False
    forever = asyncio.get_running_loop().create_future()

    async def receive() -> Any:
        nonlocal received
        if received:
            return await forever
        received = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start" and message["status"] != 200:
            raise RuntimeError(f"{path} answered {message['status']}")

    await app(scope, receive, send)


async def measure(app: Any, path: str, body: bytes, requests: int) -> float:
    """Microseconds of CPU a request."""
    started = time.process_time()
    for _ in range(requests):
        await ask(app, path, body)
    return (time.process_time() - started) / requests * 1e6


def application() -> App:
    return create_app(Instant(), SettingsRef(IngressSettings()))


async def run(rounds: int, requests: int) -> None:
    app = application()
    taken: dict[str, list[float]] = {name: [] for name in BODIES}
    for _ in range(rounds):
        for name, (path, body) in BODIES.items():
            taken[name].append(await measure(app, path, json.dumps(body).encode(), requests))
    for name, values in taken.items():
        print(f"{name}: {min(values):.1f} us, median {statistics.median(values):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=500)
    args = parser.parse_args()
    asyncio.run(run(args.rounds, args.requests))


if __name__ == "__main__":
    main()
