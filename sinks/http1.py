"""A lean HTTP/1.1 client for providers: keep-alive, one request at a time on each connection.

It does what a delivery loop needs and no more: prepared requests with a body, small answers, no
redirects, no cookies, no compression, and no second attempt. What it adds over libraries is that
every failure says whether the request can have been accepted (`NotSent`, `InDoubt`).
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from urllib.parse import urlsplit

import httptools

from schemas.errors import InvalidInput
from sinks.connections import Endpoint, InDoubt, NotSent, Pool, Request, Wire, awaited


@dataclass(frozen=True, slots=True)
class HttpTimeouts:
    """How long each phase may take; a request's own deadline covers them all."""

    connect: timedelta = timedelta(seconds=5)
    write: timedelta = timedelta(seconds=5)
    first_byte: timedelta = timedelta(seconds=15)


DEFAULT_TIMEOUTS = HttpTimeouts()


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A final answer (never 1xx).

    `complete` is false when the connection broke, the deadline passed or the size limit was
    reached after the head: the status is known, the body may be cut off.
    """

    status: int
    body: bytes
    complete: bool
    headers: list[tuple[bytes, bytes]] = field(repr=False)

    def header(self, name: str) -> str | None:
        """The first header of this name (any case), or None."""
        wanted = name.lower().encode()
        for key, value in self.headers:
            if key.lower() == wanted:
                return value.decode("latin-1").strip()
        return None


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """Request line and headers up to the value of Content-Length."""

    head: bytes


_METHOD = re.compile(r"[A-Z]+")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(r"[\x20-\x7e\t]*")
_TARGET = re.compile(r"/[\x21-\x7e]*")


class HttpClient:
    """A pool of connections to one origin. Not to be shared between event loops.

    Args:
        base_url: `http://host[:port]` or `https://…`; a path in it is put before every target.
        connections: the most connections, hence requests in flight; others wait in turn.
        tls: the context for https; the default verifies against the system's authorities.
        allow_private: whether addresses that are not public may be dialled.
        max_answer_bytes: an answer larger than this is cut off and its connection closed.

    Raises:
        InvalidInput: the URL can't be used.
    """

    def __init__(
        self,
        base_url: str,
        *,
        connections: int = 64,
        tls: ssl.SSLContext | None = None,
        timeouts: HttpTimeouts = DEFAULT_TIMEOUTS,
        allow_private: bool = False,
        idle: timedelta = timedelta(seconds=30),
        max_answer_bytes: int = 65_536,
    ) -> None:
        try:
            url = urlsplit(base_url)
            port = url.port
        except ValueError:
            raise InvalidInput("a base URL has an impossible port or address") from None
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
            raise InvalidInput("a base URL must be http(s)://host[:port][/path]")
        if url.username or url.password or not _VALUE.fullmatch(url.netloc):
            raise InvalidInput("a base URL may not hold a user, a password or control characters")
        secure = url.scheme == "https"
        if secure and tls is None:
            tls = ssl.create_default_context()
        self._host = url.netloc
        self._path = url.path.rstrip("/")
        self._endpoint = Endpoint(
            url.hostname,
            port or (443 if secure else 80),
            tls if secure else None,
            allow_private=allow_private,
        )
        self._connect_s = timeouts.connect.total_seconds()
        self._write_s = timeouts.write.total_seconds()
        self._first_byte_s = timeouts.first_byte.total_seconds()
        self._max_answer = max_answer_bytes
        self._pool: Pool[_HttpWire] = Pool(self._connect, connections, idle)

    @property
    def connections(self) -> int:
        """The most requests in flight at once."""
        return self._pool.size

    def prepare(self, method: str, target: str, headers: Mapping[str, str]) -> PreparedRequest:
        """Build the part of a request that does not change.

        Raises:
            InvalidInput: method, target or a header would break the request.
        """
        target = self._path + target
        if not _METHOD.fullmatch(method) or not _TARGET.fullmatch(target):
            raise InvalidInput("an HTTP method or target can't be used")
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self._host}"]
        for name, value in headers.items():
            if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
                raise InvalidInput(f"the HTTP header {name[:40]!r} can't be used")
            if name.lower() in ("host", "content-length", "transfer-encoding", "connection"):
                raise InvalidInput(f"the HTTP header {name} is written by the client")
            lines.append(f"{name}: {value}")
        lines.append("Content-Length: ")
        return PreparedRequest("\r\n".join(lines).encode("ascii"))

    async def request(
        self, prepared: PreparedRequest, body: bytes, deadline: timedelta
    ) -> HttpAnswer:
        """Make one attempt; `deadline` covers waiting, connecting, writing and the answer.

        Raises:
            NotSent: the request did not leave whole.
            InDoubt: it left, and no answer came.
        """
        return await awaited(lambda done: self.submit(prepared, body, deadline, done))

    def submit(
        self,
        prepared: PreparedRequest,
        body: bytes,
        deadline: timedelta,
        done: Callable[[HttpAnswer | Exception], None],
    ) -> Callable[[], None]:
        """`request`, with the answer, or what it would raise, given to `done`; returns what cancels
        it."""
        until = asyncio.get_running_loop().time() + deadline.total_seconds()
        request = _Exchange(b"%b%d\r\n\r\n%b" % (prepared.head, len(body), body), until, done)
        self._pool.submit(request)
        return request.cancel

    async def close(self) -> None:
        """Close all connections; requests in flight end as their phase says."""
        await self._pool.close()

    async def _connect(self, until: float) -> _HttpWire:
        limit = min(until, asyncio.get_running_loop().time() + self._connect_s)
        return await self._endpoint.dial(self._wire, limit)

    def _wire(self) -> _HttpWire:
        return _HttpWire(self._pool, self._write_s, self._first_byte_s, self._max_answer)


class _Exchange(Request["_HttpWire", HttpAnswer]):
    """A request and its answer."""

    __slots__ = ("data",)

    def __init__(
        self, data: bytes, until: float, done: Callable[[HttpAnswer | Exception], None]
    ) -> None:
        super().__init__(until, done)
        self.data = data

    def begin(self, wire: _HttpWire) -> bool:
        self.wire = wire
        wire.start(self)
        return True


class _HttpWire(Wire):
    def __init__(
        self, pool: Pool[_HttpWire], write_s: float, first_byte_s: float, max_answer: int
    ) -> None:
        super().__init__()
        self._pool = pool
        self._write_s = write_s
        self._first_byte_s = first_byte_s
        self._max_answer = max_answer
        self._request: _Exchange | None = None
        self._reset()

    def _reset(self) -> None:
        # A new parser for each answer: what a server sends after one is never part of the next.
        self._parser = httptools.HttpResponseParser(self)
        self._received = 0
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._done = False

    def start(self, request: _Exchange) -> None:
        self._request = request
        self.write(request.data)
        phase_s = self._write_s if self.unsent else self._first_byte_s
        self.busy_until(min(request.until, self.loop.time() + phase_s))

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._request is not None and not self._received:
            self.busy_until(min(self._request.until, self.loop.time() + self._first_byte_s))

    # Called by the parser.
    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        if 100 <= self._status < 200 and self._status != 101:
            self._status = 0
            self._headers = []
        else:
            self._done = True
            self.usable = self.usable and self._parser.should_keep_alive()

    def on_message_begin(self) -> None:
        if self._done:
            self.usable = False

    def data_received(self, data: bytes) -> None:
        if self._request is None:
            self.abort()
            return
        if not self._received:
            self.busy_until(self._request.until)
        self._received += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.usable = False
            if not self._done:
                self._cut_off("malformed-answer")
                return
        if self._done:
            self.usable = self.usable and not self.unsent
            self._settle(self._known(complete=True))
        elif self._received > self._max_answer:
            self._cut_off("answer-too-large")

    def eof_received(self) -> bool:
        self.usable = False
        if self._request is not None and self._is_close_delimited():
            self._settle(self._known(complete=True))
        return False

    def broken(self) -> None:
        self._cut_off("connection-lost")

    def expired(self) -> None:
        self._cut_off("timeout")

    def _is_close_delimited(self) -> bool:
        framing = {name.lower() for name, _ in self._headers}
        return bool(self._status) and not framing & {b"content-length", b"transfer-encoding"}

    def _known(self, *, complete: bool) -> HttpAnswer:
        return HttpAnswer(self._status, b"".join(self._body), complete, self._headers)

    def _cut_off(self, reason: str) -> None:
        self.usable = False
        if self._status:
            self._settle(self._known(complete=False))
        elif self.unsent:
            self._settle(NotSent(reason, "the request did not leave whole"))
        else:
            self._settle(InDoubt(reason, "the request left and no answer came"))

    def _settle(self, result: HttpAnswer | NotSent | InDoubt) -> None:
        request = self._request
        if request is None:
            return
        self._request = None
        self.busy_until(0.0)
        if self.usable:
            self._reset()
        else:
            self.abort()
        request.end(result)
        self._pool.give(self)
