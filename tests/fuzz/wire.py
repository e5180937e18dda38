"""A client that sends any bytes, and reads what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from typing import Any

ANSWER_TIMEOUT_S = 60.0
BROKEN_TIMEOUT_S = 1.0
"""How long an answer to what is no HTTP is waited for."""

_BODILESS = (204, 304)


@dataclass(frozen=True)
class Answer:
    """A whole response."""

    status: int
    headers: list[tuple[str, str]]
    """Names in small letters."""
    body: bytes

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key == name), "")

    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """One connection at a time, kept while the server keeps it."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, data: bytes, head_only: bool = False) -> Answer | None:
        """The answer; None if there is none. Raises TimeoutError."""
        reused = self._streams is not None
        answer = await self._ask(data, head_only)
        if answer is None and reused:  # The server had closed it while nothing was asked.
            answer = await self._ask(data, head_only)
        return answer

    async def ask_broken(self, data: bytes, half_closes: bool) -> Answer | None:
        """As `ask`, of what is no HTTP, on a connection of its own; None also where no answer comes in a while."""
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            writer.write(data)
            if half_closes:
                writer.write_eof()
            return await asyncio.wait_for(_answer(reader, data.startswith(b"HEAD ")), BROKEN_TIMEOUT_S)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            return None
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _ask(self, data: bytes, head_only: bool) -> Answer | None:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        try:
            writer.write(data)
            answer = await asyncio.wait_for(_answer(reader, head_only), ANSWER_TIMEOUT_S)
        except (ConnectionError, asyncio.IncompleteReadError):
            await self.close()
            return None
        except asyncio.TimeoutError:
            await self.close()
            raise
        if answer.header("connection").lower() == "close":
            await self.close()
        return answer

    async def close(self) -> None:
        if self._streams is not None:
            _, writer = self._streams
            self._streams = None
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def _answer(reader: asyncio.StreamReader, head_only: bool) -> Answer:
    while True:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(first.split()[1])
        if status >= 200:
            break
    headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines if line)]
    told = dict(headers)
    if head_only or status in _BODILESS:
        body = b""
    elif told.get("transfer-encoding", "").lower() == "chunked":
        body = await _chunks(reader)
    elif "content-length" in told:
        body = await reader.readexactly(int(told["content-length"]))
    else:
        body = await reader.read()
    return Answer(status, headers, body)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while True:
        size = int((await reader.readline()).split(b";")[0], 16)
        part = await reader.readexactly(size + 2)
        if size == 0:
            return b"".join(parts)
        parts.append(part[:-2])
