"""One request on one handle: from its text to the blocks of its answer.

Everything here blocks and runs on worker threads, one call at a time per request.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from stack.clickhouse_http.encodings import BROKEN_BODY, Encoder, Reader
from stack.clickhouse_http.engine import READS, Engine, Handle, identifier
from stack.clickhouse_http.failures import (
    INCORRECT_DATA,
    NOT_IMPLEMENTED,
    QUERY_IS_TOO_LARGE,
    READONLY,
    SYNTAX_ERROR,
    QueryFailed,
)
from stack.clickhouse_http.forms import ExternalTable
from stack.clickhouse_http.statements import (
    InlineInsert,
    Unfinished,
    first_word,
    output_format,
    split_insert,
    streams_by_block,
)

DEFAULT_FORMAT: Final = "TabSeparated"
MAX_STATEMENT_BYTES: Final = 64 * 1024**2
_READ_BYTES: Final = 64 * 1024
_APPEND_BYTES: Final = 1024**2
_NOT_STREAMABLE: Final = "Streaming query is not supported"
_LOCAL_FILES: Final = re.compile(rb"\bFROM\s+INFILE\b|\bINTO\s+OUTFILE\b", re.IGNORECASE)
_TEMPORARY: Final = re.compile(rb"CREATE\s+(OR\s+REPLACE\s+)?TEMPORARY\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Statement:
    """What a request asks to run. ``params`` are query parameters without their ``param_``."""

    query: bytes
    settings: Mapping[str, str]
    params: Mapping[str, str]
    database: str | None
    default_format: str
    readonly: bool
    external: tuple[ExternalTable, ...] = ()


class Body:
    """A request's body, decoded; what the codec can't read is the client's error."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes, none at the end. Raises QueryFailed (117)."""
        try:
            return self._reader.read(size)
        except BROKEN_BODY as error:
            raise QueryFailed.of(
                INCORRECT_DATA, f"The body does not match its Content-Encoding: {error}"
            ) from error


@dataclass(slots=True)
class Answer:
    """The answer to a statement: its blocks, pulled as they are wanted.

    ``format`` is None for statements without a result set. The summary grows while blocks are
    pulled. ``close`` must be called, from whatever outcome; it may be called twice.
    """

    handle: Handle
    kept: bool
    format: str | None = None
    summary: dict[str, int] = field(default_factory=dict)
    _blocks: Iterator[bytes] = field(default_factory=lambda: iter(()))
    _stream: Any = None
    _external: tuple[ExternalTable, ...] = ()
    closed: bool = False
    _begun: float = field(default_factory=time.monotonic)

    def pull(self, encoder: Encoder, at_least: int) -> tuple[bytes, bool]:
        """Return at least so many encoded bytes, or fewer and True at the end.

        Raises QueryFailed when the engine fails.
        """
        parts: list[bytes] = []
        size = 0
        for block in self._blocks:
            part = encoder.encode(block)
            parts.append(part)
            size += len(part)
            if size >= at_least:
                return b"".join(parts), False
        self.summary["elapsed_ns"] = int((time.monotonic() - self._begun) * 1e9)
        parts.append(encoder.finish())
        return b"".join(parts), True

    def close(self) -> None:
        """Stop what still runs and give the handle's resources back."""
        if self.closed:
            return
        self.closed = True
        try:
            if self._stream is not None:
                self._stream.close()
            if self.kept:
                for table in self._external:
                    self.handle.run(f"DROP TEMPORARY TABLE IF EXISTS {identifier(table.name)}")
        finally:
            if not self.kept:
                self.handle.close()

    def add(self, result: Any) -> None:
        """Add a chDB result's counts to the summary."""
        for name, count in (
            ("read_rows", result.storage_rows_read()),
            ("read_bytes", result.storage_bytes_read()),
            ("written_rows", result.rows_written()),
            ("written_bytes", result.bytes_written()),
            ("result_rows", result.rows_read()),
            ("result_bytes", result.size()),
        ):
            self.summary[name] = self.summary.get(name, 0) + int(count)


def execute(engine: Engine, session: Handle | None, statement: Statement, body: Body) -> Answer:
    """Start a statement; the answer's first blocks may still fail when they are pulled.

    An INSERT is finished when this returns, so are statements that can't be streamed. Without a
    session's handle the request gets its own, which the answer closes. Raises QueryFailed;
    nothing is left to close then.
    """
    kept = session is not None
    handle = session or engine.open()
    answer = Answer(handle, kept)
    try:
        handle.prepare(statement.settings, statement.database, kept)
        for table in statement.external:
            _load(handle, table)
            answer._external = (*answer._external, table)
        if statement.readonly and not kept:
            handle.run("SET readonly = 2")
        text, insert = _read_statement(statement.query, body)
        if insert is not None and not statement.params:
            _refuse_writes(statement, text)
            head = text[insert.data_offset :]
            _append(answer, insert.statement, insert.format, head, body)
        else:
            _run(answer, statement, text + _read_rest(body, len(text)))
    except BaseException:
        answer.close()
        raise
    return answer


