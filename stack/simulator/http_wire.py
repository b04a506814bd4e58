"""HTTP/1.1, the server's side, as little of it as providers' clients use and no less.

Keep-alive, pipelining, Content-Length and chunked bodies, ``Expect: 100-continue``, limits on
head and body. Heads are parsed once: clients repeat them byte for byte, but for the length.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import ClassVar

import orjson

from schemas.errors import InvalidInput
from stack.simulator.connection import Connection, OpenRequests, now_ms

MAX_HEAD_BYTES = 65_536
_CACHED_HEADS = 20_000


@dataclass(frozen=True, slots=True)
class Head:
    """What matters of a request's head."""

    method: str
    target: str
    length: int
    chunked: bool
    keep_alive: bool
    authorization: str
    content_type: str
    expects: bool


class MalformedRequest(InvalidInput):
    """The bytes are no request that we can frame; the connection can't go on."""


def parse_head(raw: bytes) -> Head:
    """Parse a head without its closing empty line. Raises MalformedRequest."""
    first, _, rest = raw.partition(b"\r\n")
    parts = first.decode("latin-1").split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise MalformedRequest("bad request line")
    fields: dict[str, str] = {}
    for line in rest.decode("latin-1").split("\r\n") if rest else ():
        name, colon, value = line.partition(":")
        if not colon or name != name.strip() or not name:
            raise MalformedRequest("bad header line")
        name, value = name.lower(), value.strip()
        if name == "content-length" and fields.get(name, value) != value:
            raise MalformedRequest("two different Content-Length headers")
        fields[name] = value
    chunked = fields.get("transfer-encoding", "").lower() == "chunked"
    if "transfer-encoding" in fields and (not chunked or "content-length" in fields):
        raise MalformedRequest("unsupported Transfer-Encoding")
    length = fields.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise MalformedRequest("bad Content-Length")
    connection = fields.get("connection", "").lower()
    return Head(
        method=parts[0],
        target=parts[1],
        length=int(length),
        chunked=chunked,
        keep_alive="close" not in connection
        and (parts[2] == "HTTP/1.1" or "keep-alive" in connection),
        authorization=fields.get("authorization", ""),
        content_type=fields.get("content-type", "").lower(),
        expects=fields.get("expect", "").lower() == "100-continue",
    )


_date: tuple[int, bytes] = (0, b"")


def _dated() -> bytes:
    global _date
    second = int(time.time())
    if _date[0] != second:
        _date = (second, b"\r\nDate: " + formatdate(second, usegmt=True).encode())
    return _date[1]


_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\nServer: nginx".encode()
    for status in HTTPStatus
}


def response(
    status: int,
    body: bytes = b"",
    headers: bytes = b"",
    content_type: bytes = b"application/json",
    close: bool = False,
) -> bytes:
    """A whole response. ``headers`` is ``\\r\\nName: value`` repeated."""
    line = _STATUS_LINES.get(status)
    if line is None:
        line = f"HTTP/1.1 {status} Status {status}\r\nServer: nginx".encode()
    return b"%b%b%b%b%b\r\nContent-Length: %d\r\n\r\n%b" % (
        line,
        _dated(),
        headers,
        b"\r\nContent-Type: " + content_type if body else b"",
        b"\r\nConnection: close" if close else b"",
        len(body),
        body,
    )


def json_response(status: int, value: object) -> bytes:
    """A whole response with a JSON body."""
    return response(status, orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))


