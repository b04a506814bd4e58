"""Audience snapshots: shards, pages, their Avro blocks and the manifest.

A snapshot is a folder named by its content::

    <id>/manifest.json      canonical JSON; the id is the first 32 hex digits of its SHA-256
    <id>/shards/NNN.avro    one Avro object container file per shard that has recipients
    <id>/build.json         where it came from; no part of the identity

A shard's recipients are sorted by (zone, recipient_id), as UTF-8 bytes, and numbered from 0: the
**ordinals**. They lie in pages of at most ``PAGE_SIZE``. A page is two consecutive blocks of one
object each, so that each can be read by itself: ``PageIndex`` holds what a decision needs,
``PageBody`` what delivery needs. Both are columnar, because a page is always wanted whole and one
array of 500 strings decodes several times faster than 500 records.
"""

from __future__ import annotations

import hashlib
import io
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import fastavro
from backports import zstd

from schemas.errors import CorruptPage
from schemas.ids import SnapshotId
from schemas.pages import PAGE_SIZE, SHARDS

MANIFEST_VERSION = 1
MANIFEST_NAME = "manifest.json"
BUILD_NAME = "build.json"
ID_DIGITS = 32
COMPRESSION_LEVEL = 3
SYNC_MARKER = hashlib.blake2b(b"fanfare snapshot sync marker 1", digest_size=16).digest()
"""Constant, where Avro would draw it at random, so that the same audience is the same bytes."""

AttributeValue = bool | int | float | str | None
"""What an attribute of a profile may be."""

HAS_EMAIL = 1
HAS_PHONE = 2
HAS_PUSH_TOKEN = 4

_ADDRESSES = {"type": "array", "items": ["null", "string"]}
PAGE_INDEX_SCHEMA: dict[str, Any] = {
    "type": "record",
    "name": "PageIndex",
    "namespace": "fanfare.snapshot",
    "doc": "What a decision needs of a page's recipients, in ordinal order.",
    "fields": [
        {"name": "first_ordinal", "type": "long"},
        {"name": "recipient_ids", "type": {"type": "array", "items": "string"}},
        {
            "name": "zones",
            "doc": "Runs of equal IANA zones; an empty zone is an unknown one.",
            "type": {
                "type": "array",
                "items": {
                    "type": "record",
                    "name": "ZoneRun",
                    "fields": [
                        {"name": "zone", "type": "string"},
                        {"name": "count", "type": "int"},
                    ],
                },
            },
        },
        {
            "name": "consent_sets",
            "doc": "The distinct sets of the page; items are channel:topic or channel:*.",
            "type": {"type": "array", "items": {"type": "array", "items": "string"}},
        },
        {
            "name": "consent_index",
            "doc": "Position in consent_sets of each recipient, unsigned 16 bits, little-endian.",
            "type": "bytes",
        },
        {
            "name": "flags",
            "doc": "A byte a recipient: 1 has an e-mail address, 2 a phone, 4 a push token.",
            "type": "bytes",
        },
    ],
}
PAGE_BODY_SCHEMA: dict[str, Any] = {
    "type": "record",
    "name": "PageBody",
    "namespace": "fanfare.snapshot",
    "doc": "What delivery needs of a page's recipients, in ordinal order.",
    "fields": [
        {"name": "first_ordinal", "type": "long"},
        {"name": "emails", "type": _ADDRESSES},
        {"name": "phones", "type": _ADDRESSES},
        {"name": "push_tokens", "type": _ADDRESSES},
        {"name": "locales", "type": _ADDRESSES},
        {
            "name": "attributes",
            "type": {
                "type": "array",
                "items": {
                    "type": "record",
                    "name": "AttributeColumn",
                    "fields": [
                        {"name": "name", "type": "string"},
                        {
                            "name": "values",
                            "type": {
                                "type": "array",
                                "items": ["null", "boolean", "long", "double", "string"],
                            },
                        },
                    ],
                },
            },
        },
    ],
}
SHARD_SCHEMA: list[dict[str, Any]] = [PAGE_INDEX_SCHEMA, PAGE_BODY_SCHEMA]
_PARSED_INDEX = fastavro.parse_schema(PAGE_INDEX_SCHEMA)
_PARSED_BODY = fastavro.parse_schema(PAGE_BODY_SCHEMA)
_INDEX_BRANCH = 0
_BODY_BRANCH = 1