def _read_statement(query: bytes, body: Body) -> tuple[bytes, InlineInsert | None]:
    more = body.read(_READ_BYTES)
    text = query + b"\n" + more if query and more else query or more
    if not text.strip():
        raise QueryFailed.of(SYNTAX_ERROR, "Empty query")
    while True:
        split = split_insert(text, complete=not more)
        if not isinstance(split, Unfinished):
            return text, split if isinstance(split, InlineInsert) else None
        more = body.read(_READ_BYTES)
        text += more
        _check_size(len(text))


def _read_rest(body: Body, read: int) -> bytes:
    parts = []
    while part := body.read(_APPEND_BYTES):
        parts.append(part)
        read += len(part)
        _check_size(read)
    return b"".join(parts)


def _check_size(size: int) -> None:
    if size > MAX_STATEMENT_BYTES:
        raise QueryFailed.of(
            QUERY_IS_TOO_LARGE,
            f"The statement is longer than {MAX_STATEMENT_BYTES} bytes; send data behind "
            "INSERT … FORMAT or as an external table",
        )


def _load(handle: Handle, table: ExternalTable) -> None:
    name = identifier(table.name)
    handle.run(f"CREATE TEMPORARY TABLE {name} ({table.structure})")
    statement = f"INSERT INTO {name}".encode()
    _append(Answer(handle, kept=True), statement, table.format, table.data, None)


def _append(
    answer: Answer, statement: bytes, format_name: str, head: bytes, body: Body | None
) -> None:
    inserter = None
    try:
        inserter = answer.handle.connection.send_insert(statement, format_name)
        if head:
            inserter.append(head)
        while body is not None and (part := body.read(_APPEND_BYTES)):
            inserter.append(part)
        result = inserter.finish()
    except QueryFailed:
        if inserter is not None:
            inserter.cancel()
        raise
    except Exception as error:
        if inserter is not None:
            inserter.cancel()
        raise QueryFailed.from_engine(error) from error
    for name in ("read", "written"):
        answer.summary[f"{name}_rows"] = int(result.rows_written)
        answer.summary[f"{name}_bytes"] = int(result.bytes_written)
    answer.summary["result_rows"] = int(result.rows_written)


def _run(answer: Answer, statement: Statement, sql: bytes) -> None:
    handle = answer.handle
    kind, count = handle.classify(sql)
    verb = first_word(sql)
    if count > 1 and verb != b"INSERT":
        raise QueryFailed.of(SYNTAX_ERROR, "Multi-statements are not allowed: send one at a time")
    if kind != READS:
        if _LOCAL_FILES.search(sql[:_READ_BYTES]) or _LOCAL_FILES.search(sql[-_READ_BYTES:]):
            raise QueryFailed.of(
                NOT_IMPLEMENTED, "INFILE and OUTFILE are for local clients; use the body instead"
            )
        _refuse_writes(statement, sql)
    format_name = output_format(sql) or statement.default_format
    if kind == READS:
        answer.format = format_name
    plain = not {"extremes", "output_format_json_array_of_rows"} & statement.settings.keys()
    if kind == READS and plain and streams_by_block(sql, format_name):
        try:
            stream = handle.connection.send_query(
                sql, statement.default_format, params=dict(statement.params)
            )
        except Exception as error:
            if _NOT_STREAMABLE not in str(error):
                raise QueryFailed.from_engine(error) from error
        else:
            answer._stream = stream
            answer._blocks = _stream_blocks(answer, stream)
            return
    result = handle.query(sql, statement.default_format, statement.params)
    answer.add(result)
    handle.after_statement(verb, sql)
    content = result.bytes()
    if content:
        answer.format = format_name
        answer._blocks = iter((content,))


def _stream_blocks(answer: Answer, stream: Any) -> Iterator[bytes]:
    while True:
        try:
            result = stream.fetch()
        except Exception as error:
            raise QueryFailed.from_engine(error) from error
        if result is None:
            return
        answer.add(result)
        yield result.bytes()


def _refuse_writes(statement: Statement, sql: bytes) -> None:
    if not statement.readonly:
        return
    if first_word(sql) in (b"SET", b"USE") or _TEMPORARY.match(sql.lstrip()):
        return
    raise QueryFailed.of(
        READONLY, "Cannot execute query in readonly mode. Use method POST to modify data"
    )
