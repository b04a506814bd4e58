"""The ASGI application: ClickHouse's HTTP interface on one engine.

Source of the rules: ClickHouse's documentation "HTTP interface", ``HTTPHandler.cpp`` and
``exceptionCodeToHTTPStatus.cpp``.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import io
import logging
import secrets
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import IO, Any, Final, TypeVar, cast
from urllib.parse import parse_qsl

import orjson

from stack.clickhouse_http.encodings import UnknownEncoding, choose, decoded, encoder
from stack.clickhouse_http.engine import Engine
from stack.clickhouse_http.execution import (
    DEFAULT_FORMAT,
    MAX_STATEMENT_BYTES,
    Answer,
    Body,
    Statement,
    execute,
)
from stack.clickhouse_http.failures import (
    AUTHENTICATION_FAILED,
    BAD_ARGUMENTS,
    INCORRECT_DATA,
    INVALID_SESSION_TIMEOUT,
    NOT_IMPLEMENTED,
    QUERY_IS_TOO_LARGE,
    UNKNOWN_EXCEPTION,
    QueryFailed,
)
from stack.clickhouse_http.forms import ExternalTable, external_tables, parse_form
from stack.clickhouse_http.sessions import DEFAULT_TIMEOUT, MAX_TIMEOUT, Session, Sessions

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
_T = TypeVar("_T")

log = logging.getLogger("fanfare.clickhouse")

# Bytes of a body or a buffered result that are held in memory before they go to a file.
SPILL_BYTES: Final = 4 * 1024**2
CHUNK_BYTES: Final = 256 * 1024
_TRAILER_SECONDS: Final = 0.1

# Parameters that the transport consumes: they never reach the engine.
_TRANSPORT: Final = frozenset(
    {
        "query",
        "user",
        "password",
        "database",
        "default_format",
        "session_id",
        "session_timeout",
        "session_check",
        "query_id",
        "quota_key",
        "role",
        "compress",
        "decompress",
        "buffer_size",
        "readonly",
        "wait_end_of_query",
        "stacktrace",
        "close_session",
        "client_protocol_version",
        "enable_http_compression",
        "http_zlib_compression_level",
        "http_response_buffer_size",
        "send_progress_in_http_headers",
        "http_headers_progress_interval_ms",
        "cancel_http_readonly_queries_on_client_close",
        "add_http_cors_header",
    }
)

_STATUS: Final[dict[int, int]] = {
    194: 401,
    **dict.fromkeys((192, 193, 497, 512, AUTHENTICATION_FAILED), 403),
    **dict.fromkeys(
        (
            *(6, 8, 15, 25, 26, 27, 36, 37, 38, 41, 44, 53, 62, 72, 117, 123, 167, 168, 223),
            *(321, 376, 427, 441, 675, 676),
        ),
        400,
    ),
    **dict.fromkeys((46, 47, 50, 56, 60, 63, 73, 78, 81, 115, 152, 336, 511), 404),
    **dict.fromkeys((76, 209, 439), 503),
    QUERY_IS_TOO_LARGE: 413,
    NOT_IMPLEMENTED: 501,
    159: 408,
    381: 411,
    779: 415,
}

_CONTENT_TYPES: Final = (
    ("json", b"application/json; charset=UTF-8"),
    ("tabseparated", b"text/tab-separated-values; charset=UTF-8"),
    ("tsv", b"text/tab-separated-values; charset=UTF-8"),
    ("csv", b"text/csv; charset=UTF-8"),
    ("xml", b"application/xml; charset=UTF-8"),
    ("native", b"application/octet-stream"),
    ("rowbinary", b"application/octet-stream"),
    ("parquet", b"application/octet-stream"),
    ("arrow", b"application/octet-stream"),
)


@dataclass(frozen=True, slots=True)
class Login:
    """The one user. Without a password every password is right, as for ClickHouse's default."""

    user: str = "default"
    password: str | None = None

    def admits(self, user: str, password: str) -> bool:
        """Compare in constant time."""
        same_user = hmac.compare_digest(_digest(user), _digest(self.user))
        expected = password if self.password is None else self.password
        return hmac.compare_digest(_digest(password), _digest(expected)) & same_user


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


