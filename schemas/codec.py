"""Records to bytes and back: Avro single-object encoding.

Bytes are ``C3 01``, the writer schema's CRC-64-AVRO fingerprint (little-endian), the Avro body
(Avro 1.11 specification, 'Single-object encoding'). The fingerprint names the writer's schema, so a
reader resolves what older writers wrote: current schemas are ``schemas/avro/*.avsc``, past ones
stay in ``schemas/avro/old``. Field kinds convert as: ``timestamp-millis`` - aware UTC datetime;
``long`` under a ``timedelta`` field - milliseconds; enum - ``Enum`` by value; array - tuple.
"""

from __future__ import annotations

import io
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import fastavro
import fastavro.utils
from fastavro.schema import fingerprint, to_parsing_canonical_form

from schemas import records, state
from schemas.errors import IncompatibleState, MalformedRecord, UnknownSchema

T = TypeVar("T")
Convert = Callable[[Any], Any]

MARKER = b"\xc3\x01"
HEADER_BYTES = 10
_FOLDER = Path(__file__).parent / "avro"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_SAMPLES = 8


def to_millis(moment: datetime) -> int:
    """Milliseconds since 1970 of an aware datetime, rounded down."""
    return (moment - _EPOCH) // _MILLISECOND


def from_millis(millis: int) -> datetime:
    """The aware UTC datetime of milliseconds since 1970."""
    return _EPOCH + timedelta(milliseconds=millis)


def _identity(value: Any) -> Any:
    return value


def _converters(hint: Any) -> tuple[Convert, Convert]:
    """Functions (to Avro, from Avro) of a type hint; identity functions where nothing changes."""
    hint = getattr(hint, "__supertype__", hint)
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (one for one in arguments if one is not type(None))
        write, read = _converters(inner)
        if write is _identity:
            return _identity, _identity
        return (
            lambda value: None if value is None else write(value),
            lambda value: None if value is None else read(value),
        )
    if origin is tuple:
        write, read = _converters(arguments[0])
        if write is _identity:
            return _identity, tuple
        return (
            lambda value: [write(one) for one in value],
            lambda value: tuple(read(one) for one in value),
        )
    if origin is Mapping or origin is dict or origin is typing.get_origin(Mapping[str, str]):
        return dict, _identity
    if hint is datetime:
        return to_millis, from_millis
    if hint is timedelta:
        return (
            lambda value: value // _MILLISECOND,
            lambda value: timedelta(milliseconds=value),
        )
    if isinstance(hint, type) and issubclass(hint, Enum):
        return (lambda value: value.value), hint
    if isinstance(hint, type) and is_dataclass(hint):
        return _record_converters(hint)
    return _identity, _identity


@cache
def _record_converters(record: type) -> tuple[Convert, Convert]:
    hints = typing.get_type_hints(record)
    plan = [(one.name, *_converters(hints[one.name])) for one in fields(record)]
    plain = [name for name, write, _ in plan if write is _identity]
    changed = [(name, write) for name, write, _ in plan if write is not _identity]
    reads = [(name, read) for name, _, read in plan if read is not _identity]

    def write_record(value: Any) -> dict[str, Any]:
        data = {name: getattr(value, name) for name in plain}
        for name, write in changed:
            data[name] = write(getattr(value, name))
        return data

    def read_record(data: dict[str, Any]) -> Any:
        for name, read in reads:
            data[name] = read(data[name])
        return record(**data)

    return write_record, read_record


class _Schemas:
    """All schemas on disk: the current one of each record, and every writer's by fingerprint."""

    def __init__(self, folder: Path) -> None:
        self.current: dict[str, Any] = {}
        self.layouts: dict[str, Any] = {}
        self.header: dict[str, bytes] = {}
        self.writers: dict[bytes, tuple[str, Any]] = {}
        for path in sorted(folder.glob("*.avsc")):
            name, parsed, mark = _load(path)
            self.current[name] = parsed
            self.layouts[mark.hex()] = json.loads(path.read_text())
            self.header[name] = MARKER + mark
            self.writers[mark] = (name, parsed)
        for path in sorted((folder / "old").glob("*.avsc")):
            name, parsed, mark = _load(path)
            self.writers.setdefault(mark, (name, parsed))


def _load(path: Path) -> tuple[str, Any, bytes]:
    raw = json.loads(path.read_text())
    parsed = fastavro.parse_schema(raw)
    mark = bytes.fromhex(fingerprint(to_parsing_canonical_form(raw), "CRC-64-AVRO"))
    return str(raw["name"]).rpartition(".")[2], parsed, mark


_SCHEMAS = _Schemas(_FOLDER)


def _converters_of(record: Any) -> tuple[Convert, Convert]:
    return _record_converters(record)


def _known(name: str) -> type:
    found: type = getattr(records, name, None) or getattr(state, name)
    return found


def encode(record: object) -> bytes:
    """The single-object bytes of a record of ``schemas.records`` or ``schemas.state``."""
    name = type(record).__name__
    write, _ = _converters_of(type(record))
    buffer = io.BytesIO()
    buffer.write(_SCHEMAS.header[name])
    fastavro.schemaless_writer(buffer, _SCHEMAS.current[name], write(record))
    return buffer.getvalue()


