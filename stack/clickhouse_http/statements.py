"""What the endpoint must know of an SQL text before the engine sees it. Pure, bytes in.

The engine parses SQL; this module only finds the border between an INSERT and the data behind it,
and the output format of a query, as ClickHouse's parser places them
(``ParserInsertQuery``: data begins after VALUES, or after FORMAT name, blanks and one newline).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

# Formats whose separately encoded blocks, joined, are one valid document. All others (JSON, Arrow,
# Parquet, *WithNames) have a header or footer for the whole and are materialised.
STREAMABLE_FORMATS: Final = frozenset(
    {
        "native",
        "tabseparated",
        "tsv",
        "tabseparatedraw",
        "tsvraw",
        "csv",
        "rowbinary",
        "jsoneachrow",
        "jsonlines",
        "ndjson",
        "jsoncompacteachrow",
        "null",
    }
)

_TOKEN: Final = re.compile(
    rb"""
      (?P<blank>\s+|--[^\n]*|\#[ !][^\n]*|/\*.*?\*/)
    | (?P<quoted>'(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.|"")*"|`(?:[^`\\]|\\.|``)*`)
    | (?P<heredoc>\$(?P<tag>\w*)\$.*?\$(?P=tag)\$)
    | (?P<word>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<number>[0-9][A-Za-z0-9_.]*)
    | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_SETTING: Final = rb"[A-Za-z_]\w*\s*=\s*(?:'(?:[^'\\]|\\.|'')*'|[\w.+-]+)"
_SETTINGS_CLAUSE: Final = re.compile(
    rb"\s+SETTINGS\s+(" + _SETTING + rb"(?:\s*,\s*" + _SETTING + rb")*)", re.IGNORECASE
)
_FORMAT_CLAUSE: Final = re.compile(
    rb"\bFORMAT\s+([A-Za-z]\w*)(?:\s+SETTINGS\s+[^()]*)?[\s;]*$", re.IGNORECASE
)
_COMMENT: Final = re.compile(rb"--|/\*|#")
_WHOLE_RESULT: Final = re.compile(rb"WITH\s+TOTALS|\bextremes\b|array_of_rows", re.IGNORECASE)
_INLINE_END: Final = frozenset({b"SELECT", b"WITH", b"FROM", b"WATCH", b"EXPLAIN"})
_TAIL_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Token:
    """One significant token: its upper-cased text, its bounds, and the depth of brackets."""

    text: bytes
    start: int
    end: int
    depth: int
    is_word: bool


def tokens(sql: bytes) -> Iterator[Token]:
    """Yield the significant tokens of ``sql``; blanks and comments are left out."""
    depth = 0
    for match in _TOKEN.finditer(sql):
        kind = match.lastgroup
        if kind == "blank":
            continue
        text = match.group()
        if text in (b")", b"]", b"}"):
            depth -= 1
        yield Token(text.upper(), match.start(), match.end(), depth, kind == "word")
        if text in (b"(", b"[", b"{"):
            depth += 1


def first_word(sql: bytes) -> bytes:
    """Return the first word of a statement in upper case, or nothing if there is none."""
    for token in tokens(sql):
        if token.is_word:
            return token.text
        if token.text != b"(":
            return b""
    return b""


@dataclass(frozen=True, slots=True)
class InlineInsert:
    """An INSERT that data follows: the statement without its FORMAT clause, the format's name,
    and the offset at which the data begins."""

    statement: bytes
    format: str
    data_offset: int


@dataclass(frozen=True, slots=True)
class WholeStatement:
    """A statement without data behind it (also INSERT … SELECT): the engine takes it whole."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """The border has not been seen: more bytes are needed to tell."""


def split_insert(text: bytes, complete: bool) -> InlineInsert | WholeStatement | Unfinished:
    """Find the border between an INSERT and its data.

    ``text`` is the beginning of a statement, possibly with data behind it; ``complete`` says that
    nothing follows. An INSERT that ends without VALUES, FORMAT or SELECT has format Values, as on
    a server. Never raises: what can't be understood is a ``WholeStatement``, and the engine says
    what is wrong with it.
    """
    stream = tokens(text)
    first = next(stream, None)
    if first is None:
        return WholeStatement() if complete else Unfinished()
    if first.text != b"INSERT":
        at_border = first.end == len(text) and not complete
        return Unfinished() if at_border else WholeStatement()
    named = False
    after_dot = False
    end = first.end
    for token in stream:
        if token.end == len(text) and not complete:
            return Unfinished()
        end = token.end
        if not named:
            named = not (token.is_word and token.text in (b"INTO", b"TABLE", b"FUNCTION"))
            continue
        part_of_name, after_dot = after_dot, token.text == b"."
        if token.depth or not token.is_word or part_of_name:
            continue
        if token.text == b"VALUES":
            return InlineInsert(text[: token.start], "Values", token.end)
        if token.text in _INLINE_END:
            return WholeStatement()
        if token.text == b"FORMAT":
            return _after_format(text, token, next(stream, None), complete)
    if not complete:
        return Unfinished()
    return InlineInsert(text[:end], "Values", len(text)) if named else WholeStatement()


def _after_format(
    text: bytes, keyword: Token, name: Token | None, complete: bool
) -> InlineInsert | WholeStatement | Unfinished:
    if name is None or (name.end == len(text) and not complete):
        return WholeStatement() if complete else Unfinished()
    if not name.is_word:
        return WholeStatement()
    statement = text[: keyword.start]
    offset = name.end
    settings = _SETTINGS_CLAUSE.match(text, offset)
    if settings:
        statement += b" SETTINGS " + settings.group(1)
        offset = settings.end()
    while text[offset : offset + 1] in (b" ", b"\t", b"\f"):
        offset += 1
    if text[offset : offset + 2] == b"\r\n":
        offset += 2
    elif text[offset : offset + 1] == b"\n":
        offset += 1
    elif offset >= len(text) - 1 and not complete:
        return Unfinished()
    return InlineInsert(statement, text[name.start : name.end].decode(), offset)


def output_format(sql: bytes) -> str | None:
    """Return the name in the statement's trailing FORMAT clause, or None if it has none."""
    tail = sql[-_TAIL_BYTES:]
    if _COMMENT.search(tail):
        tail = b" ".join(sql[token.start : token.end] for token in tokens(sql))
    match = _FORMAT_CLAUSE.search(tail)
    return match.group(1).decode() if match else None


def streams_by_block(sql: bytes, format_name: str) -> bool:
    """Say whether the result's blocks may be encoded one by one and joined."""
    return format_name.lower() in STREAMABLE_FORMATS and not _WHOLE_RESULT.search(sql)


def set_names(sql: bytes) -> frozenset[str]:
    """Return the names that a SET statement assigns."""
    found: set[str] = set()
    previous: Token | None = None
    for token in tokens(sql):
        if token.text == b"=" and previous is not None and previous.is_word:
            found.add(sql[previous.start : previous.end].decode())
        previous = token
    return frozenset(found)