def recipient_key(tenant: str, recipient_id: str) -> bytes:
    """8 bytes that stand for a recipient of a tenant; their first byte is the shard.

    BLAKE2b with an 8-byte digest over tenant, a zero byte and recipient id, in UTF-8. Stable for
    ever: keyed state and ledgers of past runs were laid out by it.
    """
    return hashlib.blake2b(f"{tenant}\0{recipient_id}".encode(), digest_size=8).digest()


def shard_of(tenant: str, recipient_id: str) -> int:
    """The shard (0..255) in which all that concerns a recipient happens. Stable for ever."""
    return recipient_key(tenant, recipient_id)[0]


@dataclass(frozen=True, slots=True)
class PageIndex:
    """What a decision needs of a page. Positions ``i`` count from 0 within the page."""

    first_ordinal: int
    recipient_ids: list[str]
    zones: list[str]
    """IANA zone of each recipient; empty where unknown."""
    consent_sets: tuple[frozenset[str], ...]
    consent_index: Sequence[int]
    flags: bytes

    @property
    def count(self) -> int:
        """How many recipients the page has."""
        return len(self.recipient_ids)

    def zone_of(self, i: int) -> str:
        """The IANA zone of a recipient; empty where unknown."""
        return self.zones[i]

    def consents(self, i: int) -> frozenset[str]:
        """What a recipient consented to when the snapshot was built: ``channel:topic`` items.

        Recipients with equal consents share one object.
        """
        return self.consent_sets[self.consent_index[i]]


@dataclass(frozen=True, slots=True)
class PageBody:
    """What delivery needs of a page. Positions ``i`` count from 0 within the page."""

    first_ordinal: int
    emails: list[str | None]
    phones: list[str | None]
    push_tokens: list[str | None]
    locales: list[str | None]
    columns: tuple[tuple[str, list[AttributeValue]], ...]
    """Attributes as (name, values), by name."""

    @property
    def count(self) -> int:
        """How many recipients the page has."""
        return len(self.emails)

    def email(self, i: int) -> str | None:
        """A recipient's e-mail address."""
        return self.emails[i]

    def phone(self, i: int) -> str | None:
        """A recipient's phone number (E.164)."""
        return self.phones[i]

    def push_token(self, i: int) -> str | None:
        """A recipient's push token."""
        return self.push_tokens[i]

    def locale(self, i: int) -> str | None:
        """A recipient's locale, as the source gave it."""
        return self.locales[i]

    def attributes(self, i: int) -> dict[str, AttributeValue]:
        """A recipient's attributes by name; those that it lacks are ``None``."""
        return {name: values[i] for name, values in self.columns}


def encode_long(value: int) -> bytes:
    """An Avro ``int`` or ``long``: zig-zag, seven bits a byte, least significant first."""
    rest = value << 1 if value >= 0 else (-value << 1) - 1
    out = bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)


def encode_bytes(value: bytes) -> bytes:
    """Avro ``bytes``, or ``string`` of UTF-8 bytes."""
    return encode_long(len(value)) + value


def encode_string(value: str) -> bytes:
    """An Avro ``string``."""
    return encode_bytes(value.encode())


def _array(count: int, items: bytes) -> bytes:
    return encode_long(count) + items + b"\0" if count else b"\0"