@dataclass(frozen=True, slots=True)
class Request:
    """The parts of a request that decide how it is answered."""

    method: str
    path: str
    params: dict[str, str]
    headers: Mapping[str, str]

    @property
    def query_id(self) -> str:
        """The client's id of the query, or nothing if it gave none."""
        return self.params.get("query_id") or self.headers.get("x-clickhouse-query-id", "")


class Endpoint:
    """The ASGI 3 application. One instance per engine; not for several event loops."""

    def __init__(self, engine: Engine, login: Login, *, threads: int) -> None:
        self._engine = engine
        self._login = login
        self._sessions = Sessions(engine)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="query")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request; scopes of other kinds are left alone."""
        if scope["type"] != "http":
            return
        request = _request(scope)
        if request.path in ("/ping", "/replicas_status"):
            await _send_whole(send, 200, _text_headers(), b"Ok.\n")
            return
        reply = _Reply(request, send, self._engine.timezone)
        try:
            await self._answer(request, receive, reply)
        except _ClientGone:
            return
        except QueryFailed as error:
            await reply.fail(error)
        except Exception as error:
            log.exception("request failed: %s %s", request.method, request.path)
            await reply.fail(QueryFailed.of(UNKNOWN_EXCEPTION, f"{type(error).__name__}: {error}"))

    def close(self) -> None:
        """Close the sessions and let idle threads go; running queries are not waited for."""
        self._sessions.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _answer(self, request: Request, receive: Receive, reply: _Reply) -> None:
        self._authenticate(request)
        if request.path not in ("", "/"):
            text = f"There is no handler for {request.path}\n\nUse / for queries or /ping\n"
            await _send_whole(reply.send, 404, _text_headers(), text.encode())
            return
        if request.method not in ("GET", "HEAD", "POST", "PUT"):
            raise QueryFailed.of(NOT_IMPLEMENTED, f"Method {request.method} is not supported")
        if request.method in ("GET", "HEAD") and "query" not in request.params:
            await _send_whole(reply.send, 200, _text_headers(), b"Ok.\n")
            return
        for name in ("compress", "decompress"):
            if request.params.get(name, "0") not in ("", "0", "false"):
                raise QueryFailed.of(
                    NOT_IMPLEMENTED,
                    f"{name}=1 (ClickHouse's block compression) is not supported; use "
                    "Content-Encoding and Accept-Encoding",
                )
        with tempfile.SpooledTemporaryFile(SPILL_BYTES, dir=str(self._engine.path)) as spool:
            await _receive_body(receive, cast("IO[bytes]", spool))
            statement, body = _statement(request, cast("IO[bytes]", spool))
            gone = asyncio.ensure_future(_disconnected(receive))
            try:
                await self._execute(request, statement, body, reply, gone)
            finally:
                gone.cancel()

    def _authenticate(self, request: Request) -> None:
        user, password = _credentials(request)
        if not self._login.admits(user, password):
            raise QueryFailed.of(
                AUTHENTICATION_FAILED,
                f"{user}: Authentication failed: password is incorrect, or there is no user with "
                "such name.",
            )

    async def _execute(
        self,
        request: Request,
        statement: Statement,
        body: Body,
        reply: _Reply,
        gone: asyncio.Future[None],
    ) -> None:
        session = self._session(request)
        answer: Answer | None = None
        try:
            handle = session.handle if session else None
            answer = await self._in_thread(execute, self._engine, handle, statement, body)
            await self._deliver(request, answer, reply, session, gone)
        finally:
            if answer is not None and not answer.closed:
                await self._in_thread(answer.close)
            if session is not None:
                self._sessions.release(session)

    async def _deliver(
        self,
        request: Request,
        answer: Answer,
        reply: _Reply,
        session: Session | None,
        gone: asyncio.Future[None],
    ) -> None:
        encode = reply.encoder
        whole = request.params.get("wait_end_of_query", "0") not in ("", "0", "false")
        with tempfile.SpooledTemporaryFile(SPILL_BYTES, dir=str(self._engine.path)) as buffered:
            done = False
            while not done:
                if gone.done():
                    raise _ClientGone
                chunk, done = await self._in_thread(answer.pull, encode, CHUNK_BYTES)
                if done:
                    # The client may send its next request of this session on seeing the last byte.
                    await self._in_thread(answer.close)
                    if session is not None:
                        self._sessions.release(session)
                if whole and not (done and not buffered.tell()):
                    buffered.write(chunk)
                    continue
                await reply.body(answer, chunk, done)
            if buffered.tell():
                await reply.file(answer, cast("IO[bytes]", buffered))

    def _session(self, request: Request) -> Session | None:
        session_id = request.params.get("session_id")
        if not session_id:
            return None
        text = request.params.get("session_timeout")
        timeout = DEFAULT_TIMEOUT
        if text:
            if not text.isdecimal() or timedelta(seconds=int(text)) > MAX_TIMEOUT:
                raise QueryFailed.of(
                    INVALID_SESSION_TIMEOUT,
                    f"Session timeout {text!r} is not a number of seconds up to "
                    f"{MAX_TIMEOUT.total_seconds():.0f}",
                )
            timeout = timedelta(seconds=int(text))
        must_exist = request.params.get("session_check", "0") == "1"
        return self._sessions.acquire(session_id, timeout, must_exist)

    async def _in_thread(self, function: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)


class _ClientGone(Exception):
    """The client closed its connection: nobody is there to be told anything."""


class _Reply:
    """Sends one response, or the failure that takes its place."""

    def __init__(self, request: Request, send: Send, timezone: str) -> None:
        self.send = send
        self._started = False
        self._head = request.method == "HEAD"
        self._tag = secrets.token_hex(8)
        self._headers: Headers = [
            (b"x-clickhouse-query-id", _header(request.query_id or str(uuid.uuid4()))),
            (b"x-clickhouse-timezone", timezone.encode()),
            (b"x-clickhouse-server-display-name", b"fanfare"),
        ]
        self.encoding = None
        if request.params.get("enable_http_compression", "1") not in ("0", "false"):
            self.encoding = choose(request.headers.get("accept-encoding", ""))
        self.encoder = encoder(self.encoding)

    async def body(self, answer: Answer, chunk: bytes, last: bool) -> None:
        """Send a piece of the body, after the headers if it is the first."""
        if not self._started:
            headers = self._result_headers(answer)
            if last:
                headers.append((b"content-length", str(len(chunk)).encode()))
            await self._start(200, headers)
        content = b"" if self._head else chunk
        await self.send({"type": "http.response.body", "body": content, "more_body": not last})

    async def file(self, answer: Answer, content: IO[bytes]) -> None:
        """Send a buffered body as a whole."""
        size = content.tell()
        content.seek(0)
        length = [(b"content-length", str(size).encode())]
        await self._start(200, self._result_headers(answer) + length)
        while part := content.read(CHUNK_BYTES):
            size -= len(part)
            body = b"" if self._head else part
            await self.send({"type": "http.response.body", "body": body, "more_body": size > 0})

    async def fail(self, error: QueryFailed) -> None:
        """Send the exception; if the body has begun, its tagged trailer, and then break off.

        The missing last chunk tells clients that don't know the trailer that the body is cut.
        """
        message = f"{error}\n".encode("utf-8", "surrogateescape")
        if self._started:
            tag = self._tag.encode()
            trailer = b"\r\n__exception__\r\n%b\r\n%b%d %b\r\n__exception__\r\n" % (
                tag,
                message,
                len(message),
                tag,
            )
            content = self.encoder.encode(trailer) + self.encoder.finish()
            await self.send({"type": "http.response.body", "body": content, "more_body": True})
            # aiohttp drops what its user has not read when the connection breaks: leave it time.
            await asyncio.sleep(_TRAILER_SECONDS)
            return
        headers = [
            *self._headers,
            (b"x-clickhouse-exception-code", str(error.code).encode()),
            (b"content-type", b"text/plain; charset=UTF-8"),
            (b"content-length", str(len(message)).encode()),
        ]
        if error.code == AUTHENTICATION_FAILED:
            headers.append((b"www-authenticate", b'Basic realm="ClickHouse"'))
        await self._start(_STATUS.get(error.code, 500), headers)
        await self.send({"type": "http.response.body", "body": b"" if self._head else message})

    async def _start(self, status: int, headers: Headers) -> None:
        self._started = True
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    def _result_headers(self, answer: Answer) -> Headers:
        names = ("read_rows", "read_bytes", "written_rows", "written_bytes", "result_rows")
        counts = {name: str(answer.summary.get(name, 0)) for name in (*names, "result_bytes")}
        counts["total_rows_to_read"] = "0"
        counts["elapsed_ns"] = str(answer.summary.get("elapsed_ns", 0))
        headers = [
            *self._headers,
            (b"x-clickhouse-summary", orjson.dumps(counts)),
            (b"x-clickhouse-exception-tag", self._tag.encode()),
            (b"content-type", _content_type(answer.format)),
        ]
        if answer.format is not None:
            headers.append((b"x-clickhouse-format", _header(answer.format)))
        if self.encoding is not None:
            headers.append((b"content-encoding", self.encoding.encode()))
            headers.append((b"vary", b"Accept-Encoding"))
        return headers


def _request(scope: Scope) -> Request:
    query = scope["query_string"].decode("utf-8", "surrogateescape")
    params = dict(parse_qsl(query, keep_blank_values=True, errors="surrogateescape"))
    headers = {
        k.decode("latin-1"): v.decode("utf-8", "surrogateescape") for k, v in scope["headers"]
    }
    return Request(scope["method"], scope["path"], params, headers)


def _credentials(request: Request) -> tuple[str, str]:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            text = base64.b64decode(value, validate=True).decode("utf-8", "surrogateescape")
        except binascii.Error:
            raise QueryFailed.of(
                AUTHENTICATION_FAILED, "The Authorization header is no valid Basic credential"
            ) from None
        user, _, password = text.partition(":")
        return user, password
    user = request.headers.get("x-clickhouse-user") or request.params.get("user") or "default"
    key = request.headers.get("x-clickhouse-key")
    return user, request.params.get("password", "") if key is None else key


def _statement(request: Request, spool: IO[bytes]) -> tuple[Statement, Body]:
    params = dict(request.params)
    external: tuple[ExternalTable, ...] = ()
    try:
        reader = decoded(spool, request.headers.get("content-encoding", ""))
    except UnknownEncoding as error:
        raise QueryFailed.of(INCORRECT_DATA, str(error)) from error
    body = Body(reader)
    content_type = request.headers.get("content-type", "")
    if content_type.lower().startswith("multipart/form-data"):
        content = body.read(MAX_STATEMENT_BYTES + 1)
        if len(content) > MAX_STATEMENT_BYTES:
            raise QueryFailed.of(QUERY_IS_TOO_LARGE, f"The form passes {MAX_STATEMENT_BYTES} bytes")
        form = parse_form(content_type, content)
        params.update(form.fields)
        external = tuple(external_tables(form, params))
        body = Body(io.BytesIO())
    readonly = request.method in ("GET", "HEAD") or params.get("readonly", "0") in ("1", "2")
    statement = Statement(
        query=params.get("query", "").encode("utf-8", "surrogateescape"),
        settings={
            name: value
            for name, value in params.items()
            if name not in _TRANSPORT and not name.startswith("param_")
        },
        params={n.removeprefix("param_"): v for n, v in params.items() if n.startswith("param_")},
        database=params.get("database") or request.headers.get("x-clickhouse-database"),
        default_format=params.get("default_format")
        or request.headers.get("x-clickhouse-format")
        or DEFAULT_FORMAT,
        readonly=readonly,
        external=external,
    )
    if not statement.default_format.isidentifier():
        raise QueryFailed.of(BAD_ARGUMENTS, f"{statement.default_format!r} is no format")
    return statement, body


async def _receive_body(receive: Receive, spool: IO[bytes]) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientGone
        spool.write(message.get("body", b""))
        if not message.get("more_body", False):
            break
    spool.seek(0)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def _content_type(format_name: str | None) -> bytes:
    name = (format_name or DEFAULT_FORMAT).lower()
    if name in ("jsoneachrow", "jsonlines", "ndjson"):
        return b"application/x-ndjson; charset=UTF-8"
    found = (kind for prefix, kind in _CONTENT_TYPES if name.startswith(prefix))
    return next(found, b"text/plain; charset=UTF-8")


def _header(text: str) -> bytes:
    return "".join(c for c in text if c.isprintable()).encode("latin-1", "replace")


def _text_headers() -> Headers:
    return [(b"content-type", b"text/html; charset=UTF-8")]


async def _send_whole(send: Send, status: int, headers: Headers, content: bytes) -> None:
    length = (b"content-length", str(len(content)).encode())
    start = {"type": "http.response.start", "status": status, "headers": [*headers, length]}
    await send(start)
    await send({"type": "http.response.body", "body": content})
