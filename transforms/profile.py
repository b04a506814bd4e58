"""Profiles by the column: checked, cleaned, and encoded for a snapshot's pages.

All here works on batches of Arrow columns, since a Python object a value costs more than what is
done with it. Nothing here reads files or clocks.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import InvalidProfile
from schemas.profile import (
    CONSENT_SEPARATOR,
    CONSENTS,
    EMAIL,
    KNOWN_COLUMNS,
    LOCALE,
    MAX_ATTRIBUTE_BYTES,
    MAX_EMAIL_BYTES,
    MAX_EMAIL_LOCAL_BYTES,
    MAX_FIELD_BYTES,
    MAX_RECIPIENT_ID_BYTES,
    PHONE,
    PUSH_TOKEN,
    RECIPIENT_ID,
    UPDATED_AT,
    ZONE,
    RejectReason,
)
from schemas.reasons import Channel
from schemas.snapshot import encode_long
from transforms.segment import Segment

Mask = npt.NDArray[np.bool_]

REASONS = tuple(RejectReason)
ADDRESS_COLUMNS = (EMAIL, PHONE, PUSH_TOKEN, LOCALE)
ATTRIBUTE_PREFIX = "a:"
"""Before an attribute's name among spilled columns, so that it can't be one of ours."""
NEVER_UPDATED = np.iinfo(np.int64).min
"""``updated_at`` of a row without one: older than every row with one."""
PASSED_SCHEMA = pa.schema([(RECIPIENT_ID, pa.string()), (UPDATED_AT, pa.int64())])
"""Spilled of a row outside the segment: enough to outdate the person's older rows."""

_ATOM = r'[^\s\x00-\x20\x7f@"(),:;<>\[\]\\]'
_LABEL = r'[^\s\x00-\x20\x7f@"(),:;<>\[\]\\.]'
_EMAIL_PATTERN = rf"^{_ATOM}+@{_LABEL}+(\.{_LABEL}+)+$"
_PHONE_PATTERN = r"^\+[1-9][0-9]{6,14}$"
_CONTROL_PATTERN = r"[\x01-\x1f\x7f]"
_OFFSET_PATTERN = r"(Z|z|[+-][0-9]{2}:?[0-9]{2})$"
_CONSENT = re.compile(
    rf"({'|'.join(one.value for one in Channel)}):(\*|[A-Za-z0-9][A-Za-z0-9._-]*)"
)


@dataclass(frozen=True, slots=True)
class Profiles:
    """A batch of valid profiles as clean columns of equal length."""

    recipient_ids: pa.Array
    """string, without nulls."""
    zones: pa.Array
    """string, without nulls; empty where unknown."""
    consents: pa.Array
    """string, without nulls: sorted distinct items joined by ';'."""
    updated_at_us: pa.Array
    """int64, without nulls: microseconds since 1970, ``NEVER_UPDATED`` where absent."""
    addresses: dict[str, pa.Array]
    """string by each of ``ADDRESS_COLUMNS``; null where absent."""
    attributes: dict[str, pa.Array]
    """boolean, int64, double or string by name; null where absent."""

    @property
    def count(self) -> int:
        """How many profiles the batch has."""
        return len(self.recipient_ids)


@dataclass(frozen=True, slots=True)
class Rejects:
    """Rows of a batch that are no profiles."""

    positions: npt.NDArray[np.int64]
    """Within the batch, ascending."""
    reasons: list[RejectReason]


class _Verdict:
    """The first reason of each row of a batch; position in ``REASONS`` + 1, or 0."""

    def __init__(self, count: int) -> None:
        self.codes = np.zeros(count, dtype=np.uint8)

    def refuse(self, mask: Mask, reason: RejectReason) -> None:
        self.codes[mask & (self.codes == 0)] = REASONS.index(reason) + 1