def index_object(
    first_ordinal: int,
    count: int,
    recipient_ids: bytes,
    zone_runs: Iterable[tuple[str, int]],
    consent_sets: Sequence[Sequence[str]],
    consent_index: bytes,
    flags: bytes,
) -> bytes:
    """One ``PageIndex`` as Avro; ``recipient_ids`` are ``count`` encoded strings in a row."""
    runs = [encode_string(zone) + encode_long(length) for zone, length in zone_runs]
    sets = [_array(len(one), b"".join(map(encode_string, one))) for one in consent_sets]
    return b"".join(
        (
            encode_long(_INDEX_BRANCH),
            encode_long(first_ordinal),
            _array(count, recipient_ids),
            _array(len(runs), b"".join(runs)),
            _array(len(sets), b"".join(sets)),
            encode_bytes(consent_index),
            encode_bytes(flags),
        )
    )


def body_object(
    first_ordinal: int,
    count: int,
    emails: bytes,
    phones: bytes,
    push_tokens: bytes,
    locales: bytes,
    columns: Sequence[tuple[str, bytes]],
) -> bytes:
    """One ``PageBody`` as Avro; each column is ``count`` encoded values in a row.

    Addresses are values of the union [null, string], attributes of
    [null, boolean, long, double, string].
    """
    encoded = [encode_string(name) + _array(count, values) for name, values in columns]
    return b"".join(
        (
            encode_long(_BODY_BRANCH),
            encode_long(first_ordinal),
            _array(count, emails),
            _array(count, phones),
            _array(count, push_tokens),
            _array(count, locales),
            _array(len(encoded), b"".join(encoded)),
        )
    )


def container_header() -> bytes:
    """The header of every shard file (Avro 1.11 specification, 'Object Container Files')."""
    meta = {
        "avro.codec": b"zstandard",
        "avro.schema": json.dumps(SHARD_SCHEMA, separators=(",", ":")).encode(),
    }
    entries = b"".join(encode_string(key) + encode_bytes(value) for key, value in meta.items())
    return b"Obj\x01" + _array(len(meta), entries) + SYNC_MARKER


def encode_block(avro_object: bytes) -> bytes:
    """One object as a block of an object container file."""
    data = zstd.compress(avro_object, COMPRESSION_LEVEL)
    return encode_long(1) + encode_bytes(data) + SYNC_MARKER


def _read_long(data: bytes, at: int) -> tuple[int, int]:
    rest = shift = 0
    while True:
        byte = data[at]
        at += 1
        rest |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (rest >> 1) ^ -(rest & 1), at
        shift += 7


def _open_block(block: bytes, branch: int) -> io.BytesIO:
    """The one object of a block, its stream standing after the union's branch."""
    objects, at = _read_long(block, 0)
    size, at = _read_long(block, at)
    if objects != 1 or len(block) != at + size + len(SYNC_MARKER):
        raise CorruptPage(
            f"a page's block holds {objects} objects in {len(block)} bytes; expected 1 in "
            f"{at + size + len(SYNC_MARKER)}: build the snapshot again"
        )
    content = io.BytesIO(zstd.decompress(block[at : at + size]))
    found, _ = _read_long(content.read(1), 0)
    if found != branch:
        raise CorruptPage(
            f"a page's block holds branch {found} of the shard schema where {branch} was "
            "expected: build the snapshot again"
        )
    return content


def decode_index(block: bytes) -> PageIndex:
    """The ``PageIndex`` of a block whose hash was verified. Raises ``CorruptPage``."""
    raw: Any = fastavro.schemaless_reader(_open_block(block, _INDEX_BRANCH), _PARSED_INDEX, None)
    zones: list[str] = []
    for run in raw["zones"]:
        zones += [run["zone"]] * run["count"]
    consent_index = array("H", raw["consent_index"])
    if _BIG_ENDIAN:
        consent_index.byteswap()
    return PageIndex(
        first_ordinal=raw["first_ordinal"],
        recipient_ids=raw["recipient_ids"],
        zones=zones,
        consent_sets=tuple(map(frozenset, raw["consent_sets"])),
        consent_index=consent_index,
        flags=raw["flags"],
    )


_BIG_ENDIAN = array("H", b"\x01\x00")[0] != 1


