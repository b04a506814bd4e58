"""``RecipientState`` as the decision reads it: integers instead of times, bytes kept for reuse.

Most of what decide costs on people with a history is reading and writing their state; the general
codec takes 25 µs for three reservations. The bytes are the same here (Avro single-object encoding
of the current schema; ``tests/schemas`` compares the two on random states), but what stays as it
is is copied, and reservations are kept by their bytes, since those of a page share most of them.
What was written by an older schema, or is unusual, goes through the general codec.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from schemas import codec
from schemas.codec import from_millis, to_millis
from schemas.ids import LegId, RunId, Tenant
from schemas.records import ConsentStatus
from schemas.state import ConsentEntry, RecipientState, Reservation

_HEADER = codec.header_of(RecipientState)
_FIRST = len(_HEADER)
_KEPT_PARTS = 8_192
_KEPT_ENTRIES = 32_768


class Word(NamedTuple):
    """A ``ConsentEntry`` with its time in milliseconds."""

    channel: str
    topic: str
    status: ConsentStatus
    at_ms: int


class Held(NamedTuple):
    """A ``Reservation`` with its time in milliseconds, and its Avro bytes."""

    run: str
    leg: str
    generation: int
    at_ms: int
    channel: str
    category: str
    settled: bool
    refunded: bool
    raw: bytes


class Memory(NamedTuple):
    """A ``RecipientState``: ``words`` and the bytes before the reservations, and these."""

    tenant: str
    words: tuple[Word, ...]
    head: bytes
    """Header, tenant and words as they stand in the state's bytes."""
    held: tuple[Held, ...]


def _long(value: int) -> bytes:
    rest = value << 1 if value >= 0 else (-value << 1) - 1
    out = bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)


def _string(value: str) -> bytes:
    data = value.encode()
    return _long(len(data)) + data


def _read_long(data: bytes, at: int) -> tuple[int, int]:
    rest = data[at]
    at += 1
    if rest < 0x80:
        return (rest >> 1) ^ -(rest & 1), at
    rest &= 0x7F
    shift = 7
    while True:
        byte = data[at]
        at += 1
        rest |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (rest >> 1) ^ -(rest & 1), at
        shift += 7


def _read_string(data: bytes, at: int) -> tuple[str, int]:
    size, at = _read_long(data, at)
    return data[at : at + size].decode(), at + size


@lru_cache(maxsize=_KEPT_PARTS)
def held(
    run: str,
    leg: str,
    generation: int,
    at_ms: int,
    channel: str,
    category: str,
    settled: bool,
    refunded: bool,
) -> Held:
    """A reservation, with its bytes."""
    raw = b"".join(
        (
            _string(run),
            _string(leg),
            _long(generation),
            _long(at_ms),
            _string(channel),
            _string(category),
            b"\1" if settled else b"\0",
            b"\1" if refunded else b"\0",
        )
    )
    return Held(run, leg, generation, at_ms, channel, category, settled, refunded, raw)


def _head(tenant: str, words: tuple[Word, ...]) -> bytes:
    if not words:
        return _empty_head(tenant)
    items = b"".join(
        _string(word.channel) + _string(word.topic) + _string(word.status.value) + _long(word.at_ms)
        for word in words
    )
    return _HEADER + _string(tenant) + _long(len(words)) + items + b"\0"


@lru_cache(maxsize=_KEPT_PARTS)
def _empty_head(tenant: str) -> bytes:
    return _HEADER + _string(tenant) + b"\0"


@lru_cache(maxsize=_KEPT_PARTS)
def _tenant_of(raw: bytes) -> str:
    return _read_string(raw, 0)[0]


@lru_cache(maxsize=_KEPT_PARTS)
def _scope_of(raw: bytes) -> tuple[str, str, ConsentStatus]:
    channel, at = _read_string(raw, 0)
    topic, at = _read_string(raw, at)
    status, _ = _read_string(raw, at)
    return channel, topic, ConsentStatus(status)


def _words_of(raw: bytes) -> tuple[Word, ...]:
    """The words of an array whose count and names have one-byte lengths."""
    words = []
    at = 1
    for _ in range(raw[0] >> 1):
        begin = at
        at += 1 + (raw[at] >> 1)
        at += 1 + (raw[at] >> 1)
        at += 1 + (raw[at] >> 1)
        channel, topic, status = _scope_of(raw[begin:at])
        at_ms, at = _read_long(raw, at)
        words.append(Word(channel, topic, status, at_ms))
    return tuple(words)