class HttpConnection(Connection):
    """Frames requests and calls :meth:`on_request` for each, one at a time and in order.

    The subclass answers in one of Connection's ways.
    """

    _heads: ClassVar[dict[bytes, Head]] = {}

    def __init__(self, owner: OpenRequests, max_body_bytes: int) -> None:
        super().__init__(owner)
        self._max_body_bytes = max_body_bytes
        self._buffer: bytes | bytearray = b""
        self._head: Head | None = None
        self._body_at = 0

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if self.hung or self.closing:
            return
        if self._buffer:
            if isinstance(self._buffer, bytes):
                self._buffer = bytearray(self._buffer)
            self._buffer += data
        else:
            self._buffer = data
        if not self.busy:
            self.run()

    @property
    def is_open(self) -> bool:
        """Whether a request has begun to come and has no answer."""
        return self.busy or bool(self._buffer)

    def proceed(self) -> None:
        """Hand on whole requests until one is busy."""
        while self._buffer and not self.busy and not self.closing:
            head = self._head
            if head is None:
                end = self._buffer.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES + 4)
                if not self.started_ms:
                    self.started_ms = now_ms()
                if end < 0:
                    if len(self._buffer) > MAX_HEAD_BYTES:
                        self.refuse(431, "the request's head is too large")
                    return
                raw = bytes(self._buffer[:end])
                head = self._heads.get(raw)
                if head is None:
                    try:
                        head = parse_head(raw)
                    except MalformedRequest as error:
                        self.refuse(400, str(error))
                        return
                    if len(self._heads) >= _CACHED_HEADS:
                        self._heads.clear()
                    self._heads[raw] = head
                self._head = head
                self._body_at = end + 4
                self.on_head(head)
                if head.length > self._max_body_bytes:
                    self.refuse(413, "the request's body is too large")
                    return
                if head.expects and len(self._buffer) == self._body_at:
                    self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if head.chunked:
                try:
                    framed = self._unchunk()
                except MalformedRequest as error:
                    self.refuse(400, str(error))
                    return
                if framed is None:
                    if len(self._buffer) - self._body_at > 2 * self._max_body_bytes + 1024:
                        self.refuse(413, "the request's body is too large")
                    return
                body, end = framed
                if len(body) > self._max_body_bytes:
                    self.refuse(413, "the request's body is too large")
                    return
            else:
                end = self._body_at + head.length
                have = len(self._buffer)
                if have < end:
                    self.on_part(have - self._body_at, head.length)
                    return
                body = bytes(self._buffer[self._body_at : end])
            self._buffer = self._buffer[end:] if len(self._buffer) > end else b""
            self._head = None
            self.busy = True
            self.close_after = not head.keep_alive
            started, self.started_ms = self.started_ms, 0
            self.on_request(head, body, started)

    def _unchunk(self) -> tuple[bytes, int] | None:
        parts: list[bytes] = []
        at = self._body_at
        while True:
            line_end = self._buffer.find(b"\r\n", at)
            if line_end < 0:
                return None
            try:
                size = int(bytes(self._buffer[at:line_end]).split(b";")[0], 16)
            except ValueError as error:
                raise MalformedRequest("bad chunk size") from error
            if size < 0:
                raise MalformedRequest("bad chunk size")
            at = line_end + 2
            if size == 0:
                end = self._buffer.find(b"\r\n", at)
                while end > at:
                    at = end + 2
                    end = self._buffer.find(b"\r\n", at)
                return None if end < 0 else (b"".join(parts), end + 2)
            if len(self._buffer) < at + size + 2:
                return None
            parts.append(bytes(self._buffer[at : at + size]))
            at += size + 2

    def on_head(self, head: Head) -> None:
        """A request's head has come, before its body."""

    def on_part(self, have: int, length: int) -> None:
        """A part of a body has come: ``have`` of ``length`` bytes."""

    def on_request(self, head: Head, body: bytes, started_ms: int) -> None:
        """A whole request has come; ``started_ms`` is when its first bytes did."""
        raise AssertionError(f"{type(self).__name__} must say what a request does")

    def refused(self, status: int) -> None:
        """A request was refused before it was whole."""

    def refuse(self, status: int, message: str) -> None:
        """Refuse what can't be framed, and close."""
        self.refused(status)
        body = orjson.dumps({"errors": [{"message": message, "field": None, "help": None}]})
        self.transport.write(response(status, body, close=True))
        self.started_ms = 0
        self._buffer = b""
        self.close_gently()
