"""Request lines, headers and framing: odd ones, and ones that are no HTTP at all."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from tests.fuzz.targets import Target

if TYPE_CHECKING:
    from tests.fuzz.requests import Fuzzed

Headers = list[tuple[bytes, bytes]]

_METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"PROPFIND", b"TRACE")
_MEDIA = (
    b"text/plain",
    b"application/x-www-form-urlencoded",
    b"multipart/form-data; boundary=x",
    b"application/octet-stream",
    b"application/xml",
    b"application/vnd.a+json",
    b"application/json; charset=utf-16",
    b"Application/JSON",
    b"*/*",
    b"",
    b";;;",
    b"\xff\xfe",
    b"application/json, text/plain",
)
_HEADERS: Headers = [
    (b"authorization", b"Bearer "),
    (b"authorization", b"Basic \xff\xfe"),
    (b"authorization", b"a" * 2000),
    (b"x-api-key", b"\x80\x81"),
    (b"x-request-id", b"../../etc/passwd"),
    (b"x-request-id", b"a" * 129),
    (b"x-request-id", b"\xff"),
    (b"x-request-id", b""),
    (b"x-request-id", b"<b>"),
    (b"x-request-timeout-seconds", b"0"),
    (b"x-request-timeout-seconds", b"NaN"),
    (b"x-request-disconnect-disabled", b"?1"),
    (b"x-session-id", b"\xff"),
    (b"serve_multiplexed_model_id", b"\xff"),
    (b"content-encoding", b"gzip"),
    (b"content-encoding", b"br, identity"),
    (b"content-encoding", b"\xff"),
    (b"accept", b"text/html;q=\xff"),
    (b"accept-encoding", b"gzip, *;q=0"),
    (b"accept-charset", b"utf-7"),
    (b"cookie", b"a=" + b"b" * 2000),
    (b"x-forwarded-for", b"127.0.0.1, \xff"),
    (b"x-forwarded-prefix", b"/../.."),
    (b"x-http-method-override", b"DELETE"),
    (b"range", b"bytes=0-1,-1"),
    (b"if-none-match", b"*"),
    (b"inference-header-content-length", b"-1"),
    (b"inference-header-content-length", b"9" * 30),
    (b"inference-header-content-length", b"\xb2"),
    (b"inference-header-content-length", b"3"),
    (b"expect", b"100-continue"),
    (b"te", b"trailers, \xff"),
    (b"x-" + b"n" * 200, b"long name"),
]
_TIMEOUTS = (b"0", b"-1", b"1.5", b"abc", b"1e3", b"\xb2", b"\xd9\xa1", b"9" * 30, b"", b"NaN", b"100000", b"30000")


@dataclass
class Head:
    """A request line and headers, but for those of the framing."""

    method: bytes
    path: bytes
    headers: Headers = field(default_factory=list)
    chunked: bool = False

    @classmethod
    def of(cls, target: Target) -> Head:
        headers = [(b"host", b"edge")]
        if target.good is not None:
            headers.append((b"content-type", b"application/json"))
        return cls(target.method.encode(), target.path.encode(), headers)

    def set(self, name: bytes, value: bytes) -> None:
        self.headers = [header for header in self.headers if header[0] != name]
        self.headers.append((name, value))


def mutate(request: Fuzzed, head: Head, rng: Random) -> None:
    """Something about the request line or the headers, or several."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        what = rng.choices(
            ("media", "header", "timeout", "canaries", "chunked", "path", "query", "method", "broken"),
            (3, 6, 3, 2, 4, 2, 2, 1, 3),
        )[0]
        request.kinds.append(f"head: {what}")
        if what == "media":
            head.set(b"content-type", rng.choice(_MEDIA))
        elif what == "header":
            head.headers.append(rng.choice(_HEADERS))
        elif what == "timeout":
            _set_timeout(request, head, rng)
        elif what == "canaries":
            canary = request.canary.encode()
            name = rng.choice((b"x-other", b"authorization", b"x-api-key", b"user-agent", b"referer", b"accept"))
            head.headers += [(name, canary), (b"x-request-id", canary + b" b"), (canary.lower(), b"a")]
        elif what == "chunked":
            head.chunked = True
        elif what == "path":
            head.path = _odd_path(head.path, request.target.model, request.canary.encode(), rng)
        elif what == "query":
            queries = (b"a=1", b"%", b"%00=%ff", b"model=" + request.canary.encode(), b"q" * 2000, b"?", b"[]=&&;")
            head.path += b"?" + rng.choice(queries)
        elif what == "method":
            head.method = rng.choice(_METHODS)
        else:
            request.broken = True


