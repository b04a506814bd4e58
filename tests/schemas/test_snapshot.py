"""The layout of snapshots: shards for ever the same, blocks that any Avro tool reads."""

from __future__ import annotations

import io
from typing import Any

import fastavro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import CorruptPage
from schemas.pages import PAGE_SIZE, SHARDS
from schemas.snapshot import (
    PAGE_BODY_SCHEMA,
    PAGE_INDEX_SCHEMA,
    Block,
    Counts,
    Manifest,
    PageEntry,
    body_object,
    container_header,
    decode_body,
    decode_index,
    encode_block,
    encode_long,
    encode_string,
    index_object,
    recipient_key,
    shard_of,
    snapshot_id,
)

GOLDEN_KEYS = {
    ("", ""): "94f6d9cdd1ea8248",
    ("acme", "u-1"): "df81d596f7fc3766",
    ("açme", "ю"): "90850c1240bad29d",
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ADDRESS = st.none() | TEXT
VALUE = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT
)


def written(schema: Any, value: Any) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, schema, value)
    return out.getvalue()


def typed(value: Any) -> Any:
    """A value with its branch named, which fastavro would guess (True as a long, 1 as a double)."""
    names = {bool: "boolean", int: "long", float: "double", str: "string"}
    return value if value is None else (names[type(value)], value)


@pytest.mark.parametrize(("who", "key"), GOLDEN_KEYS.items())
def test_keys_and_shards_are_those_of_every_release(who: tuple[str, str], key: str) -> None:
    assert recipient_key(*who).hex() == key
    assert shard_of(*who) == int(key[:2], 16)


def test_shards_are_evenly_filled() -> None:
    filled = [0] * SHARDS
    for number in range(SHARDS * 100):
        filled[shard_of("acme", f"u-{number}")] += 1
    assert min(filled) > 50
    assert max(filled) < 150


@settings(deadline=None)
@given(st.integers(-(2**63), 2**63 - 1))
def test_longs_are_avro(value: int) -> None:
    assert encode_long(value) == written("long", value)


PEOPLE = st.lists(
    st.tuples(TEXT, st.sampled_from(["", "Europe/Berlin", "Asia/Tokyo"]), st.integers(0, 3)),
    min_size=1,
    max_size=PAGE_SIZE,
)


@settings(deadline=None)
@given(PEOPLE, st.integers(0, 2**40), st.data())
def test_an_index_comes_back_and_is_what_avro_writes(
    people: list[tuple[str, str, int]], first: int, data: st.DataObject
) -> None:
    sets = [[], ["email:offers"], ["email:*", "sms:*"], ["push:news"]]
    flags = data.draw(st.binary(min_size=len(people), max_size=len(people)))
    runs: list[tuple[str, int]] = []
    for _, zone, _ in people:
        if runs and runs[-1][0] == zone:
            runs[-1] = (zone, runs[-1][1] + 1)
        else:
            runs.append((zone, 1))
    positions = b"".join(which.to_bytes(2, "little") for _, _, which in people)
    ids = b"".join(encode_string(name) for name, _, _ in people)
    mine = index_object(first, len(people), ids, runs, sets, positions, flags)
    assert mine == encode_long(0) + written(
        PAGE_INDEX_SCHEMA,
        {
            "first_ordinal": first,
            "recipient_ids": [name for name, _, _ in people],
            "zones": [{"zone": zone, "count": count} for zone, count in runs],
            "consent_sets": sets,
            "consent_index": positions,
            "flags": flags,
        },
    )
    index = decode_index(encode_block(mine))
    assert index.first_ordinal == first
    assert index.recipient_ids == [name for name, _, _ in people]
    assert index.count == len(people)
    assert [index.zone_of(i) for i in range(index.count)] == [zone for _, zone, _ in people]
    assert [index.consents(i) for i in range(index.count)] == [
        frozenset(sets[which]) for _, _, which in people
    ]
    assert index.flags == flags


@settings(deadline=None)
@given(st.lists(st.tuples(ADDRESS, ADDRESS, VALUE), min_size=1, max_size=PAGE_SIZE))
def test_a_body_comes_back(people: list[tuple[str | None, str | None, Any]]) -> None:
    count = len(people)
    emails = b"".join(written(["null", "string"], email) for email, _, _ in people)
    tokens = b"".join(written(["null", "string"], token) for _, token, _ in people)
    union = ["null", "boolean", "long", "double", "string"]
    values = b"".join(written(union, typed(value)) for _, _, value in people)
    mine = body_object(7, count, emails, bytes(count), tokens, bytes(count), [("x y", values)])
    columns = [{"name": "x y", "values": [typed(value) for _, _, value in people]}]
    assert mine == encode_long(1) + written(
        PAGE_BODY_SCHEMA,
        {
            "first_ordinal": 7,
            "emails": [email for email, _, _ in people],
            "phones": [None] * count,
            "push_tokens": [token for _, token, _ in people],
            "locales": [None] * count,
            "attributes": columns,
        },
    )
    body = decode_body(encode_block(mine))
    assert (body.first_ordinal, body.count) == (7, count)
    for i, (email, token, value) in enumerate(people):
        assert (body.email(i), body.phone(i), body.push_token(i)) == (email, None, token)
        assert body.locale(i) is None
        assert body.attributes(i) == {"x y": value}
        assert type(body.attributes(i)["x y"]) is type(value)


def test_a_shard_file_is_an_avro_container() -> None:
    index = index_object(0, 1, encode_string("ю"), [("", 1)], [[]], b"\0\0", b"\0")
    body = body_object(0, 1, b"\0", b"\0", b"\0", b"\0", [])
    file = io.BytesIO(container_header() + encode_block(index) + encode_block(body))
    first, second = fastavro.reader(file)
    assert first["recipient_ids"] == ["ю"]
    assert second["emails"] == [None]


def test_a_block_of_the_other_kind_is_refused() -> None:
    body = encode_block(body_object(0, 1, b"\0", b"\0", b"\0", b"\0", []))
    with pytest.raises(CorruptPage, match="branch 1"):
        decode_index(body)
    with pytest.raises(CorruptPage, match="expected"):
        decode_body(body + b"\0")


def example_manifest() -> Manifest:
    block = Block(10, 20, "ab")
    pages = (PageEntry(3, 0, 0, 500, block, block), PageEntry(3, 1, 500, 7, block, block))
    counts = Counts(read=510, rejected=1, duplicates=1, not_selected=1, audience=507)
    return Manifest("açme", "age > 1", "", counts, ("age",), {"": 507}, pages)


def test_a_manifest_comes_back_and_names_the_snapshot() -> None:
    manifest = example_manifest()
    data = manifest.to_bytes()
    again = Manifest.from_bytes(data)
    assert again == manifest
    assert again.to_bytes() == data
    assert len(snapshot_id(data)) == 32
    assert snapshot_id(data) != snapshot_id(data + b" ")
    assert manifest.counts.balanced
    assert manifest.shard_size(3) == 507
    assert manifest.shard_size(4) == 0
    assert [entry.page for entry in manifest.pages_of(3)] == [0, 1]


def test_a_manifest_of_a_later_version_is_refused() -> None:
    data = example_manifest().to_bytes().replace(b'"version":1', b'"version":2')
    with pytest.raises(ValueError, match="version 2"):
        Manifest.from_bytes(data)