def attribute_type(name: str, kind: pa.DataType) -> pa.DataType:
    """The type as which a column of a typed source is kept as an attribute.

    Raises ``InvalidProfile`` for nested and binary columns.
    """
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_boolean(kind):
        return pa.bool_()
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return pa.int64()
    if pa.types.is_floating(kind):
        return pa.float64()
    if (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_temporal(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_null(kind)
        or kind == pa.uint64()
    ):
        return pa.string()
    raise InvalidProfile(
        f"column {name!r} is {kind}; expected boolean, numbers, text or times: leave it out or "
        "flatten it"
    )


def known_type(name: str, kind: pa.DataType) -> None:
    """Refuse a known column of a typed source that can't be read as what it means.

    Raises ``InvalidProfile``.
    """
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_null(plain)
    listed = pa.types.is_list(plain) or pa.types.is_large_list(plain)
    good = text or {
        RECIPIENT_ID: pa.types.is_integer(plain),
        CONSENTS: listed and pa.types.is_string(getattr(plain, "value_type", None) or pa.null()),
        UPDATED_AT: pa.types.is_timestamp(plain) or pa.types.is_date(plain),
    }.get(name, False)
    if not good:
        raise InvalidProfile(
            f"column {name!r} is {kind}; expected {KNOWN_COLUMNS[name]}, as text"
            + {
                RECIPIENT_ID: " or whole numbers",
                CONSENTS: " or a list of text",
                UPDATED_AT: " or a timestamp",
            }.get(name, "")
        )


def _numpy(array: pa.Array) -> Any:
    return array.to_numpy(zero_copy_only=False)


def _mask(array: pa.Array) -> Mask:
    """A boolean array as numpy; null is false."""
    if array.null_count:
        array = pc.fill_null(array, False)
    mask: Mask = array.to_numpy(zero_copy_only=False)
    return mask


def _text(array: pa.Array) -> pa.Array:
    """A known column as trimmed text; empty is null."""
    if not pa.types.is_string(array.type):
        array = array.cast(pa.string())
    array = pc.utf8_trim_whitespace(array)
    empty = pc.equal(pc.binary_length(array), 0)
    return pc.if_else(empty, pa.scalar(None, pa.string()), array) if _mask(empty).any() else array


def _has_nul(array: pa.Array) -> bool:
    data = array.buffers()[2]
    return data is not None and bool((np.frombuffer(data, dtype=np.uint8) == 0).any())


def check(
    columns: Mapping[str, pa.Array],
    count: int,
    zones: Collection[str],
    default_zone: str,
) -> tuple[Profiles, Rejects]:
    """Split a batch into valid profiles and rejects.

    ``columns`` have ``count`` values each; attributes have types of ``attribute_type``.
    ``zones`` are the time zones that exist. Rows keep their order.
    """
    verdict = _Verdict(count)
    for array in columns.values():
        if pa.types.is_string(array.type) and _has_nul(array):
            verdict.refuse(_mask(pc.match_substring(array, "\0")), RejectReason.UNDECODABLE)
    nothing = pa.nulls(count, pa.string())
    ids = _check_ids(_text(columns[RECIPIENT_ID]), verdict)
    addresses = {name: _text(columns.get(name, nothing)) for name in ADDRESS_COLUMNS}
    _check_addresses(addresses, verdict)
    zone = _check_zones(_text(columns.get(ZONE, nothing)), zones, default_zone, verdict)
    consents = _check_consents(columns.get(CONSENTS, nothing), verdict)
    updated = _check_times(columns.get(UPDATED_AT, nothing), verdict)
    attributes = {name: array for name, array in columns.items() if name not in KNOWN_COLUMNS}
    _check_attributes(attributes, verdict)

    bad = verdict.codes != 0
    rejected = np.flatnonzero(bad)
    rejects = Rejects(rejected, [REASONS[code - 1] for code in verdict.codes[rejected].tolist()])
    profiles = Profiles(ids, zone, consents, updated, addresses, attributes)
    if len(rejected):
        profiles = take(profiles, pa.array(np.flatnonzero(~bad)))
    return profiles, rejects


def take(profiles: Profiles, positions: pa.Array) -> Profiles:
    """The profiles at ``positions``, in that order."""
    return Profiles(
        profiles.recipient_ids.take(positions),
        profiles.zones.take(positions),
        profiles.consents.take(positions),
        profiles.updated_at_us.take(positions),
        {name: array.take(positions) for name, array in profiles.addresses.items()},
        {name: array.take(positions) for name, array in profiles.attributes.items()},
    )


def _check_ids(ids: pa.Array, verdict: _Verdict) -> pa.Array:
    verdict.refuse(_mask(pc.is_null(ids)), RejectReason.MISSING_ID)
    long = pc.greater(pc.binary_length(ids), MAX_RECIPIENT_ID_BYTES)
    verdict.refuse(_mask(long), RejectReason.LONG_ID)
    control = pc.match_substring_regex(ids, _CONTROL_PATTERN)
    verdict.refuse(_mask(control), RejectReason.CONTROL_IN_ID)
    return ids


def _check_addresses(addresses: Mapping[str, pa.Array], verdict: _Verdict) -> None:
    email = addresses[EMAIL]
    if email.null_count < len(email):
        sound = pc.and_(
            pc.match_substring_regex(email, _EMAIL_PATTERN),
            pc.and_(
                pc.less_equal(pc.binary_length(email), MAX_EMAIL_BYTES),
                pc.less_equal(pc.find_substring(email, "@"), MAX_EMAIL_LOCAL_BYTES),
            ),
        )
        verdict.refuse(_mask(pc.invert(sound)), RejectReason.BAD_EMAIL)
    phone = addresses[PHONE]
    if phone.null_count < len(phone):
        sound = pc.match_substring_regex(phone, _PHONE_PATTERN)
        verdict.refuse(_mask(pc.invert(sound)), RejectReason.BAD_PHONE)
    for name in (PUSH_TOKEN, LOCALE):
        long = pc.greater(pc.binary_length(addresses[name]), MAX_FIELD_BYTES)
        verdict.refuse(_mask(long), RejectReason.LONG_FIELD)


def _by_distinct(array: pa.Array, function: Callable[[str], str | None]) -> tuple[pa.Array, Mask]:
    """``function`` of each text, called once for each distinct one; nulls stay nulls.

    Also the mask of texts for which it was ``None``.
    """
    encoded = array.dictionary_encode()
    results = [function(one) for one in encoded.dictionary.to_pylist()]
    refused = np.array([one is None for one in results] + [False], dtype=np.bool_)
    codes = _numpy(pc.fill_null(encoded.indices, len(results)))
    return pa.array(results, pa.string()).take(encoded.indices), refused[codes]


def _check_zones(
    zone: pa.Array, zones: Collection[str], default_zone: str, verdict: _Verdict
) -> pa.Array:
    cleaned, unknown = _by_distinct(zone, lambda one: one if one in zones else None)
    verdict.refuse(unknown, RejectReason.UNKNOWN_ZONE)
    return pc.fill_null(cleaned, default_zone)


def canonical_consents(text: str) -> str | None:
    """Consent items sorted and without repetition; ``None`` if one is no channel:topic."""
    items = {item.strip() for item in text.split(CONSENT_SEPARATOR)} - {""}
    if not all(_CONSENT.fullmatch(item) for item in items):
        return None
    return CONSENT_SEPARATOR.join(sorted(items))


def _check_consents(consents: pa.Array, verdict: _Verdict) -> pa.Array:
    if pa.types.is_list(consents.type) or pa.types.is_large_list(consents.type):
        consents = pc.binary_join(consents, CONSENT_SEPARATOR)
    cleaned, refused = _by_distinct(
        consents.cast(pa.string()),
        lambda one: canonical_consents(one) if len(one) <= MAX_FIELD_BYTES else None,
    )
    verdict.refuse(refused, RejectReason.BAD_CONSENTS)
    return pc.fill_null(cleaned, "")


def _check_times(updated: pa.Array, verdict: _Verdict) -> pa.Array:
    if not pa.types.is_temporal(updated.type):
        updated = _text(updated)
        try:
            updated = _parse_times(updated)
        except pa.ArrowInvalid:
            updated, refused = _parse_times_one_by_one(updated)
            verdict.refuse(refused, RejectReason.BAD_UPDATED_AT)
    if not pa.types.is_timestamp(updated.type):
        updated = updated.cast(pa.timestamp("us"))
    if updated.type.unit != "us":
        updated = updated.cast(pa.timestamp("us", updated.type.tz), safe=False)
    return pc.fill_null(updated.cast(pa.int64()), NEVER_UPDATED)


def _parse_times(text: pa.Array) -> pa.Array:
    """Times of text by Arrow's parser; raises ``ArrowInvalid`` if it can't read each."""
    if text.null_count == len(text):
        return pa.nulls(len(text), pa.timestamp("us"))
    offset = _mask(pc.match_substring_regex(text, _OFFSET_PATTERN))
    bare = ~offset & _mask(pc.is_valid(text))
    if not bare.any():
        return text.cast(pa.timestamp("us", "UTC"))
    if not offset.any():
        return text.cast(pa.timestamp("us"))
    raise pa.ArrowInvalid("mixed")


def _parse_times_one_by_one(text: pa.Array) -> tuple[pa.Array, Mask]:
    """Times of text by Python's parser, and the mask of those that are none."""
    moments: list[datetime | None] = []
    refused = np.zeros(len(text), dtype=np.bool_)
    for position, one in enumerate(_numpy(text).tolist()):
        moment = None
        if one is not None:
            try:
                moment = datetime.fromisoformat(one)
                moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
                moment = moment.astimezone(UTC)
            except (ValueError, OverflowError):
                refused[position] = True
                moment = None
        moments.append(moment)
    return pa.array(moments, pa.timestamp("us", "UTC")), refused


def _check_attributes(attributes: dict[str, pa.Array], verdict: _Verdict) -> None:
    for name, array in attributes.items():
        if pa.types.is_string(array.type):
            long = pc.greater(pc.binary_length(array), MAX_ATTRIBUTE_BYTES)
            verdict.refuse(_mask(long), RejectReason.LONG_FIELD)
        elif pa.types.is_floating(array.type):
            verdict.refuse(_mask(pc.is_inf(array)), RejectReason.BAD_ATTRIBUTE)
            absent = pc.is_nan(array)
            if _mask(absent).any():
                attributes[name] = pc.if_else(absent, pa.scalar(None, array.type), array)


def select(segment: Segment, profiles: Profiles) -> Mask:
    """Which profiles of a batch are in a segment.

    The expression is evaluated once for each distinct combination of the values that it reads.
    """
    count = profiles.count
    if not segment.names:
        return np.full(count, segment.selects(()), dtype=np.bool_)
    dictionaries: list[list[Any]] = []
    combined = np.zeros(count, dtype=np.int64)
    for name in segment.names:
        codes, values = _codes(profiles, name)
        dictionaries.append(values)
        combined = combined * len(values) + codes
        if len(dictionaries) > 1:
            # Bounded by the batch again, so that many names can't overflow 64 bits.
            distinct, combined = np.unique(combined, return_inverse=True)
            dictionaries = [_combine(dictionaries, distinct)]
    rows = dictionaries[0]
    if len(segment.names) == 1:
        rows = [(value,) for value in rows]
    chosen = np.array([segment.selects(row) for row in rows], dtype=np.bool_)
    mask: Mask = chosen[combined]
    return mask


def _combine(dictionaries: list[list[Any]], distinct: npt.NDArray[np.int64]) -> list[Any]:
    """Tuples of values for each distinct code of two dictionaries combined."""
    before, last = dictionaries
    tuples = [one if isinstance(one, tuple) else (one,) for one in before]
    return [(*tuples[code // len(last)], last[code % len(last)]) for code in distinct.tolist()]


def _codes(profiles: Profiles, name: str) -> tuple[npt.NDArray[np.int64], list[Any]]:
    """A field or attribute as codes, and the value of each code."""
    parse: Callable[[Any], Any] = lambda value: value  # noqa: E731
    if name == RECIPIENT_ID:
        array = profiles.recipient_ids
    elif name == ZONE:
        array = profiles.zones
        parse = lambda value: value or None  # noqa: E731
    elif name == CONSENTS:
        array = profiles.consents
        parse = lambda value: frozenset(value.split(CONSENT_SEPARATOR)) - {""}  # noqa: E731
    elif name == UPDATED_AT:
        array = profiles.updated_at_us
        parse = _iso
    elif name in profiles.addresses:
        array = profiles.addresses[name]
    elif name in profiles.attributes:
        array = profiles.attributes[name]
    else:
        return np.zeros(profiles.count, dtype=np.int64), [None]
    encoded = array.dictionary_encode()
    values = [parse(value) for value in _numpy(encoded.dictionary).tolist()]
    if encoded.null_count or not values:
        codes = _numpy(pc.fill_null(encoded.indices, len(values)))
        return codes.astype(np.int64), [*values, None]
    return _numpy(encoded.indices).astype(np.int64), values


def _iso(microseconds: int) -> str | None:
    if microseconds == NEVER_UPDATED:
        return None
    return str(np.datetime64(microseconds, "us")) + "Z"


def shards_of(tenant: str, recipient_ids: pa.Array) -> npt.NDArray[np.uint8]:
    """The shard of each recipient; equal to ``schemas.snapshot.shard_of`` one by one."""
    start = hashlib.blake2b(f"{tenant}\0".encode(), digest_size=8).copy

    def shard(recipient_id: bytes) -> int:
        digest = start()
        digest.update(recipient_id)
        return digest.digest()[0]

    return np.fromiter(
        map(shard, _numpy(recipient_ids.cast(pa.binary())).tolist()),
        dtype=np.uint8,
        count=len(recipient_ids),
    )


def spilled(profiles: Profiles) -> pa.RecordBatch:
    """Profiles as they wait for their page: addresses and attributes are encoded as Avro.

    Columns: recipient_id, zone, consents, updated_at, the address columns, then attributes by
    name. Encoded here, in large batches, so that finishing a page is cutting bytes.
    """
    columns = {
        RECIPIENT_ID: profiles.recipient_ids,
        ZONE: profiles.zones,
        CONSENTS: profiles.consents,
        UPDATED_AT: profiles.updated_at_us,
    }
    for name in ADDRESS_COLUMNS:
        columns[name] = encode_texts(profiles.addresses[name], 1)
    for name in sorted(profiles.attributes):
        columns[ATTRIBUTE_PREFIX + name] = encode_values(profiles.attributes[name])
    return pa.record_batch(list(columns.values()), names=list(columns))


@cache
def _prefixes(branch: int | None) -> pa.Array:
    """What stands before a text of each length: branch of the union, and length."""
    before = b"" if branch is None else encode_long(branch)
    longest = max(MAX_ATTRIBUTE_BYTES, MAX_FIELD_BYTES)
    return pa.array([before + encode_long(size) for size in range(longest + 1)], pa.binary())


def encode_texts(array: pa.Array, branch: int | None) -> pa.Array:
    """Each text as Avro: of that branch of a union whose branch 0 is null, or a plain string."""
    lengths = pc.binary_length(array)
    encoded = pc.binary_join_element_wise(
        _prefixes(branch).take(lengths), array.cast(pa.binary()), b""
    )
    return pc.fill_null(encoded, b"\0") if encoded.null_count else encoded


def encode_values(array: pa.Array) -> pa.Array:
    """Each attribute as Avro's union [null, boolean, long, double, string]."""
    if pa.types.is_string(array.type):
        return encode_texts(array, 4)
    encode: Callable[[Any], bytes]
    if pa.types.is_boolean(array.type):
        encode = _encode_boolean
    elif pa.types.is_integer(array.type):
        encode = _encode_long
    else:
        encode = _encode_double
    distinct = array.dictionary_encode()
    values = pa.array(
        [encode(value) for value in _numpy(distinct.dictionary).tolist()], pa.binary()
    ).take(distinct.indices)
    return pc.fill_null(values, b"\0") if values.null_count else values


def _encode_boolean(value: bool) -> bytes:
    return encode_long(1) + (b"\x01" if value else b"\x00")


def _encode_long(value: int) -> bytes:
    return encode_long(2) + encode_long(value)


_DOUBLE = struct.Struct("<d")


def _encode_double(value: float) -> bytes:
    return encode_long(3) + _DOUBLE.pack(value)