def _set_timeout(request: Fuzzed, head: Head, rng: Random) -> None:
    if rng.random() < 0.1:
        request.may_be_late = True
        head.set(b"x-request-timeout-ms", b"1")
    else:
        head.set(b"x-request-timeout-ms", rng.choice((*_TIMEOUTS, request.canary.encode())))


def _odd_path(path: bytes, model: str | None, canary: bytes, rng: Random) -> bytes:
    if model is not None and rng.random() < 0.2:
        return path.replace(model.encode(), canary, 1)
    start, _, end = path.rpartition(b"/")
    return rng.choice(
        (
            path + b"/",
            b"/" + path,
            path + b"//",
            path + b"/..",
            path + b"/%2e%2e",
            path + b"%00",
            path + b"%ff",
            path + b"%zz",
            path + b";a=b",
            path.upper(),
            path.replace(b"e", b"%65"),
            b"%s/%s/%s" % (start, canary, end),
            b"/models/%s/embed" % canary,
            b"/v2/models/%s/infer" % canary,
            b"/v1/models/" + canary,
            b"/models/%2e%2e/embed",
            b"/models//embed",
            b"/models/%E2%80%AE/embed",
            b"/v1/%s" % canary,
            b"/docs/../%s" % canary,
            b"/docs/%2e%2e%2fasgi.py",
            b"/" + b"a" * 2000,
            b"/" + b"../" * 50,
            b"http://edge" + path,
        )
    )


def framed(request: Fuzzed, head: Head, body: bytes, rng: Random) -> bytes:
    """All that goes over the wire."""
    if request.broken:
        return _broken(request, head, body, rng)
    line = b"%s %s HTTP/1.1" % (head.method, head.path)
    if head.chunked:
        return _head(line, [*head.headers, (b"transfer-encoding", b"chunked")]) + _chunks(body, rng)
    length = [(b"content-length", b"%d" % len(body))] if body or head.method == b"POST" else []
    return _head(line, [*head.headers, *length]) + body


def _head(line: bytes, headers: Headers) -> bytes:
    return b"\r\n".join((line, *(b"%s: %s" % header for header in headers), b"", b""))


def _chunks(body: bytes, rng: Random) -> bytes:
    size = rng.choice((1, 7, 100, 5000)) if len(body) < 3000 else 5000
    extension = rng.choice((b"", b"", b";a=b", b';q="x"'))
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    trailer = rng.choice((b"", b"", b"x-trailer: 1\r\n"))
    return b"".join((*(b"%x%s\r\n%s\r\n" % (len(p), extension, p) for p in pieces), b"0\r\n", trailer, b"\r\n"))


def _broken(request: Fuzzed, head: Head, body: bytes, rng: Random) -> bytes:
    """What no client would send, or a part of what it would."""
    line = b"%s %s HTTP/1.1" % (head.method, head.path)
    right = (b"content-length", b"%d" % len(body))
    chunked = (b"transfer-encoding", b"chunked")
    hidden = b"GET /%s HTTP/1.1\r\nhost: a\r\n\r\n" % request.canary.encode()
    what = rng.choice(_BROKEN)
    request.kinds.append(what)
    request.half_closes = what in _INCOMPLETE
    if what in _LENGTHS:
        return _head(line, [*head.headers, (b"content-length", _LENGTHS[what])]) + body
    if what in _LINES:
        return _head(_LINES[what] % head.path, [*head.headers, right]) + body
    if what in _LAST_HEADERS:
        return _head(line, [*head.headers, right, _LAST_HEADERS[what]]) + body
    if what in _CHUNKS:
        return _head(line, [*head.headers, chunked]) + _CHUNKS[what] % body[:100]
    if what == "length and chunked":
        return _head(line, [*head.headers, right, chunked]) + b"0\r\n\r\n" + hidden
    if what == "hidden request":
        return _head(line, [*head.headers, right]) + body + hidden
    if what == "cut in the head":
        return _head(line, head.headers)[: rng.randrange(1, 40)]
    if what == "lines end with LF":
        return _head(line, [*head.headers, right]).replace(b"\r\n", b"\n") + body
    if what == "bytes flipped":
        raw = bytearray(_head(line, [*head.headers, right]) + body)
        for _ in range(3):
            raw[rng.randrange(min(len(raw), 120))] ^= 1 << rng.randrange(8)
        return bytes(raw)
    # What stalls sends less than it announced too, and stays.
    return _head(line, [*head.headers, (b"content-length", b"%d" % (len(body) + 9))]) + body