def decode_body(block: bytes) -> PageBody:
    """The ``PageBody`` of a block whose hash was verified. Raises ``CorruptPage``."""
    raw: Any = fastavro.schemaless_reader(_open_block(block, _BODY_BRANCH), _PARSED_BODY, None)
    return PageBody(
        first_ordinal=raw["first_ordinal"],
        emails=raw["emails"],
        phones=raw["phones"],
        push_tokens=raw["push_tokens"],
        locales=raw["locales"],
        columns=tuple((column["name"], column["values"]) for column in raw["attributes"]),
    )


@dataclass(frozen=True, slots=True)
class Block:
    """Where a block lies in its shard's file: bytes ``offset`` to ``offset + length``."""

    offset: int
    length: int
    sha256: str
    """Hex SHA-256 of the block's bytes as they lie in the file."""


@dataclass(frozen=True, slots=True)
class PageEntry:
    """A page of a snapshot, as its manifest lists it."""

    shard: int
    page: int
    first_ordinal: int
    count: int
    index: Block
    body: Block


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows of the sources: read = rejected + duplicates + not_selected + audience."""

    read: int
    rejected: int
    """Rows that are no profile; the rejects file has each with its reason."""
    duplicates: int
    """Valid rows of a person of whom a later row was taken."""
    not_selected: int
    """People outside the segment."""
    audience: int

    @property
    def balanced(self) -> bool:
        """Whether every row read is in exactly one of the other counts."""
        return self.read == self.rejected + self.duplicates + self.not_selected + self.audience


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a snapshot holds. Equal content has equal bytes, however it was read."""

    tenant: str
    segment: str
    """The segment expression; empty selects everybody."""
    default_zone: str
    counts: Counts
    attributes: tuple[str, ...]
    """Names of the attributes, sorted."""
    zones: Mapping[str, int]
    """Recipients by zone."""
    pages: tuple[PageEntry, ...]
    """By shard, then page."""
    version: int = MANIFEST_VERSION
    shards: int = SHARDS
    page_size: int = PAGE_SIZE
    _by_shard: tuple[tuple[PageEntry, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_shard: list[list[PageEntry]] = [[] for _ in range(self.shards)]
        for entry in self.pages:
            by_shard[entry.shard].append(entry)
        object.__setattr__(self, "_by_shard", tuple(map(tuple, by_shard)))

    def pages_of(self, shard: int) -> tuple[PageEntry, ...]:
        """The pages of a shard, in order; position = page number."""
        return self._by_shard[shard]

    def shard_size(self, shard: int) -> int:
        """How many recipients a shard has: its ordinals are 0 to this, exclusive."""
        pages = self._by_shard[shard]
        return pages[-1].first_ordinal + pages[-1].count if pages else 0

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no blanks, UTF-8."""
        plain = asdict(self)
        del plain["_by_shard"]
        return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """The manifest of canonical JSON. Raises ``ValueError``, ``KeyError`` or ``TypeError``."""
        raw: dict[str, Any] = json.loads(data)
        if raw["version"] != MANIFEST_VERSION:
            raise ValueError(
                f"manifest of version {raw['version']}; this Fanfare reads {MANIFEST_VERSION}"
            )
        pages = tuple(
            PageEntry(
                shard=one["shard"],
                page=one["page"],
                first_ordinal=one["first_ordinal"],
                count=one["count"],
                index=Block(**one["index"]),
                body=Block(**one["body"]),
            )
            for one in raw["pages"]
        )
        return cls(
            tenant=raw["tenant"],
            segment=raw["segment"],
            default_zone=raw["default_zone"],
            counts=Counts(**raw["counts"]),
            attributes=tuple(raw["attributes"]),
            zones=raw["zones"],
            pages=pages,
            version=raw["version"],
            shards=raw["shards"],
            page_size=raw["page_size"],
        )


def snapshot_id(manifest: bytes) -> SnapshotId:
    """The id of the snapshot with this manifest."""
    return SnapshotId(hashlib.sha256(manifest).hexdigest()[:ID_DIGITS])


def shard_file_name(shard: int) -> str:
    """The path of a shard's file within its snapshot."""
    return f"shards/{shard:03d}.avro"