def memory(tenant: str, words: tuple[Word, ...], reservations: tuple[Held, ...]) -> Memory:
    """A recipient's memory of these words and reservations."""
    return Memory(tenant, words, _head(tenant, words), reservations)


def write(state: Memory) -> bytes:
    """The bytes of a state: those that ``codec.encode`` gives its ``RecipientState``."""
    parts = [one.raw for one in state.held]
    if not parts:
        return state.head + b"\0"
    return b"".join((state.head, _long(len(parts)), *parts, b"\0"))


def read(data: bytes) -> Memory:
    """The state in ``data``, whichever known version wrote it.

    Raises:
        IncompatibleState: a newer or foreign writer's bytes.
        MalformedRecord: bytes that are no recipient's state.
    """
    if data[:_FIRST] != _HEADER:
        return from_state(codec.decode_state(data, RecipientState))
    try:
        return _read(data)
    except (_Unusual, IndexError, ValueError):
        return from_state(codec.decode_state(data, RecipientState))


@lru_cache(maxsize=_KEPT_PARTS)
def _names_of(raw: bytes) -> tuple[str, str]:
    first, at = _read_string(raw, 0)
    second, _ = _read_string(raw, at)
    return first, second


@lru_cache(maxsize=_KEPT_ENTRIES)
def _held_of(raw: bytes) -> Held:
    """The reservation of bytes whose names have one-byte lengths."""
    at = 1 + (raw[0] >> 1)
    at += 1 + (raw[at] >> 1)
    run, leg = _names_of(raw[:at])
    generation, at = _read_long(raw, at)
    at_ms, at = _read_long(raw, at)
    channel, category = _names_of(raw[at:-2])
    return Held(run, leg, generation, at_ms, channel, category, raw[-2] == 1, raw[-1] == 1, raw)


class _Unusual(Exception):
    """Bytes that are right, perhaps, but not of the kind that is read fast: names of 64 bytes and
    more, or more than 63 entries."""


def _read(data: bytes) -> Memory:
    """Names and counts have one-byte lengths here: zig-zag, so below 64."""
    size = data[_FIRST]
    at = _FIRST + 1 + (size >> 1)
    count = data[at]
    if (size | count) & 0x81:
        raise _Unusual
    words: tuple[Word, ...] = ()
    if count:
        begin = at
        at += 1
        for _ in range(count >> 1):
            for _ in range(3):
                size = data[at]
                if size & 0x81:
                    raise _Unusual
                at += 1 + (size >> 1)
            while data[at] > 0x7F:
                at += 1
            at += 1
        if data[at]:
            raise _Unusual
        words = _words_of(data[begin:at])
    at += 1
    tenant, head = _tenant_of(data[_FIRST:at]), data[:at]
    count = data[at]
    if count & 0x81:
        raise _Unusual
    at += 1
    entries: list[Held] = []
    if count:
        for _ in range(count >> 1):
            begin = at
            run = data[at]
            at += 1 + (run >> 1)
            leg = data[at]
            at += 1 + (leg >> 1)
            while data[at] > 0x7F:
                at += 1
            at += 1
            while data[at] > 0x7F:
                at += 1
            at += 1
            channel = data[at]
            at += 1 + (channel >> 1)
            category = data[at]
            at += 3 + (category >> 1)
            if (run | leg | channel | category) & 0x81:
                raise _Unusual
            entries.append(_held_of(data[begin:at]))
        if data[at]:
            raise _Unusual
        at += 1
    if at != len(data):
        raise _Unusual
    return Memory(tenant, words, head, tuple(entries))


def from_state(state: RecipientState) -> Memory:
    """The memory of a state."""
    return memory(
        state.tenant,
        tuple(
            Word(one.channel, one.topic, one.status, to_millis(one.at)) for one in state.consents
        ),
        tuple(
            held(
                one.run,
                one.leg,
                one.generation,
                to_millis(one.at),
                one.channel,
                one.category,
                one.settled,
                one.refunded,
            )
            for one in state.reservations
        ),
    )


def to_state(state: Memory) -> RecipientState:
    """The state of a memory."""
    return RecipientState(
        tenant=Tenant(state.tenant),
        consents=tuple(
            ConsentEntry(word.channel, word.topic, word.status, from_millis(word.at_ms))
            for word in state.words
        ),
        reservations=tuple(
            Reservation(
                run=RunId(one.run),
                leg=LegId(one.leg),
                generation=one.generation,
                at=from_millis(one.at_ms),
                channel=one.channel,
                category=one.category,
                settled=one.settled,
                refunded=one.refunded,
            )
            for one in state.held
        ),
    )