_LENGTHS = {
    "negative length": b"-1",
    "length in words": b"ten",
    "length with a sign": b"+5",
    "huge length": b"9" * 30,
    "two lengths in one": b"5, 6",
    "empty length": b"",
    "length with a space": b"1 0",
}
_LINES = {
    "no version": b"POST %s",
    "version 9": b"POST %s HTTP/9.9",
    "version 1.0": b"POST %s HTTP/1.0",
    "no method": b" %s HTTP/1.1",
    "method in small letters": b"post %s HTTP/1.1",
    "path with a space": b"POST %s a HTTP/1.1",
    "path with a NUL": b"POST %s\x00 HTTP/1.1",
    "path with a byte": b"POST %s\xff HTTP/1.1",
    "no path": b"POST HTTP/1.1%.0s",
    "CONNECT": b"CONNECT %.0sevil.example:443 HTTP/1.1",
    "star": b"OPTIONS *%.0s HTTP/1.1",
    "HTTP/2": b"PRI * HTTP/2.0%.0s",
    "TLS": b"\x16\x03\x01\x02\x00%.0s\x01\x00\x01\xfc\x03\x03",
}
_LAST_HEADERS = {
    "second length": (b"content-length", b"3"),
    "unknown coding": (b"transfer-encoding", b"xchunked"),
    "two codings": (b"transfer-encoding", b"gzip, chunked"),
    "bare CR": (b"x-a", b"a\rb"),
    "NUL in a header": (b"x-a", b"a\x00b"),
    "no colon": (b"no colon\r\nx-b", b"1"),
    "space before the colon": (b"content-length ", b"3"),
    "folded": (b"x-a", b"b\r\n content-length: 3"),
    "no name": (b"", b"a"),
    "name in bytes": (b"\xff\xfe", b"a"),
    "large": (b"x-large", b"a" * 70_000),
    "two hosts": (b"host", b"other"),
    "upgrade": (b"connection", b"upgrade\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk"),
    "websocket": (
        b"connection",
        b"upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==",
    ),
}
_CHUNKS = {
    "chunk size of letters": b"ZZ\r\n%s\r\n0\r\n\r\n",
    "negative chunk": b"-5\r\n%s\r\n0\r\n\r\n",
    "huge chunk": b"ffffffffffffffffff\r\n%s",
    "no last chunk": b"2\r\n{}\r\n%.0s",
    "chunk without its end": b"2\r\n{}0\r\n\r\n%.0s",
    "chunk size with 0x": b"0x5\r\n%s\r\n0\r\n\r\n",
    "large extension": b"2;" + b"a" * 20_000 + b"\r\n{}\r\n0\r\n\r\n%.0s",
}
_INCOMPLETE = frozenset(
    {
        "cut in the head",
        "bytes flipped",
        "less than announced",
        "huge length",
        "huge chunk",
        "no last chunk",
        "chunk without its end",
    }
)
_BROKEN = (
    *_LENGTHS,
    *_LINES,
    *_LAST_HEADERS,
    *_CHUNKS,
    "length and chunked",
    "hidden request",
    "cut in the head",
    "lines end with LF",
    "bytes flipped",
    "bytes flipped",
    "less than announced",
    "less than announced",
    "stalls",
)