def decode(data: bytes, record: type[T]) -> T:
    """The record in ``data``, whichever known version wrote it.

    Raises:
        UnknownSchema: the fingerprint is no known writer's, or another record's.
        MalformedRecord: not single-object encoding, cut short, or values that the record refuses.
    """
    if data[:2] != MARKER or len(data) < HEADER_BYTES:
        raise MalformedRecord(
            f"expected a {record.__name__} in Avro single-object encoding (C3 01 …), got "
            f"{len(data)} bytes beginning {data[:2].hex(' ')!r}; see README, 'Producers'"
        )
    mark = data[2:HEADER_BYTES]
    known = _SCHEMAS.writers.get(mark)
    if known is None or known[0] != record.__name__:
        whose = "no known schema has" if known is None else f"belongs to {known[0]}"
        raise UnknownSchema(
            f"expected a {record.__name__}; the fingerprint {mark.hex()} {whose}: "
            "deploy the readers before the writers, or write schemas/avro's schema"
        )
    _, read = _converters_of(record)
    buffer = io.BytesIO(data)
    buffer.seek(HEADER_BYTES)
    try:
        body = fastavro.schemaless_reader(buffer, known[1], _SCHEMAS.current[record.__name__])
        if buffer.tell() != len(data):
            raise MalformedRecord(
                f"{len(data) - buffer.tell()} bytes follow the {record.__name__}: one a value"
            )
        value: T = read(body)
    except MalformedRecord:
        raise
    except Exception as error:
        raise MalformedRecord(
            f"a {record.__name__} with a known schema does not decode: "
            f"{type(error).__name__}: {error}"
        ) from error
    return value


def decode_state(data: bytes, record: type[T]) -> T:
    """``decode`` of what Flink's state holds.

    Raises:
        IncompatibleState: a layout that this version does not know.
        MalformedRecord: as ``decode``.
    """
    try:
        return decode(data, record)
    except UnknownSchema as error:
        raise IncompatibleState(
            f"a {record.__name__} in the job's state was written by a newer layout of Fanfare "
            f"(fingerprint {data[2:HEADER_BYTES].hex()}), which this version can't read; nothing "
            "was changed. Install the version that wrote it, or go back to the savepoint from "
            "before it and start this version from there"
        ) from error


def name_of(data: bytes) -> str | None:
    """The record name that a value's fingerprint says, or None for what is not ours."""
    if data[:2] != MARKER:
        return None
    known = _SCHEMAS.writers.get(data[2:HEADER_BYTES])
    return None if known is None else known[0]


def header_of(record: type) -> bytes:
    """The marker and fingerprint that the current writer of a record class begins with."""
    return _SCHEMAS.header[record.__name__]


def schema_of(record: type) -> Any:
    """The current parsed Avro schema of a record class."""
    return _SCHEMAS.current[record.__name__]


def layouts() -> Mapping[str, Any]:
    """What this version writes: schemas as they stand on disk, by fingerprint in hexadecimal."""
    return _SCHEMAS.layouts


def why_unreadable(mark: str, schema: Any) -> str | None:
    """What keeps this version from reading a layout that another one wrote; None: nothing does.

    Generated records of the layout are read, so that a schema which is known and does not resolve
    (a new field without a default, a changed type) is found before any data meets it.
    """
    name = str(schema["name"]).rpartition(".")[2]
    known = _SCHEMAS.writers.get(bytes.fromhex(mark))
    if known is None:
        return (
            f"a {name} of the layout {mark} has no schema here: keep every schema that was ever "
            "written, in schemas/avro/old"
        )
    if name not in _SCHEMAS.current:
        return f"there is no {name} any more, of which the layout {mark} was written"
    writer, reader = known[1], _SCHEMAS.current[name]
    try:
        for one in fastavro.utils.generate_many(writer, _SAMPLES):
            buffer = io.BytesIO()
            fastavro.schemaless_writer(buffer, writer, one)
            buffer.seek(0)
            fastavro.schemaless_reader(buffer, writer, reader)
    except Exception as error:  # fastavro's differ by what does not resolve
        return (
            f"a {name} of the layout {mark} does not read as today's: {error}: give added fields "
            "a default, and leave types as they are"
        )
    return None


def record_classes() -> tuple[type, ...]:
    """Every record class that has a schema on disk."""
    return tuple(_known(name) for name in sorted(_SCHEMAS.current))


def leading_strings(data: bytes, count: int) -> tuple[str, ...]:
    """The first ``count`` string fields of a record, without decoding the rest.

    Records that are routed by them keep them first for ever: tenant and run of ``PageResult``,
    ``Outcomes``, ``Send`` and ``PageOrder`` (then leg …), the command's id, tenant and run.

    Raises:
        MalformedRecord: the bytes end before.
    """
    return _strings(data, count)[0]


def long_after_strings(data: bytes, strings: int) -> int:
    """The long field behind the first ``strings`` string fields; see ``leading_strings``."""
    _, at = _strings(data, strings)
    try:
        return _read_long(data, at)[0]
    except IndexError as error:
        raise MalformedRecord(f"expected a long at byte {at}: the record ends") from error


def _strings(data: bytes, count: int) -> tuple[tuple[str, ...], int]:
    found: list[str] = []
    at = HEADER_BYTES
    try:
        for _ in range(count):
            length, at = _read_long(data, at)
            if length < 0 or at + length > len(data):
                raise MalformedRecord(f"a string of {length} bytes at {at} passes the end")
            found.append(data[at : at + length].decode())
            at += length
    except (IndexError, UnicodeDecodeError) as error:
        raise MalformedRecord(f"expected {count} strings at the beginning: {error}") from error
    return tuple(found), at


def _read_long(data: bytes, at: int) -> tuple[int, int]:
    """A zig-zag variable-length long and where the next value begins."""
    shift = value = 0
    while True:
        if shift > 63:
            raise MalformedRecord(f"a long of more than 10 bytes ends at {at}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value >> 1) ^ -(value & 1), at
        shift += 7
